"""Positions inside a cache: queries are turned to them, and keys and values are carried from piece to piece of a text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.call import Calls
from sinkscope.capture.masks import Masks
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.swap import swapped
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter


@dataclass(frozen=True, eq=False)
class Rotation:
    """How to turn a query to its position inside a cache: rotary frequencies, and how far positions lie below the text's."""

    frequencies: Tensor
    shift: int = 0


def turn(x: Float[Tensor, "batch head position d"], by: Int[Tensor, " position"], frequencies: Tensor) -> Tensor:
    """Turn rotary queries or keys by some positions: the pairs are (j, j + d/2) of the first 2 x `frequencies` numbers."""
    angles = by[:, None].double() * frequencies.to(by.device).double()
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype) for f in (torch.cos, torch.sin))
    d = cos.shape[-1]
    rotary, rest = x[..., :d], x[..., d:]
    first, second = rotary.chunk(2, -1)
    return torch.cat([rotary * cos + torch.cat([-second, first], -1) * sin, rest], -1)


@dataclass
class Stream:
    """What the caches hold between pieces; `base` is the model's position of the piece's first token."""

    size: int
    base: int = 0
    held: dict[int, tuple[Tensor, Tensor, Tensor, int]] = field(default_factory=dict)

    def join(
        self, layer: int, at: Tensor, key: Tensor, value: Tensor, rotation: Rotation, sinks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the keys and values that are held before those of a piece, the recent keys turned to their new positions."""
        if layer not in self.held:
            return at, key, value
        old_at, old_key, old_value, shift = self.held[layer]
        if shift != rotation.shift:
            by = torch.where(old_at < sinks, 0, shift - rotation.shift)
            old_key = turn(old_key, by.to(key.device), rotation.frequencies)
        return torch.cat([old_at, at]), torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)

    def keep(self, layer: int, at: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> None:
        """Hold what the next query may see."""
        self.held[layer] = (at, key, value, 0 if rotation is None else rotation.shift)


def frequencies(adapter: Adapter, what: tuple[str, str]) -> Tensor:
    """Find a model's rotary frequencies, and prove by a shift of all positions that turning queries is what they do.

    `what` says what they are for, and what to take instead.

    Raises:
        SinkscopeError: positions are not rotary (or not of one plain kind); says what works.
    """
    found = adapter.rotations
    refusal = SinkscopeError(
        f"{what[0]} needs rotary positions of one plain kind, which {adapter.name} has not: queries and keys can't be turned "
        f"to other positions. Take {what[1]}"
    )
    why = adapter.why_no_cache(0)
    if len(found) != 1 or why is not None:
        raise refusal
    ids = torch.arange(2, 8, device=adapter.device)[None]
    try:
        first, moved = _queries(adapter, ids, 0), _queries(adapter, ids, 5)
    except TypeError:  # it takes no positions
        raise refusal from None
    for before, after in zip(first, moved, strict=True):
        expected = turn(before, torch.full((ids.shape[1],), 5, device=ids.device), found[0])
        if not float((expected - after).abs().max()) < 1e-3 * max(1.0, float(after.abs().max())):
            raise refusal
    return found[0]


def _queries(adapter: Adapter, ids: Tensor, start: int) -> list[Tensor]:
    """Give every layer's queries for some ids whose first position is `start`."""
    seen: list[Tensor] = []

    def look(layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        seen.append(query.float())
        return attention_with_lse(query, key, value, **given)[0]

    with adapter.quiet(), swapped(adapter, Calls(adapter, look), Masks.of(adapter)):
        adapter.body(ids, torch.ones_like(ids, dtype=torch.bool), first=start)
    return seen
