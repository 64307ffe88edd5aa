"""What a metric is about, in words: its kind, its definition, and whether it says anything here."""

from __future__ import annotations

import math
from typing import Any

from sinkscope.metrics import BUILT_IN

#: The kinds, in the order in which a page folds them. A metric's module says which, but for a few names.
ATTENTION, HEADS, SPREAD = "Attention to the sink", "How many heads, which positions", "How far rows spread"
MECHANISM, ACROSS, OTHER = "Mechanism", "From text to text", "Other metrics"
QUIET = "Nothing to see: empty, or 0 as by chance"
KINDS = (ATTENTION, HEADS, SPREAD, MECHANISM, ACROSS, OTHER, QUIET)
BY_NAME = {"sink_rate": HEADS, "visible_sink_rate": HEADS, "sink_positions": HEADS}
BY_MODULE = {"mass": ATTENTION, "shape": SPREAD, "mechanism": MECHANISM, "across": ACROSS}


def base(metric: str) -> str:
    """Give a metric's name without a threshold and a key.

    >>> base("sink_rate@0.3[key=2]")
    'sink_rate'
    """
    return metric.partition("[")[0].partition("@")[0]


def kind(metric: str) -> str:
    """Say what a metric is about.

    >>> kind("row_entropy"), kind("sink_rate@0.3"), kind("my_metric")
    ('How far rows spread', 'How many heads, which positions', 'Other metrics')
    """
    known: Any = BUILT_IN.get(base(metric))
    module = getattr(getattr(known, "fn", None), "__module__", "")
    return BY_NAME.get(base(metric)) or BY_MODULE.get(module.rpartition(".")[2], OTHER)


def definition(metric: str) -> str:
    """Define a built-in metric in a line, and what a sweep costs; nothing for others."""
    if base(metric) == "cost":
        return "Difference of the loss when this head alone is edited; chance is its placebo's."
    known: Any = BUILT_IN.get(base(metric))
    return known.doc if known else ""


def quiet(value: float, null: float) -> bool:
    """Tell whether a number is unknown, or 0 where chance gives 0."""
    return math.isnan(value) or (abs(value) < 1e-6 and (math.isnan(null) or abs(null) < 1e-6))
