"""Sliding windows: which keys a cache still holds when a query comes. One banded pass equals the evicting cache, exactly."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar, SupportsIndex

import torch
from torch import Tensor

from sinkscope.edit import OTHER_INPUT, Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class Window(Intervention):
    """Evict: each query sees itself and the `size` - 1 latest keys.

    >>> str(Window(256))
    'window(size=256)'
    """

    is_window: ClassVar[bool] = True
    touches: ClassVar[frozenset[str]] = frozenset({"scores"})
    size: Whole = 256

    def __post_init__(self) -> None:
        """Refuse sizes that make no sense."""
        super().__post_init__()
        for name in ("size", "sinks", "at"):
            if hasattr(self, name):
                object.__setattr__(self, name, whole_number(getattr(self, name), f"{self}: {name}", "whole numbers of keys"))
        sinks, at = getattr(self, "sinks", 0), getattr(self, "at", 0)
        if sinks < 0 or at < 0 or self.size <= sinks:
            raise SinkscopeError(f"{self}: the size must be at least 1 more than the sinks, and nothing below 0")

    def reach(self, layer: int, start: int, stop: int) -> Tensor:
        """Give the recent keys, and the sinks."""
        kept, oldest = self._kept, max(0, start - self.size + len(self._kept) + 1)
        return torch.cat([torch.arange(min(kept.start, oldest), min(kept.stop, oldest)), torch.arange(oldest, stop)])

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Hide what has been evicted."""
        kept = self._kept
        evicted = queries - keys >= int(self.size) - len(kept)
        return evicted & ~((keys >= kept.start) & (keys < kept.stop))

    def evicts(self) -> int | None:
        """Give the size, where every layer has it and no key is kept."""
        return self.size if self.layers is None and not self._kept else None

    @property
    def _kept(self) -> range:
        return range(0)


@dataclass(frozen=True)
class SinkWindow(Window):
    """Evict, but keep the first `sinks` keys: `size` keys in all, at their own positions.

    `at` keeps others than the first, those from this position on: the placebo.
    """

    sinks: Whole = 4
    at: Whole = field(default=0, kw_only=True)

    def check(self, length: int) -> None:
        """Refuse kept keys outside the text."""
        if self.at + self.sinks > length:
            raise SinkscopeError(f"{self} keeps keys outside the text, whose positions are 0 to {length - 1}")

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Keep as many later keys instead of the first."""
        return replace(self, at=random.Random(whole_number(seed, "seed")).randrange(16, 64))

    @property
    def _kept(self) -> range:
        return range(self.at, self.at + self.sinks)


@dataclass(frozen=True)
class StreamingWindow(SinkWindow):
    """As StreamingLLM: positions are those inside the cache, so that distances never exceed `size`.

    The recent keys keep their distance; the sinks are scored with the query turned to its position in the cache. For models
    with rotary positions alone: absolute ones can't be turned. Source: Xiao et al. 2023, arXiv 2309.17453, section 3.2.
    """

    def __post_init__(self) -> None:
        """Refuse other keys than the first."""
        super().__post_init__()
        if self.at:
            raise SinkscopeError(f"{self}: a streaming window keeps the first keys; for a placebo take SinkWindow's")

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Keep as many later keys, at their own positions."""
        return SinkWindow(self.size, sinks=self.sinks, layers=self.layers).placebo(seed)

    def cache(self, layer: int) -> tuple[int, int]:
        """Give the size, and how many keys at its start stay."""
        return self.size, self.sinks


@dataclass(frozen=True)
class RecomputeWindow(Intervention):
    """Run the model anew on the last `size` tokens for every token: the slow baseline, tokens x size x size.

    The first token of each window is that window's sink. Source: Xiao et al. 2023, "sliding window with re-computation".
    """

    is_window: ClassVar[bool] = True
    touches: ClassVar[frozenset[str]] = frozenset({"input"})
    size: Whole = 256

    def __post_init__(self) -> None:
        """Refuse layers, and sizes that make no sense."""
        super().__post_init__()
        if self.layers is not None:
            raise SinkscopeError(f"{self}: the whole model is run anew, not some layers")
        object.__setattr__(self, "size", whole_number(self.size, f"{self}: size", "whole numbers, at least 1"))
        if self.size < 1:
            raise SinkscopeError(f"{self}: the size must be a whole number, at least 1")

    def why_not_live(self) -> str:
        """Refuse: the model is run anew for every token."""
        return OTHER_INPUT

    def rerun(self) -> int:
        """Give the size."""
        return int(self.size)
