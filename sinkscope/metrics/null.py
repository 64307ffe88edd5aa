"""The causal null: the same metric, on attention that is uniform over the keys that a query can see."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.block import Block, Chunk, Compressed
from sinkscope.metrics.accumulate import accumulator
from sinkscope.metrics.base import Array, Metric

#: Rows of the null pattern made at a time.
ROWS = 256


@dataclass(frozen=True)
class UniformRows:
    """Rows that spread attention evenly, in float64; made when asked for, so that mass metrics never build a row."""

    start: int
    stop: int
    length: int
    causal: bool
    window: int | None
    ends: Int[Tensor, " position"] | None = None

    def _seen(self, keys: Tensor) -> Tensor:
        """Tell which rows, the last axis, see keys."""
        first, last = self._reach()
        return (first <= keys) & (keys < last)

    def _reach(self) -> tuple[Tensor, Tensor]:
        """Give the first key that each row sees, and the one after the last."""
        queries = torch.arange(self.start, self.stop)
        first, last = torch.zeros_like(queries), queries + 1 if self.causal else torch.full_like(queries, self.length)
        last = last if self.ends is None else self.ends[self.start : self.stop]
        if isinstance(self.window, Chunk):
            first = queries // self.window * self.window
        elif self.window is not None:
            first = (queries - self.window + 1).clamp(min=0)
            last = last if self.causal else torch.minimum(last, queries + self.window)
        return first, last

    def _share(self) -> Tensor:
        first, last = self._reach()
        return 1.0 / (last - first + self._entries).double()

    @property
    def _entries(self) -> Tensor:
        """How many keys each row sees that are no tokens."""
        queries = torch.arange(self.start, self.stop)
        return self.window.entries(queries) if isinstance(self.window, Compressed) else torch.zeros_like(queries)

    @property
    def _n_keys(self) -> int:
        return self.stop if self.causal and self.ends is None else self.length

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Give the whole rows."""
        return (self._seen(torch.arange(self._n_keys)[:, None]) * self._share()).mT[None, None]

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give the share of one key."""
        return (self._seen(keys[:, None]) * self._share())[:, None]

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give ones, less what goes to keys that are no tokens."""
        return (1 - self._entries * self._share())[None, None]

    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Give the logarithm of how many keys a row sees."""
        return -self._share().log()[None, None] * self.row_sum()

    def received(self, chosen: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
        """Give what keys receive, from where each row's begin and end; 0, and no rounding, where no chosen row sees a key."""
        kept = chosen[0]
        first, last = (edge[kept] for edge in self._reach())
        keys = torch.arange(self._n_keys)
        seen = (torch.bincount(first, minlength=len(keys) + 1) - torch.bincount(last, minlength=len(keys) + 1)).cumsum(0)
        share = self._share()[kept]
        sums = torch.zeros(len(keys) + 1, dtype=torch.float64).index_add_(0, first, share).index_add_(0, last, -share)
        return sums.cumsum(0)[keys].where(seen[keys] > 0, 0)[None, None]


def uniform_mean(
    metric: Metric,
    length: int,
    key: int,
    *,
    causal: bool,
    window: int | None,
    tokens: Int[Tensor, " position"] | None = None,
    counted: Bool[Tensor, " position"] | None = None,
    n_keys: int | None = None,
    ends: Int[Tensor, " position"] | None = None,
) -> Array:
    """Apply a metric to uniform attention over one text.

    Args:
        metric: what to apply; its `null` says whether the layer's window hides keys.
        length: number of tokens T.
        key: sink position.
        causal: False for an encoder.
        window: the layer's sliding window, or None.
        tokens: the text's ids, for metrics that look at them.
        counted: which queries may enter the mean; None for those that the metric chooses.
        n_keys: number of keys S in cross-attention, all of which every query sees; None where keys are the text's own.
        ends: the key after the last that each query sees, where a decoder's queries see later keys; None elsewhere.

    Returns:
        A number, or one per key `[key]` or query `[query]`; NaN where the metric has no null.

    >>> from sinkscope.metrics.mass import sink_mass
    >>> round(float(uniform_mean(sink_mass, 3, 0, causal=True, window=None)), 6)  # H_3 / 3
    0.611111
    """
    if metric.null is None:
        return np.array(math.nan)
    window = window if metric.null == "visible" else None
    mean = accumulator(metric)
    step = ROWS if metric.reads == "pattern" else length
    for start in range(0, length, step):
        stop = min(start + step, length)
        rows = UniformRows(start, stop, n_keys or length, causal, window, ends)
        mean.update(
            Block(
                layer=0,
                start=start,
                rows=rows,
                n_queries=stop - start,
                lengths=torch.tensor([length]),
                keys=torch.tensor([key]),
                causal=causal,
                window=window,
                tokens=None if tokens is None else tokens[None],
                key_lengths=None if n_keys is None else torch.tensor([n_keys]),
                ends=None if ends is None else ends[None],
            ),
            counted=None if counted is None else counted[None, start:stop],
        )
    return np.asarray(mean.mean()[0, 0, 0])
