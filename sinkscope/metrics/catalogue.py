"""The catalogue: built-in metrics, those of other packages, and any function of a block.

A new metric is one decorated function in the file of its kind (`mass`, `shape`, ...): it is found by that alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from torch import Tensor

from sinkscope.block import Block
from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics import across, mass, mechanism, residual, shape
from sinkscope.metrics.base import AcrossTexts, AnyMetric, Derived, Metric, metric

#: Entry-point group through which other packages offer metrics: `name = "package.module:function"`.
ENTRY_POINTS = "sinkscope.metrics"

BUILT_IN: dict[str, AnyMetric] = {
    thing.name: thing
    for module in (mass, shape, across, mechanism, residual)
    for thing in vars(module).values()
    if isinstance(thing, Metric | Derived | AcrossTexts)
}

#: Those that need more than attention: asked for by name.
MECHANISM: tuple[str, ...] = tuple(name for name in BUILT_IN if name in vars(mechanism) | vars(residual))
#: One row per head and position: asked for by name.
LARGE: tuple[str, ...] = ("head_profile", "query_profile")
#: What `measure` reports when nothing is asked for: all of attention but what is large.
DEFAULT: tuple[str, ...] = tuple(name for name in BUILT_IN if name not in LARGE and name not in MECHANISM)


def _offered() -> dict[str, EntryPoint]:
    """Other packages' metrics, not loaded; a built-in name can't be taken."""
    return {entry.name: entry for entry in entry_points(group=ENTRY_POINTS) if entry.name not in BUILT_IN}


def _load(entry: EntryPoint) -> AnyMetric:
    try:
        loaded = _as_metric(entry.load())
        return replace(loaded, name=entry.name)
    except Exception as error:
        raise SinkscopeError(f"the metric {entry.name!r} ({entry.value}) can't be loaded: {error}") from error


def available() -> dict[str, AnyMetric]:
    """Every metric that can be asked for by name: the built-in ones and other packages'.

    Raises:
        SinkscopeError: another package's metric can't be loaded; names it.
    """
    return BUILT_IN | {name: _load(entry) for name, entry in _offered().items()}


Asked = str | AnyMetric | Callable[[Block], Tensor]


def resolve(asked: Asked | Iterable[Asked] | None) -> list[AnyMetric]:
    """Turn names and functions into metrics.

    Args:
        asked: names (`"sink_mass"`, `"sink_rate@0.5"`), metrics, or bare functions of a block, which then need the
            pattern; one or several; None for the default set.

    Raises:
        SinkscopeError: an unknown name (with the nearest one), a threshold that makes no sense, a name used twice.

    >>> [m.name for m in resolve(["sink_mass", "sink_positions@0.5"])]
    ['sink_mass', 'sink_positions@0.5']
    """
    if isinstance(asked, str | AcrossTexts) or callable(asked):
        asked = [asked]
    if asked is not None and not isinstance(asked, Iterable):
        raise SinkscopeError(f"metrics is a {type(asked).__name__}: expected names, metrics, or functions of a block")
    chosen = [_by_name(a) if isinstance(a, str) else _as_metric(a) for a in (DEFAULT if asked is None else asked)]
    merged: dict[str, AnyMetric] = {}
    for m in chosen:
        ours = BUILT_IN.get(m.name)
        if ours is not None and ours.fn is not m.fn:
            raise SinkscopeError(f"{m.name!r} is a built-in metric: give yours another name, @ss.metric(name=...)")
        known = merged.get(m.name)
        if known is None or known == m:
            merged[m.name] = m
        elif isinstance(m, Metric) and isinstance(known, Metric) and m.fn is known.fn and m.thresholds:
            merged[m.name] = known.at(*dict.fromkeys(known.thresholds + m.thresholds))
        else:
            raise SinkscopeError(f"two different metrics are called {m.name!r}: give one another name")
        if isinstance(m, AcrossTexts):  # it is about another metric's values, which then are reported too
            merged.setdefault(m.of, BUILT_IN[m.of])
    if not merged:
        raise SinkscopeError(f"no metrics asked for. Available: {', '.join(sorted(BUILT_IN))}")
    return list(merged.values())


def base_of(asked: Sequence[AnyMetric]) -> list[Metric]:
    """Collect the block metrics behind what was asked for, each once."""
    base: dict[str, Metric] = {}
    waiting = list(asked)
    while waiting:
        m = waiting.pop()
        if isinstance(m, Metric):
            base.setdefault(m.name, m)
        else:
            waiting += [BUILT_IN[name] for name in ((m.of,) if isinstance(m, AcrossTexts) else m.of)]
    return list(base.values())


def _by_name(name: str) -> AnyMetric:
    base, at, threshold = name.partition("@")
    offered = {} if base in BUILT_IN else _offered()
    if base not in BUILT_IN and base not in offered:
        raise unknown("metric", name, [*BUILT_IN, *offered])
    found = BUILT_IN[base] if base in BUILT_IN else _load(offered[base])
    if not at:
        return found
    if (
        isinstance(found, AcrossTexts)
        or (isinstance(found, Metric) and not found.thresholds)
        or (isinstance(found, Derived) and found.eps is None)
    ):
        raise SinkscopeError(f"metric {base!r} takes no threshold: write {base!r}")
    try:
        eps = float(threshold)
    except ValueError:
        eps = math.nan
    if not math.isfinite(eps):
        raise SinkscopeError(f"{name!r}: the threshold after @ must be a number, as in '{base}@0.3'")
    return found.at(eps)


def _as_metric(thing: object) -> AnyMetric:
    if isinstance(thing, Metric | Derived | AcrossTexts):
        return thing
    if not callable(thing):
        raise SinkscopeError(f"a metric is a name or a function of a block, not a {type(thing).__name__}")
    return metric(thing)
