"""Engine `cache`: blocks from an ActivationCache that TransformerLens has filled; nothing is run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.block import HOOK_OF
from sinkscope.capture.blocks import ATTENTION, NotFiniteError, OnBlock, Pass
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import Batch, Tokens


@dataclass(frozen=True)
class CachedCapture:
    """The engine, for one call of `measure`; `rows` gives each text's row in the cache, `columns` where its text begins."""

    adapter: Adapter
    groups: frozenset[frozenset[str]]
    cache: Any
    rows: dict[str, int]
    columns: list[int]
    name: str = "cache"
    why: str = "patterns of an ActivationCache; nothing was run"
    chunk: int | None = None

    def __enter__(self) -> CachedCapture:
        """Touch nothing."""
        return self

    def __exit__(self, *how: Any) -> None:
        """Touch nothing."""

    def close(self) -> None:
        """Touch nothing."""

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None], formed: bool = True) -> Tensor:
        """Hand out what the cache holds of these texts: patterns, which are formed.

        Raises:
            SinkscopeError: it lacks something, or holds NaN or infinity.
        """
        rows = [self.rows[s.label] for s in batch.sequences]
        needs = {"pattern" if n in ATTENTION else n for group in self.groups for n in group if n != "gate"}
        one = Pass(self.adapter, self.groups, batch, 0, on_block, tick)
        try:
            for layer in self.adapter.layers:
                for need in sorted(needs or {"pattern"}):
                    one.take(layer, need, self._held(layer, need, rows, batch.ids.shape[1]))
        except NotFiniteError:
            raise SinkscopeError(f"the cache holds NaN or infinity in layer {one.layer}. Nothing was reported") from None
        return torch.zeros(0)

    def _held(self, layer: int, need: str, rows: list[int], length: int) -> Tensor:
        name = f"blocks.{layer}." + ("attn.hook_pattern" if need == "pattern" else HOOK_OF.get(need, need))
        if not self.adapter.rotations:
            name = name.replace("hook_rot_", "hook_")  # positions that are not rotary rotate nothing
        if name not in self.cache.cache_dict:
            raise SinkscopeError(
                f"the cache has no {name!r}, which these metrics need: fill it with model.run_with_cache(tokens), or with "
                "a names_filter that lets it through"
            )
        value: Tensor = self.cache.cache_dict[name]
        if not self.cache.has_batch_dim:
            value = value[None]
        moved = []
        for row in rows:  # the text to the front: pads on the left go round to the end, where nobody looks
            one, column = value[row], self.columns[row]
            one = one.roll(-column, -2 if need == "pattern" else 0)
            moved.append(one.roll(-column, -1) if need == "pattern" else one)
        value = torch.stack(moved)
        return value[:, :, :length, :length] if need == "pattern" else value[:, :length]


def is_cache(thing: Any) -> bool:
    """Tell an ActivationCache by what it has: its class has lived in several places."""
    return all(hasattr(thing, name) for name in ("cache_dict", "has_batch_dim", "model"))


def plan(
    adapter: Adapter, groups: frozenset[frozenset[str]], cache: Any, tokens: Tokens, columns: list[int]
) -> CachedCapture:
    """Match the texts with the rows of the cache.

    Raises:
        SinkscopeError: it has another number of texts, or another length.
    """
    if adapter.gates and any("gate" in group for group in groups):
        raise SinkscopeError(f"a cache does not hold the output gates of {adapter.name}: pass the model and the texts")
    patterns = (v for k, v in cache.cache_dict.items() if k.endswith("attn.hook_pattern"))
    shape = next((tuple(v.shape) if cache.has_batch_dim else (1, *v.shape) for v in patterns), None)
    longest = max(column + len(s) for column, s in zip(columns, tokens.sequences, strict=True))
    if shape is not None and (shape[0], shape[-1]) != (len(tokens), longest):
        raise SinkscopeError(
            f"the cache holds {shape[0]} texts of up to {shape[-1]} tokens, and {len(tokens)} of up to {longest} were given: "
            "give the ids that it was filled with (of a padded batch with their attention_mask)"
        )
    _check_rows(adapter, cache, tokens, columns)
    return CachedCapture(adapter, groups, cache, {s.label: row for row, s in enumerate(tokens.sequences)}, columns)


def _check_rows(adapter: Adapter, cache: Any, tokens: Tokens, columns: list[int]) -> None:
    """Compare the texts with those that the cache was filled with, where it keeps their embeddings."""
    kept = cache.cache_dict.get("hook_embed")
    if kept is None or adapter.kind == "hooked_encoder":
        return
    kept = kept if cache.has_batch_dim else kept[None]
    with torch.no_grad():
        for row, (s, column) in enumerate(zip(tokens.sequences, columns, strict=True)):
            ours, held = adapter.embedding(s.ids.to(kept.device)), kept[row, column : column + len(s)]
            if ours.shape == held.shape and not torch.allclose(ours.float(), held.float(), rtol=1e-2, atol=1e-3):
                raise SinkscopeError(
                    f"row {row} of the cache is not {s.label!r}: give the ids that it was filled with, in their order (of a "
                    "padded batch with their attention_mask)"
                )
