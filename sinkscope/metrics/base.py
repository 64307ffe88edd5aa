"""Metric, the decorator that makes one, and the accumulators that stream it.

A metric is a function of a block that returns one number per (sequence, head, query), or also per key. The library
owns the rest; see :mod:`sinkscope.metrics.accumulate`.
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
        per_query: report one number per query, not their mean.
        reads: what it takes of whole rows: `"pattern"`; `"entropy"`, `block.entropy` alone; or `"received"`, which is for
            `head_profile`: `fn` gives the pattern as it is, whose sum over queries, `block.received`, is taken in its place.
            For these two no row need be formed.
    """

    name: str
    fn: Callable[[Block], Tensor] = field(repr=False)
    needs: tuple[str, ...] = ("pattern",)
    over: RowChoice = field(default=every_row, repr=False)
    null: Literal["uniform", "visible"] | None = "uniform"
    thresholds: tuple[float, ...] = ()
    at_key: bool = False
    unit: str = ""
    per_query: bool = False
    reads: Literal["pattern", "entropy", "received"] = "pattern"

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
            and whether attention is causal; returns an array with the axes of `axes`. Heads that other layers have, and this
            one has not, are NaN.
        of: the metrics that it is made from.
        axes: axes of the result, of `("layer", "key")`; `()` for one number per sequence.
        total: result -> the number for the summary, or None where there is none.
        every_query: it takes for granted that all queries were averaged, so that `where=` has no meaning for it.
    """

    name: str
    fn: Callable[..., Any] = field(repr=False)
    of: tuple[str, ...] = ()
    axes: tuple[str, ...] = ()
    total: Callable[[Array], float] | None = field(default=None, repr=False)
    eps: float | None = None
    at_key: bool = False
    unit: str = ""
    every_query: bool = False

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
    at_key: bool = ...,
    unit: str = ...,
    per_query: bool = ...,
    reads: Literal["pattern", "entropy"] = ...,
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
    at_key: bool = False,
    unit: str = "",
    per_query: bool = False,
    reads: Any = "pattern",
) -> Metric | Callable[[Callable[[Block], Tensor]], Metric]:
    """Make a metric of a function of a block.

    Args:
        fn: the function; `@metric` alone means that it needs the pattern.
        needs: `"mass"`, `"pattern"`, `"value"`, `"key"`, `"query"`, `"output"`, `"residual"`, `"rotated_query"`,
            `"rotated_key"` (as scores see them), `"gate"` (of a head's output; 1 without one), or any hook point of a block
            by its TransformerLens name, such as `"mlp.hook_post"`; one or several.
        name: defaults to the function's name.
        over: which rows are averaged; all by default.
        null: see :class:`Metric`; a metric that needs other activations has none.
        thresholds: see :class:`Metric`.
        at_key: it looks at `block.keys`, the sink key; what needs mass does.
        unit: for axes.
        per_query: report one number per query, in the column `query`, not their mean.
        reads: what it takes of whole rows: the pattern, or `block.entropy` alone. Where no metric reads the pattern itself,
            rows are not formed, and a long text takes half the time, a fraction of it on a GPU.

    Raises:
        SinkscopeError: a function without a name, thresholds per query, or it reads something else.

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
        if reads not in ("pattern", "entropy"):
            raise SinkscopeError(f"metric {label!r}: reads={reads!r} is none of 'pattern', 'entropy'")
        if per_query and thresholds:
            raise SinkscopeError(f"metric {label!r}: a threshold is applied to a mean over queries, not per query")
        chance = null if attention_only else None
        return Metric(label, fn, wanted, over, chance, thresholds, at_key or "mass" in wanted, unit, per_query, reads)

    return make(fn) if fn is not None else make


def mean_of(values: Array) -> float:
    """Mean over layers and heads of what is defined, each head alike; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def over_heads(values: Array) -> Array:
    """Mean over the heads, `[layer, head, ...]` -> `[layer, ...]`: over those that a layer has, NaN stands for the others."""
    there = ~np.isnan(values.reshape(*values.shape[:2], -1)).all(-1)
    if there.all():
        return np.asarray(values.mean(1))
    return np.stack([(of[has] if has.any() else of).mean(0) for of, has in zip(values, np.asarray(there), strict=True)])


def derived(
    *,
    of: Iterable[str],
    axes: tuple[str, ...] = (),
    total: Callable[[Array], float] | None = None,
    eps: float | None = None,
    at_key: bool = False,
    unit: str = "",
    every_query: bool = False,
) -> Callable[[Callable[..., Any]], Derived]:
    """Make a derived metric of a function of finished values; see :class:`Derived`."""

    def make(fn: Callable[..., Any]) -> Derived:
        summary = total if total is not None or axes else (lambda value: float(value))
        return Derived(fn.__name__, fn, tuple(of), axes, summary, eps, at_key, unit, every_query)

    return make
