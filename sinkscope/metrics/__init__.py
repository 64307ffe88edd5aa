"""What can be measured: functions of a block, what streams them, and the values they end as."""

from sinkscope.metrics.base import AcrossTexts, AnyMetric, Derived, Metric, metric
from sinkscope.metrics.catalogue import BUILT_IN, DEFAULT, ENTRY_POINTS, MECHANISM, available, base_of, resolve
from sinkscope.metrics.pattern import of_pattern

__all__ = [
    "BUILT_IN",
    "DEFAULT",
    "ENTRY_POINTS",
    "MECHANISM",
    "AcrossTexts",
    "AnyMetric",
    "Derived",
    "Metric",
    "available",
    "base_of",
    "metric",
    "of_pattern",
    "resolve",
]
