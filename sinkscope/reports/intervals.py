"""The 95% interval of a mean over texts: on which scale it is made, and why there is none.

Student's t on a scale without bounds (:func:`sinkscope.metrics.across.t_interval`): what a mean can be follows from the
unit of its metric, so that no interval holds what is impossible.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sinkscope.metrics import BUILT_IN
from sinkscope.metrics.across import ANY, POSITIVE, SHARE, SIGNED, Bounds, scale, t_interval
from sinkscope.metrics.base import Array

#: By the unit of a metric; of any other unit a mean may be any number.
BOUNDS: dict[str, Bounds] = {
    "share of attention": SHARE,
    "share of heads": SHARE,
    "share of sink heads": SHARE,
    "share of layers": SHARE,
    "share of the maximum": SHARE,
    "cosine": SIGNED,
    "share of the output's norm": POSITIVE,  # above 1, the other keys cancel it
    "times": POSITIVE,
    "times the median": POSITIVE,
    "times the layer's mean": POSITIVE,
    "norm": POSITIVE,
    "magnitude": POSITIVE,
    "position": POSITIVE,
    "dimension": POSITIVE,
}
#: Of what is no metric, and stands among them.
UNITS = {"cost": "nats per token"}
#: Where it is not what the unit says: differences of shares.
SUMMARIES: dict[str, Bounds] = {
    "sink_mass_excess": SIGNED,
    "layer_progression": SIGNED,
}


class Interval(NamedTuple):
    """From where to where, and how it was made, or why there is none (NaN)."""

    low: float
    high: float
    said: str


def unit_of(metric: str, units: Mapping[str, str] | None = None) -> str:
    """Give the unit of a metric, whatever its threshold and key; `units` are those of metrics that are not built in.

    >>> unit_of("sink_rate@0.3"), unit_of("sink_mass[key=-1]"), unit_of("mine", {"mine": "nats"}), unit_of("other")
    ('share of heads', 'share of attention', 'nats', '')
    """
    base = metric.partition("[")[0].partition("@")[0]
    return getattr(BUILT_IN.get(base), "unit", "") or (UNITS | dict(units or {})).get(base, "")


def bounds_of(metric: str, tokens: float | int = math.inf, units: Mapping[str, str] | None = None) -> Bounds:
    """Say what the mean of a metric over texts can be.

    Args:
        metric: as a summary names it.
        tokens: mean length of the texts: a row is spread over 1 to T keys, and its entropy is at most log T.
        units: of metrics that are not built in.

    >>> bounds_of("sink_rate@0.3"), bounds_of("effective_keys", 64), bounds_of("first_to_rest_ratio")
    ((0.0, 1.0), (1.0, 64.0), (0.0, inf))
    """
    base = metric.partition("[")[0].partition("@")[0]
    unit = unit_of(metric, units)
    if base == "sink_positions":  # a count
        return (0.0, float(tokens))
    if base in SUMMARIES:
        return SUMMARIES[base]
    if unit == "keys":
        return (1.0, float(tokens))
    if unit == "nats" and base in BUILT_IN:  # an entropy
        return (0.0, math.log(tokens))
    return BOUNDS.get(unit, ANY)


def of_mean(value: float, std_error: float, n: int, bounds: Bounds, texts: int) -> Interval:
    """Give the interval of a mean over n of the texts, or the reason why there is none."""
    low, high = t_interval(value, std_error, n, bounds)
    if not math.isnan(low):
        return Interval(low, high, f"t, {scale(bounds)}, {n} texts")
    if texts == 1:
        return Interval(low, high, "none: one text")
    if n == 0:
        return Interval(low, high, "none: no text has it" if math.isnan(value) else "none: about the texts together")
    return Interval(low, high, f"none: {'one' if n == 1 else n} of {texts} texts")


def of_difference(first: Array, second: Array, bounds: Bounds, *, paired: bool) -> Interval:
    """Give the interval of the mean of `second` minus that of `first`: paired text by text, else Welch's.

    A difference of two numbers between a and b is between a - b and b - a, and its interval stays there.
    """
    between = (bounds[0] - bounds[1], bounds[1] - bounds[0])
    between = between if math.isfinite(between[1]) else ANY
    if paired:
        change = second - first
        n, freedom = len(change), len(change) - 1.0
        error = float(change.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    else:
        n = min(len(first), len(second))
        parts = [float(x.var(ddof=1) / len(x)) if len(x) > 1 else math.nan for x in (first, second)]
        error = math.sqrt(sum(parts))
        under = sum(part**2 / (len(x) - 1) for part, x in zip(parts, (first, second), strict=True) if len(x) > 1)
        freedom = sum(parts) ** 2 / under if under > 0 else float(len(first) + len(second) - 2)
    if n < 2:
        return Interval(math.nan, math.nan, "none: one text" if n == 1 else "none: no text has both")
    low, high = t_interval(float(np.mean(second) - np.mean(first)), error, freedom + 1, between)
    how, count = ("paired", f"{n}") if paired else ("not paired (Welch)", f"{len(first)} and {len(second)}")
    return Interval(low, high, f"{how}, {scale(between)}, {count} texts")
