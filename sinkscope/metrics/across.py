"""How a number varies from text to text."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from sinkscope.metrics.base import AcrossTexts, Array

#: What a mean can be: from, to. Anything; 0 and up; a share; a difference of shares, or a cosine.
Bounds = tuple[float, float]
ANY: Bounds = (-math.inf, math.inf)
POSITIVE: Bounds = (0.0, math.inf)
SHARE: Bounds = (0.0, 1.0)
SIGNED: Bounds = (-1.0, 1.0)


def t_interval(mean: float, std_error: float, n: float | int, bounds: Bounds = ANY) -> tuple[float, float]:
    """Give the 95% interval of a mean over n texts, by Student's t; NaN with fewer than two.

    It is made where there are no bounds and carried back, so that it can't leave what is possible: with
    g(x) = log(x - low) - log(high - x), without the term of a bound that is not there, it is g(m) plus and minus
    t * std_error * g'(m) (the delta method). Without bounds that is the plain one; for a share, the logit interval.

    >>> [round(x, 3) for x in t_interval(0.5, 0.1, 5)]
    [0.222, 0.778]
    >>> [round(x, 3) for x in t_interval(0.05, 0.1, 5, SHARE)]
    [0.0, 0.948]
    """
    from scipy import special  # scipy.stats takes two seconds to import

    if n < 2 or math.isnan(std_error):
        return math.nan, math.nan
    half = float(special.stdtrit(n - 1, 0.975)) * std_error
    low, high = bounds
    below, above = mean - low, high - mean
    if below <= 0 or above <= 0:  # all texts stand at the bound, to rounding
        return max(mean - half, low), min(mean + half, high)
    if math.isinf(below) and math.isinf(above):
        return mean - half, mean + half
    wide = half / below + half / above
    if math.isinf(above):
        return low + below * math.exp(-wide), low + below * math.exp(min(wide, 700.0))
    if math.isinf(below):
        return high - above * math.exp(min(wide, 700.0)), high - above * math.exp(-wide)
    odds = math.log(below / above)
    low_end, high_end = (low + (high - low) * float(special.expit(odds + way)) for way in (-wide, wide))
    return low_end, high_end


def scale(bounds: Bounds) -> str:
    """Name the scale on which an interval with these bounds is made.

    >>> scale(SHARE), scale(POSITIVE), scale(ANY)
    ('logit', 'log', 'plain')
    """
    return ("plain", "log", "logit")[sum(map(math.isfinite, bounds))]


def _consistency(values: Array) -> Mapping[str, float]:
    """How sink_mass varies across texts: standard deviation, coefficient of variation and 95% interval of the mean.

    Source: seed analysis.
    """
    values = values[~np.isnan(values)]
    n = len(values)
    if not n:
        return dict.fromkeys(("std", "cv", "low", "high"), float("nan"))
    mean = float(values.mean())
    std = float(values.std(ddof=1)) if n > 1 else float("nan")
    low, high = t_interval(mean, std / np.sqrt(n), n, SHARE)
    return {"std": std, "cv": std / mean if mean else float("nan"), "low": low, "high": high}


consistency = AcrossTexts("consistency", _consistency)
