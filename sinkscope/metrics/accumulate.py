"""The accumulators that stream a metric: means over rows within a sequence, moments across sequences. Both merge.

Rows are averaged within a sequence (:class:`RowMean`), or kept (:class:`RowSeries`); a threshold is applied per sequence;
means and standard errors are taken across sequences (:class:`Moments`), since tokens of one sequence are not independent.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.block import Block
from sinkscope.errors import MetricError, SinkscopeError
from sinkscope.metrics.base import Array, Metric, RowChoice


@dataclass(frozen=True)
class Entering:
    """Which rows of a block enter a mean: real ones that a metric chooses, and that count; found once for metrics that agree.

    Attributes:
        rows: which, `[batch, query]`.
        every: whether all do.
        many: how many of each sequence, `[batch]`.
    """

    rows: Bool[Tensor, "batch query"]
    every: bool
    many: Array

    @classmethod
    def of(cls, block: Block, over: RowChoice, counted: Bool[Tensor, "batch query"] | None) -> Entering:
        """Give them; they are kept with the block, beside what they were asked with, so that no other has its `id`."""
        kept = vars(block).setdefault("_entering", {})
        at = (id(over), id(counted))
        if at not in kept:
            rows = block.valid & over(block)
            rows = rows if counted is None else rows & counted.to(rows.device)
            kept[at] = cls(rows, bool(rows.all()), rows.sum(-1).double().cpu().numpy()), over, counted
        found: Entering = kept[at][0]
        return found


@dataclass
class RowMean:
    """Mean over the rows of each sequence, streamed over blocks; sums are float64 on the CPU.

    `sums` is `[layer, batch, head]` or `[layer, batch, head, key]`; `rows` counts the rows that entered, `[layer, batch]`;
    `heads` those that each layer has, `[layer]`, which may be fewer than another's.
    All layers share an array: a small piece for each, between large activations that go, would keep the heap from shrinking.
    """

    metric: Metric
    layers: int = 1
    sums: Array | None = None
    rows: Array | None = None
    heads: NDArray[np.int_] = field(init=False)

    def __post_init__(self) -> None:
        """Begin without heads."""
        self.heads = np.zeros(self.layers, dtype=int)

    def update(self, block: Block, place: int = 0, counted: Bool[Tensor, "batch query"] | None = None) -> None:
        """Add a block, of the layer at a place among those that are kept.

        Args:
            block: some rows.
            place: where its layer's numbers go.
            counted: which rows may enter at all; None for those that the metric chooses.

        Raises:
            SinkscopeError: the metric raised, or returned the wrong shape; names it and the layer.
        """
        if self.metric.reads == "received":
            sums = block.received(Entering.of(block, self.metric.over, counted).rows)
        else:
            kept, _ = self.chosen(block, counted)
            sums = kept.sum(2, dtype=torch.promote_types(kept.dtype, torch.float32))
        self.add(sums.double().cpu().numpy(), Entering.of(block, self.metric.over, counted).many, place)

    def chosen(self, block: Block, counted: Tensor | None, absent: float = 0.0) -> tuple[Tensor, Tensor]:
        """Apply the metric; give its values, with something else in the rows that do not enter, and which do."""
        version = block.rows_version()
        try:
            values = self.metric.fn(block)
        except Exception as error:
            trace = error.__traceback__ and error.__traceback__.tb_next  # without this frame
            said = f"metric {self.metric.name!r} raised {type(error).__name__} in layer {block.layer}: {error}"
            raise MetricError(said + _line(self.metric, trace)) from error.with_traceback(trace or error.__traceback__)
        batch, n_keys = len(block.lengths), block.n_keys
        shape = tuple(values.shape) if isinstance(values, Tensor) else ()
        if (shape[:1], shape[2:]) not in (((batch,), (block.n_queries,)), ((batch,), (block.n_queries, n_keys))):
            got = f"a tensor {shape}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise MetricError(
                f"metric {self.metric.name!r} returned {got} in layer {block.layer}; expected [batch, head, query] = "
                f"[{batch}, any, {block.n_queries}], or [batch, head, query, key] = [..., {n_keys}] for one number per key"
            )
        if block.rows_version() != version:
            raise MetricError(f"metric {self.metric.name!r} changes the block's pattern in place: work on a copy")
        entering = Entering.of(block, self.metric.over, counted)
        kept = values if values.is_floating_point() else values.float()
        if not entering.every:
            kept = torch.where(entering.rows.reshape(batch, 1, -1, *[1] * (len(shape) - 3)), kept, absent)
        return kept, entering.rows

    def add(self, sums: Array, rows: Array, place: int | slice, heads: NDArray[np.int_] | None = None) -> None:
        """Add sums over rows, and how many there were, of one layer or of all, whose `heads` are then given."""
        shape = sums.shape if isinstance(place, slice) else (self.layers, *sums.shape)
        self.sums, self.rows = grown(self.sums, shape), grown(self.rows, shape[:2])
        held = self.sums[place]
        held = held if held.shape == sums.shape else held[tuple(map(slice, sums.shape))]
        held += sums
        self.rows[place] += rows
        self.heads[place] = np.maximum(self.heads[place], shape[2] if heads is None else heads)

    def merge(self, other: RowMean) -> RowMean:
        """Combine with the same metric's sums over other rows of the same sequences."""
        merged = RowMean(self.metric, self.layers)
        for part in (self, other):
            if part.sums is not None and part.rows is not None:
                merged.add(part.sums, part.rows, slice(None), part.heads)
        return merged

    def mean(self) -> Array:
        """Give the mean per (layer, sequence, head) or (layer, sequence, head, key).

        NaN where no row entered, and for heads that other layers have.
        """
        if self.sums is None or self.rows is None:
            raise SinkscopeError(f"metric {self.metric.name!r} saw no block")
        rows = self.rows.reshape(*self.rows.shape, *[1] * (self.sums.ndim - 2))
        there = np.arange(self.sums.shape[2]) < self.heads[:, None, None]
        there = there.reshape(*there.shape, *[1] * (self.sums.ndim - 3))
        return np.divide(self.sums, rows, out=np.full_like(self.sums, np.nan), where=there & (rows > 0))


def grown(held: Array | None, shape: Sequence[int], fill: float = 0.0) -> Array:
    """Give an array of at least this shape: a layer may have more heads than the first, a block more keys."""
    if held is None:
        return np.full(shape, fill)
    short = [(0, max(0, n - m)) for n, m in zip(shape, held.shape, strict=True)]
    return np.pad(held, short, constant_values=fill) if any(n for _, n in short) else held


def _line(metric: Metric, trace: TracebackType | None) -> str:
    """Give the line of a metric's file in which it failed, as a line of its own."""
    file = getattr(getattr(metric.fn, "__code__", None), "co_filename", None)
    frames = [frame for frame in traceback.extract_tb(trace) if frame.filename == file]
    return f'\n  File "{file}", line {frames[-1].lineno}, in {frames[-1].name}: {frames[-1].line}' if frames else ""


@dataclass
class RowSeries(RowMean):
    """The rows of each sequence themselves, of a metric that is reported per query: `sums` is `[layer, batch, head, query]`.

    NaN where no row entered.
    """

    def update(self, block: Block, place: int = 0, counted: Bool[Tensor, "batch query"] | None = None) -> None:
        """Put a block's rows in their places; see :meth:`RowMean.update`."""
        kept, _ = self.chosen(block, counted, torch.nan)
        if kept.ndim != 3:
            raise SinkscopeError(f"metric {self.metric.name!r} is reported per query, and gives one number per key")
        stop = block.start + block.n_queries
        rows = kept.double().cpu().numpy()
        self.sums = grown(self.sums, (self.layers, *rows.shape[:2], stop), np.nan)
        self.heads[place] = rows.shape[1]
        here = self.sums[place][:, : rows.shape[1], block.start : stop]
        here[...] = np.where(np.isnan(rows), here, rows)

    def merge(self, other: RowMean) -> RowSeries:
        """Combine with the same metric's rows from elsewhere in the same sequences."""
        a, b = (part.sums for part in (self, other))
        if a is not None and b is not None:
            shape = np.maximum(a.shape, b.shape).tolist()
            a, b = grown(a, shape, np.nan), grown(b, shape, np.nan)
            a = np.where(np.isnan(a), b, a)
        merged = RowSeries(self.metric, self.layers, b if a is None else a)
        merged.heads = np.maximum(self.heads, other.heads)
        return merged

    def mean(self) -> Array:
        """Give the rows, `[layer, sequence, head, query]`."""
        if self.sums is None:
            raise SinkscopeError(f"metric {self.metric.name!r} saw no block")
        return self.sums


def accumulator(metric: Metric, layers: int = 1) -> RowMean:
    """Make what streams a metric over this many layers."""
    return (RowSeries if metric.per_query else RowMean)(metric, layers)


@dataclass
class Moments:
    """Count, mean and sum of squared deviations across sequences, per element; NaN counts as absent.

    Merged by Chan, Golub & LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample variances",
    so that texts, batches and processes combine in any order.

    >>> a, b = Moments.of(np.array(1.0)), Moments.of(np.array(3.0))
    >>> float(a.merge(b).mean), float(a.merge(b).std_error)
    (2.0, 1.0)
    """

    count: Array
    mean: Array
    m2: Array

    @classmethod
    def of(cls, value: Array) -> Moments:
        """One sequence's value."""
        absent = np.isnan(value)
        return cls(np.asarray(~absent, dtype=float), np.where(absent, 0.0, value), np.zeros(np.shape(value)))

    def merge(self, other: Moments) -> Moments:
        """Combine; where one has more keys than the other, the missing ones are absent."""
        a, b = self, other
        if a.mean.shape != b.mean.shape:
            shape = np.maximum(a.mean.shape, b.mean.shape)
            a, b = a._grow(shape), b._grow(shape)
        count = a.count + b.count
        safe = np.where(count > 0, count, 1.0)
        delta = b.mean - a.mean
        mean = a.mean + delta * b.count / safe
        m2 = a.m2 + b.m2 + delta**2 * a.count * b.count / safe
        return Moments(np.asarray(count), np.asarray(mean), np.asarray(m2))

    def _grow(self, shape: NDArray[np.int_]) -> Moments:
        pad = [(0, int(n - m)) for n, m in zip(shape, self.mean.shape, strict=True)]
        return Moments(*(np.pad(x, pad) for x in (self.count, self.mean, self.m2)))

    @property
    def present(self) -> Array:
        """The mean; NaN where nothing was counted."""
        return np.where(self.count > 0, self.mean, np.nan)

    @property
    def std_error(self) -> Array:
        """Standard error of the mean, ddof 1; NaN with fewer than two sequences."""
        n = np.where(self.count > 1, self.count, np.nan)
        return np.asarray(np.sqrt(self.m2 / (n - 1) / n))
