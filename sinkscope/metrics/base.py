"""Metric, the decorator that makes one, and the accumulators that stream it.

A metric is a function of a block that returns one number per (sequence, head, query), or also per key. The library
owns the rest: rows are averaged within a sequence (:class:`RowMean`), a threshold is applied per sequence, means and
standard errors are taken across sequences (:class:`Moments`), since tokens of one sequence are not independent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.block import Block
from sinkscope.errors import SinkscopeError

Array = NDArray[np.float64]
RowChoice = Callable[[Block], Tensor]


def every_row(block: Block) -> Tensor:
    """Average over all queries, the first included."""
    return torch.ones_like(block.valid)


@dataclass(frozen=True)
class Metric:
    """A statistic of attention, as a function of a block.

    Attributes:
        name: what it is called in reports.
        fn: block -> `[batch, head, query]`, or `[batch, head, query, key]` for one number per key.
        needs: `"mass"` (attention to the sink key), `"pattern"` (whole rows), or hook points of a block.
        over: which rows enter the mean, `[batch, query]` of bool.
        null: what stands beside it: the same function on uniform attention over all keys before the query
            (`"uniform"`), over the keys in the layer's window (`"visible"`), or nothing (None).
        thresholds: report, per sequence, whether the mean exceeds each of these (named `name@0.3`), not the mean.
        at_key: it looks at the sink key, so that its rows carry the key's position.
        unit: unit of the value, for axes.
    """

    name: str
    fn: Callable[[Block], Tensor] = field(repr=False)
    needs: tuple[str, ...] = ("pattern",)
    over: RowChoice = field(default=every_row, repr=False)
    null: Literal["uniform", "visible"] | None = "uniform"
    thresholds: tuple[float, ...] = ()
    at_key: bool = False
    unit: str = ""

    @property
    def doc(self) -> str:
        """First line of the docstring: what number it is."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that it reports."""
        return tuple(f"{self.name}@{eps:g}" for eps in self.thresholds) or (self.name,)

    @property
    def group(self) -> frozenset[str]:
        """What a block must carry before the metric can run; where there are whole rows, mass is read off them."""
        return frozenset(need for need in self.needs if need != "mass" or "pattern" not in self.needs)

    def at(self, *thresholds: float) -> Metric:
        """Ask for other thresholds: `sink_rate.at(0.5)`."""
        return replace(self, thresholds=thresholds)

    def __call__(self, block: Block) -> Tensor:
        """Apply the function to a block."""
        return self.fn(block)

    def finish(self, mean: Array) -> dict[str, Array]:
        """Turn a sequence's mean into what is reported: itself, or one indicator per threshold."""
        if not self.thresholds:
            return {self.name: mean}
        return {f"{self.name}@{eps:g}": np.where(np.isnan(mean), np.nan, mean > eps) for eps in self.thresholds}


@dataclass(frozen=True)
class Derived:
    """A number made, per sequence, from finished per-head values of other metrics.

    Attributes:
        name: what it is called in reports.
        fn: called with one `[layer, head]` (or `[layer, head, key]`) array per name in `of`, then the number of tokens
            and whether attention is causal; returns an array with the axes of `axes`.
        of: the metrics that it is made from.
        axes: axes of the result, of `("layer", "key")`; `()` for one number per sequence.
        total: result -> the number for the summary, or None where there is none.
    """

    name: str
    fn: Callable[..., Any] = field(repr=False)
    of: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    total: Callable[[Array], float] | None = field(default=None, repr=False)
    eps: float | None = None
    at_key: bool = False
    unit: str = ""

    @property
    def doc(self) -> str:
        """First line of the docstring: what number it is."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]

    def at(self, eps: float) -> Derived:
        """Ask for another threshold; the name then says so: `sink_positions@0.5`."""
        return replace(self, name=f"{self.name.partition('@')[0]}@{eps:g}", eps=eps)

    def __call__(self, values: Mapping[str, Array], tokens: int, causal: bool) -> Array:
        """Apply the function to one sequence's finished values."""
        given = [values[name] for name in self.of]
        extra = {} if self.eps is None else {"eps": self.eps}
        return np.asarray(self.fn(*given, tokens, causal, **extra), dtype=float)


@dataclass(frozen=True)
class AcrossTexts:
    """Numbers about how one summary value varies from text to text.

    Attributes:
        name: prefix of the summary rows, `name@part`.
        fn: the per-text values -> part name to number.
        of: the metric whose model-level value is looked at.
    """

    name: str
    fn: Callable[[Array], Mapping[str, float]] = field(repr=False)
    of: str = "sink_mass"

    @property
    def doc(self) -> str:
        """First line of the docstring: what number it is."""
        return (inspect.getdoc(self.fn) or "").partition("\n")[0]


AnyMetric = Metric | Derived | AcrossTexts


@overload
def metric(fn: Callable[[Block], Tensor], /) -> Metric: ...
@overload
def metric(
    *,
    needs: str | Iterable[str] = ...,
    name: str | None = ...,
    over: RowChoice = ...,
    null: Literal["uniform", "visible"] | None = ...,
    thresholds: tuple[float, ...] = ...,
    unit: str = ...,
) -> Callable[[Callable[[Block], Tensor]], Metric]: ...
def metric(
    fn: Callable[[Block], Tensor] | None = None,
    /,
    *,
    needs: str | Iterable[str] = "pattern",
    name: str | None = None,
    over: RowChoice = every_row,
    null: Literal["uniform", "visible"] | None = "uniform",
    thresholds: tuple[float, ...] = (),
    unit: str = "",
) -> Metric | Callable[[Callable[[Block], Tensor]], Metric]:
    """Make a metric of a function of a block.

    Args:
        fn: the function; `@metric` alone means that it needs the pattern.
        needs: `"mass"`, `"pattern"`, `"value"`, `"key"`, `"query"`, `"output"`, `"residual"`, or any hook point of a
            block by its TransformerLens name, such as `"mlp.hook_post"`; one or several.
        name: defaults to the function's name.
        over: which rows are averaged; all by default.
        null: see :class:`Metric`; a metric that needs other activations has none.
        thresholds: see :class:`Metric`.
        unit: for axes.

    Raises:
        SinkscopeError: a function without a name.

    >>> @metric(needs="pattern")
    ... def distance(block):
    ...     "Mean distance, in tokens, from a query to what it attends to."
    ...     return (block.pattern * block.distance).sum(-1)
    >>> distance.name, distance.needs
    ('distance', ('pattern',))
    """

    def make(fn: Callable[[Block], Tensor]) -> Metric:
        label = name or getattr(fn, "__name__", type(fn).__name__)
        if label == "<lambda>" or not label:
            raise SinkscopeError("a lambda has no name: write ss.metric(needs=..., name='my_metric')(lambda block: ...)")
        wanted = (needs,) if isinstance(needs, str) else tuple(needs)
        attention_only = set(wanted) <= {"mass", "pattern"}
        return Metric(label, fn, wanted, over, null if attention_only else None, thresholds, "mass" in wanted, unit)

    return make(fn) if fn is not None else make


def derived(
    *,
    of: Iterable[str],
    axes: tuple[str, ...] = (),
    total: Callable[[Array], float] | None = None,
    eps: float | None = None,
    at_key: bool = False,
    unit: str = "",
) -> Callable[[Callable[..., Any]], Derived]:
    """Make a derived metric of a function of finished values; see :class:`Derived`."""

    def make(fn: Callable[..., Any]) -> Derived:
        summary = total if total is not None or axes else (lambda value: float(value))
        return Derived(fn.__name__, fn, tuple(of), axes, summary, eps, at_key, unit)

    return make


@dataclass
class RowMean:
    """Mean over the rows of each sequence, streamed over blocks; sums are float64 on the CPU.

    `sums` is `[batch, head]` or `[batch, head, key]`; `rows` counts the rows that entered, `[batch]`.
    """

    metric: Metric
    sums: Array | None = None
    rows: Array | None = None

    def update(self, block: Block) -> None:
        """Add a block.

        Raises:
            SinkscopeError: the metric raised, or returned the wrong shape; names it and the layer.
        """
        version = block.rows_version()
        try:
            values = self.metric.fn(block)
        except Exception as error:
            raise SinkscopeError(
                f"metric {self.metric.name!r} raised {type(error).__name__} in layer {block.layer}: {error}"
            ) from error
        batch, n_keys = len(block.lengths), block.n_keys
        shape = tuple(values.shape) if isinstance(values, Tensor) else ()
        if (shape[:1], shape[2:]) not in (((batch,), (block.n_queries,)), ((batch,), (block.n_queries, n_keys))):
            got = f"a tensor {shape}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise SinkscopeError(
                f"metric {self.metric.name!r} returned {got} in layer {block.layer}; expected [batch, head, query] = "
                f"[{batch}, any, {block.n_queries}], or [batch, head, query, key] = [..., {n_keys}] for one number per key"
            )
        if block.rows_version() != version:
            raise SinkscopeError(f"metric {self.metric.name!r} changes the block's pattern in place: work on a copy")
        chosen = block.valid & self.metric.over(block)
        kept = values if values.is_floating_point() else values.float()
        if not bool(chosen.all()):
            kept = torch.where(chosen.reshape(batch, 1, -1, *[1] * (len(shape) - 3)), kept, 0)
        sums = kept.sum(2, dtype=torch.promote_types(kept.dtype, torch.float32)).double().cpu().numpy()
        self._add(sums, chosen.sum(-1).double().cpu().numpy(), n_keys)

    def _add(self, sums: Array, rows: Array, n_keys: int) -> None:
        if self.sums is None or self.rows is None:
            self.sums, self.rows = sums, rows
            return
        if sums.ndim == 3 and sums.shape[-1] != self.sums.shape[-1]:
            wide = max(sums.shape[-1], self.sums.shape[-1])
            sums, self.sums = (np.pad(s, ((0, 0), (0, 0), (0, wide - s.shape[-1]))) for s in (sums, self.sums))
        self.sums = self.sums + sums
        self.rows = self.rows + rows

    def merge(self, other: RowMean) -> RowMean:
        """Combine with the same metric's sums over other rows of the same sequences."""
        merged = RowMean(self.metric, self.sums, self.rows)
        if other.sums is not None and other.rows is not None:
            merged._add(other.sums, other.rows, other.sums.shape[-1])
        return merged

    def mean(self) -> Array:
        """Give the mean per (sequence, head) or (sequence, head, key); NaN where no row entered."""
        if self.sums is None or self.rows is None:
            raise SinkscopeError(f"metric {self.metric.name!r} saw no block")
        rows = self.rows.reshape(-1, *[1] * (self.sums.ndim - 1))
        return np.divide(self.sums, rows, out=np.full_like(self.sums, np.nan), where=rows > 0)


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
    def std_error(self) -> Array:
        """Standard error of the mean, ddof 1; NaN with fewer than two sequences."""
        n = np.where(self.count > 1, self.count, np.nan)
        return np.asarray(np.sqrt(self.m2 / (n - 1) / n))
