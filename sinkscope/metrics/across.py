"""How a number varies from text to text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sinkscope.metrics.base import AcrossTexts, Array


def t_interval(mean: float, std_error: float, n: int) -> tuple[float, float]:
    """Give the 95% interval of a mean over n texts, by Student's t; NaN with fewer than two.

    >>> low, high = t_interval(0.5, 0.1, 5)
    >>> round(low, 3), round(high, 3)
    (0.222, 0.778)
    """
    from scipy import stats

    half = float(stats.t.ppf(0.975, n - 1)) * std_error if n > 1 else float("nan")
    return mean - half, mean + half


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
    low, high = t_interval(mean, std / np.sqrt(n), n)
    return {"std": std, "cv": std / mean if mean else float("nan"), "low": low, "high": high}


consistency = AcrossTexts("consistency", _consistency)
