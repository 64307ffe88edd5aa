"""Where an engine's attention rows come from: a layer's stored pattern, or what they are recomputed from (`rows.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.block import PatternRows, Rows
from sinkscope.capture.cuts import GPU_BYTES, GPU_ROWS, ROWS, TILE, cuts


@runtime_checkable
class Source(Protocol):
    """All attention rows of one layer in one forward pass."""

    @property
    def n(self) -> int:
        """Give the number of rows."""
        ...

    @property
    def device(self) -> torch.device:
        """Tell where the layer is."""
        ...

    def rows(self, start: int, stop: int) -> Rows:
        """Give some of them, counted from the first of this pass."""
        ...

    def cuts(self, formed: bool = True) -> Iterator[tuple[int, int]]:
        """Cut the rows for metrics that look at whole ones, or (not `formed`) at no more than their sums."""
        ...

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look whether the real rows are free of NaN and infinity."""
        ...


@dataclass(frozen=True, eq=False)
class StoredPattern:
    """A pattern as TransformerLens hands it over; `start` is the position of its first row."""

    values: Float[Tensor, "batch head query key"]
    start: int
    causal: bool

    @property
    def n(self) -> int:
        """Give the number of rows."""
        return self.values.shape[2]

    @property
    def device(self) -> torch.device:
        """Tell where the layer is."""
        return self.values.device

    def rows(self, start: int, stop: int) -> PatternRows:
        """Give some rows, and the keys up to the last of them."""
        return PatternRows(self.values[:, :, start:stop, : self.start + stop if self.causal else None])

    def cuts(self, formed: bool = True) -> Iterator[tuple[int, int]]:
        """Cut into blocks that stay in a processor's cache, as far as that goes."""
        b, h, n, keys = self.values.shape
        size, most = (GPU_BYTES, GPU_ROWS) if self.values.is_cuda else (TILE, ROWS)
        return cuts(n, size / (4 * b * h), keys, most=most)

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look at the first column: a row with a bad score is bad everywhere."""
        return bool(torch.isfinite(self.values[..., 0].transpose(1, 2).where(real[..., None], 0)).all())
