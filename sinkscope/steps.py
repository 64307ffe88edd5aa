"""Steps: the course of metrics over the passes that were seen, as a table, with the null of each pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from sinkscope.metrics import BUILT_IN
from sinkscope.metrics.base import Array, Metric
from sinkscope.metrics.null import uniform_mean
from sinkscope.models import Adapter

#: Columns of the table; those of layer and head come before the last two.
COLUMNS = ["step", "position", "queries", "texts", "metric", "value", "null"]


@dataclass(frozen=True, eq=False)
class Step:
    """One row of the series.

    Attributes:
        number: of the pass, from 0.
        position: of its first query in its text; of several texts the smallest.
        queries: how many queries it had.
        spans: (position of the first query, queries) of each text.
        values: by name and index of the key, `[layer, head]`: means over texts.
    """

    number: int
    position: int
    queries: int
    spans: tuple[tuple[int, int], ...]
    values: dict[tuple[str, int], NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Watched:
    """What is looked at.

    Attributes:
        adapter: the model.
        metrics: block metrics.
        keys: the sink keys looked at.
        asked: those of the metrics that were asked for, whose course is shown.
        nulls: those that were computed, to be used again.
    """

    adapter: Adapter
    metrics: Sequence[Metric]
    keys: Sequence[int]
    asked: Sequence[Metric]
    nulls: dict[Any, Array] = field(default_factory=dict, repr=False)

    @cached_property
    def thin(self) -> list[Metric]:
        """The metrics that look at single columns."""
        return [m for m in self.metrics if m.group == {"mass"}]

    @cached_property
    def whole(self) -> list[Metric]:
        """The metrics that look at whole rows."""
        return [m for m in self.metrics if m.group != {"mass"}]

    def series(self, steps: Sequence[Step], by: str | None) -> pd.DataFrame:
        """Lay steps out as rows; see :meth:`sinkscope.watching.Watch.series`."""
        rows = [row for step in steps for row in self._rows(step, by)]
        extra = {None: [], "layer": ["layer"], "head": ["layer", "head"]}[by]
        return pd.DataFrame(rows, columns=[*COLUMNS[:-2], *extra, *COLUMNS[-2:]])

    def _columns(self) -> list[tuple[Metric, str, int]]:
        """Give metric, name of the value and index of the key of everything that has a course."""
        return [
            (m, name, index) for m in self.asked for index in range(len(self.keys) if m.at_key else 1) for name in m.names
        ]

    def _rows(self, step: Step, by: str | None) -> list[tuple[Any, ...]]:
        found = []
        fixed = (step.number, step.position, step.queries, len(step.spans))
        for metric, name, index in self._columns():
            values = step.values.get((name, index))
            if values is None:
                continue
            tag = f"[key={self.keys[index]}]" if metric.at_key and len(self.keys) > 1 else ""
            there = np.arange(values.shape[1]) < np.array(list(self.adapter.heads.values()))[:, None]
            nulls = np.where(there, self._null(metric, name, index, step)[:, None], np.nan)
            if by is None:
                found.append((*fixed, name + tag, _mean(values), _mean(nulls)))
            for place, layer in enumerate(self.adapter.layers if by else ()):
                heads = [[]] if by == "layer" else np.flatnonzero(there[place])[:, None].tolist()
                for head in heads:
                    at = place, head or slice(None)
                    found.append((*fixed, name + tag, layer, *head, _mean(values[at]), _mean(nulls[at])))
        return found

    def _null(self, metric: Metric, name: str, index: int, step: Step) -> Array:
        """Give the null of each layer: the metric on uniform attention, over the queries of each text in this pass."""
        if metric.null is None or metric.name not in BUILT_IN:
            return np.full(len(self.adapter.layers), np.nan)
        windows = [self.adapter.windows.get(layer) if metric.null == "visible" else None for layer in self.adapter.layers]
        return np.array([self._null_of(metric, name, index, step, window) for window in windows])

    def _null_of(self, metric: Metric, name: str, index: int, step: Step, window: int | None) -> float:
        found = []
        for start, count in step.spans:
            at = (metric.name, index, start, count, window)
            if at not in self.nulls and count:
                self.nulls[at] = uniform_mean(
                    metric,
                    start + count,
                    self.keys[index],
                    causal=self.adapter.causal,
                    window=window,
                    counted=torch.arange(start + count) >= start,
                )
            if count:
                found.append(_mean(metric.finish(self.nulls[at])[name]))
        return _mean(np.array(found))


def _mean(values: NDArray[np.floating[Any]]) -> float:
    """Average what is defined; NaN where nothing is."""
    there = np.asarray(values, dtype=float)[~np.isnan(values)]
    return float(there.mean()) if there.size else float("nan")
