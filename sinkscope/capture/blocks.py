"""One forward pass seen from inside: a layer's activations are collected until a group is complete, cut to blocks, let go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.block import Block, Rows
from sinkscope.capture.masks import check_seen
from sinkscope.capture.source import Source, StoredPattern
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import Batch

#: Needs that attention itself satisfies; the others are hook points.
ATTENTION = frozenset({"mass", "pattern"})

#: Takes a block, and the group of needs that it carries.
OnBlock = Callable[[Block, frozenset[str]], None]


class NotFiniteError(Exception):
    """NaN or infinity was met; the first layer is looked for afterwards."""


class Pass:
    """One forward pass over a batch, or over a chunk of its rows that begins at `start`.

    A block is made as soon as all that one of the `groups` needs has come. Metrics see float32 whatever autocast says.
    `formed` is False where none looks at a pattern itself, so that whole rows need not exist.
    """

    def __init__(
        self,
        adapter: Adapter,
        groups: frozenset[frozenset[str]],
        batch: Batch,
        start: int,
        on_block: OnBlock,
        tick: Callable[[], None],
        formed: bool = True,
    ) -> None:
        self.formed = formed
        self.adapter, self.groups, self.batch, self.start = adapter, groups, batch, start
        self.on_block, self.tick = on_block, tick
        self.layer = -1
        self.held: dict[str, Any] = {}
        self.waiting: set[frozenset[str]] = set()
        self.seen: set[int] = set()
        self._busy = False

    @property
    def unseen(self) -> list[int]:
        """Layers of which something never came."""
        return [layer for layer in self.adapter.layers if layer not in self.seen]

    def take(self, layer: int, need: str, value: Tensor | Source) -> None:
        """Take an activation of a layer, by the name that metrics have for it; a pattern as a tensor, or as its source.

        Raises:
            SinkscopeError: a metric ran the model while it is being measured.
        """
        if self._busy:
            raise SinkscopeError("a metric ran the model that is being measured: run it before or after, or on a copy")
        if layer != self.layer:
            self.layer, self.held, self.waiting = layer, self._open(layer), set(self.groups)
        if not self.waiting:
            return
        if need == "pattern" and isinstance(value, Tensor):
            window = self.adapter.windows.get(layer)
            if (mixed := self.batch.sequences[0].mixed) is not None:
                check_seen((value[0] > 0).any(0), mixed.within(window).to(value.device), window, layer)
            value = StoredPattern(value, self.start, self.adapter.causal and self.batch.ends_within(window) is None)
        if isinstance(value, Tensor):
            self._check_shape(need, value)
            self.held[need] = value
        else:
            if not value.finite(self.batch.valid[:, self.start : self.start + value.n].to(value.device)):
                raise NotFiniteError
            self.held |= dict.fromkeys(ATTENTION, value)
        for group in [g for g in self.waiting if g <= self.held.keys()]:
            self.waiting.discard(group)
            self._hand_out(group)
        self.held = {name: kept for name, kept in self.held.items() if any(name in g for g in self.waiting)}
        if not self.waiting:
            self.seen.add(layer)
            self.tick()

    def _open(self, layer: int) -> dict[str, Any]:
        """Give the gates of a model whose outputs are not gated, which let all through; of others, they are yet to come."""
        if not any("gate" in group for group in self.groups) or self.adapter.gates:
            return {}
        ids = self.batch.ids
        return {"gate": torch.ones(len(ids), ids.shape[1] - self.start, self.adapter.heads[layer], 1, device=ids.device)}

    def _check_shape(self, need: str, value: Tensor) -> None:
        """Refuse an activation whose axes are not those that metrics are promised."""
        axis, batch = query_axis(need), len(self.batch.sequences)
        crossed = self.batch.crossed
        rows = max(self.batch.ids.shape[1] - self.start, 0 if crossed is None else crossed.ids.shape[1])
        if value.ndim <= axis or value.shape[0] != batch or value.shape[axis] > rows:
            expected = "[batch, head, query, key]" if axis == 2 else "[batch, position, ...]"
            raise SinkscopeError(
                f"{need!r} of layer {self.layer} of {self.adapter.name} is {list(value.shape)}, not {expected} for {batch} "
                f"text(s) of up to {self.batch.ids.shape[1]} tokens: metrics can't read it"
            )

    def _hand_out(self, group: frozenset[str]) -> None:
        self._busy = True
        try:
            with torch.autocast(self.batch.ids.device.type, enabled=False):
                for block in self._blocks(group):
                    self.on_block(block, group)
        finally:
            self._busy = False

    def _blocks(self, group: frozenset[str]) -> Iterator[Block]:
        """Cut a layer's rows where a metric looks at whole ones and nothing else; otherwise give them all at once."""
        source: Source | None = next((self.held[name] for name in group & ATTENTION), None)
        rest = {name: self.held[name] for name in group - ATTENTION}
        n, crossed = self.batch.ids.shape[1] - self.start, self.batch.crossed
        if source is not None:
            n = source.n
        elif crossed is None:
            n = min(value.shape[query_axis(name)] for name, value in rest.items())
        device = next(iter(rest.values())).device if source is None else source.device
        lengths = self.batch.lengths.to(device)
        ends = self.batch.ends_within(self.adapter.windows.get(self.layer))
        for start, stop in source.cuts(self.formed) if source is not None and group == {"pattern"} else [(0, n)]:
            rows: Rows = NoRows() if source is None else source.rows(start, stop)
            yield Block(
                layer=self.layer,
                start=self.start + start,
                rows=rows if source is None or "pattern" in group else MassAlone(rows),
                n_queries=stop - start,
                lengths=lengths,
                keys=torch.zeros_like(lengths),
                causal=self.adapter.causal,
                window=self.adapter.windows.get(self.layer),
                tokens=self.batch.ids.to(device),
                activations=rest,
                key_lengths=None if crossed is None else crossed.lengths.to(device),
                ends=None if ends is None else ends.to(device),
            )


def query_axis(need: str) -> int:
    """Tell which axis of an activation is the position: scores and patterns are `[batch, head, query, key]`."""
    return 2 if need.endswith(("hook_attn_scores", "hook_pattern")) else 1


@dataclass(frozen=True, eq=False)
class MassAlone:
    """Rows for metrics that did not ask for whole ones, which then need not exist."""

    of: Rows

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give the attention to one key per sequence."""
        return self.of.mass(keys)

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give the sums."""
        return self.of.row_sum()

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Refuse."""
        raise SinkscopeError("the metric declares needs='mass': declare needs='pattern' to look at whole rows")


class NoRows:
    """Stands where a metric did not ask for attention."""

    def pattern(self, need: str = "pattern") -> Float[Tensor, "batch head query key"]:
        """Refuse."""
        raise SinkscopeError(f"the block has no attention: declare it, @metric(needs=({need!r}, ...))")

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Refuse."""
        return self.pattern("mass")

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Refuse."""
        return self.pattern("mass")
