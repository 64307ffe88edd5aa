"""What can be measured: functions of a block, what streams them, and the values they end as."""

from sinkscope.metrics.base import Metric, metric
from sinkscope.metrics.catalogue import BUILT_IN as BUILT_IN
from sinkscope.metrics.catalogue import MECHANISM as MECHANISM
from sinkscope.metrics.catalogue import available
from sinkscope.metrics.catalogue import base_of as base_of
from sinkscope.metrics.catalogue import resolve as resolve
from sinkscope.metrics.pattern import of_pattern

__all__ = ["Metric", "available", "metric", "of_pattern"]
