"""How much at a time: whole rows are made, edited and looked at in blocks, so that nothing T x T is ever there."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

#: Rows that a metric sees at a time, at most: bounds its temporaries, whatever the length.
ROWS = 256
#: Bytes of the rows that are computed at a time, where that is fewer, and the fewest rows.
BYTES, FEWEST = 16 << 20, 16
#: The same on a GPU, where every block costs a dozen launches: a quarter of the time (H200, 4,096 tokens).
GPU_ROWS, GPU_BYTES = 512, 256 << 20
#: Bytes of rows that are stored, or of which nothing is wanted but sums: as many as stay in a processor's cache.
TILE = 4 << 20
#: Rows (for each thread) and keys of what is added up at a time: two of these stay in a core's own cache.
SQUARE = 256, 512


def cuts(
    n: int, area: float, keys: int | None = None, window: int | None = None, *, fewest: int = FEWEST, most: int = ROWS
) -> Iterator[tuple[int, int]]:
    """Cut n rows into blocks of about so many scores.

    Args:
        n: rows.
        area: rows times keys of a block.
        keys: of every row; None where attention is causal: those before a block and its own.
        window: how many of those before are in reach; None for all.
        fewest: rows of a block, whatever the area.
        most: the same.

    >>> list(cuts(100, 1000.0, 50, most=64))
    [(0, 20), (20, 40), (40, 60), (60, 80), (80, 100)]
    >>> list(cuts(100, 1000.0))
    [(0, 31), (31, 50), (50, 66), (66, 82), (82, 98), (98, 100)]
    """
    start = 0
    while start < n:
        before = start if window is None else min(start, window)
        rows = area / keys if keys else (math.sqrt(before**2 + 4 * area) - before) / 2
        stop = min(start + min(max(fewest, int(rows)), most), n)
        yield start, stop
        start = stop


class Scratch:
    """Memory that is used again and again: fresh pages for every block's scores would double the time of making them."""

    def __init__(self) -> None:
        self._memory = self._given = torch.empty(0)

    def __call__(self, like: Tensor, *shape: int) -> Tensor:
        """Give an uninitialised tensor of this shape, which the next call takes back."""
        given = self._given
        if given.shape != shape or given.dtype != like.dtype or given.device != like.device:
            size = math.prod(shape)
            if self._memory.numel() < size or (self._memory.dtype, self._memory.device) != (like.dtype, like.device):
                self._memory = torch.empty(size, dtype=like.dtype, device=like.device)
            self._given = given = self._memory[:size].view(shape)
        return given
