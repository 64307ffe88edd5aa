"""From what `measure` found to the tidy tables of a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from sinkscope.metrics.base import AcrossTexts, AnyMetric
from sinkscope.metrics.values import Rows, Value
from sinkscope.results import ALL, Group, Tally, TextResult

Measured = TypeVar("Measured", Value, Group)

#: Columns of `.frame` and measurements.csv, and of `.summary()` and summary.csv.
COLUMNS = ["model", "text", "metric", "layer", "head", "key", "value", "std_error", "null", "tokens"]
#: A column more where a metric is reported per query, after `key`.
QUERY = "query"
SUMMARY_COLUMNS = ["text", "metric", "value", "std_error", "null"]


def tables(
    tally: Tally, asked: Iterable[AnyMetric], about: dict[str, Any], results: Sequence[TextResult]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Give the finest rows, and the model-level numbers; arguments as for :meth:`SinkReport.assemble`."""
    rows = Rows(list(about["layers"]))
    for r in results:
        for v in _once(r.values):
            rows.add(v, r.sequence.label, len(r.sequence.keyed))
    totals = [(label, name, value, np.nan, null) for label, name, value, null in tally.totals]
    tokens = sum(n for _, n in tally.texts)
    for g in _once(tally.groups.values()):
        mean = Value(g.name, g.tag, g.key, g.axes, g.value.present, g.null.present, None, None, g.heads)
        rows.add(mean, ALL, tokens, g.value.std_error)
    for g in tally.groups.values():
        if g.total is not None and g.total_null is not None:
            value, error, null = (float(x) for x in (g.total.present, g.total.std_error, g.total_null.present))
            totals.append((ALL, g.name + g.tag, value, error, null))
    summary = pd.DataFrame(totals, columns=SUMMARY_COLUMNS)
    summary = pd.concat([summary, _across(summary, asked)], ignore_index=True)
    frame = rows.frame()
    frame.insert(0, "model", about["model"])
    return frame, summary


def _once(values: Iterable[Measured]) -> list[Measured]:
    """Keep one of those of a metric that look at one position: of six tokens, keys 5 and -1 are the same."""
    return list({(v.name, v.tag if v.key is None else v.key): v for v in values}.values())


def _across(summary: pd.DataFrame, asked: Iterable[AnyMetric]) -> pd.DataFrame:
    """Add the rows of metrics about the variation from text to text."""
    rows = []
    for m in asked:
        if isinstance(m, AcrossTexts):
            names = [n for n in summary["metric"].unique() if n == m.of or n.startswith(f"{m.of}[")]
            for name in names:
                values = summary[(summary["metric"] == name) & (summary["text"] != ALL)]["value"].to_numpy()
                parts = m.fn(values)
                rows += [(ALL, f"{m.name}@{part}{name[len(m.of) :]}", v, np.nan, np.nan) for part, v in parts.items()]
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS).astype({"value": float, "std_error": float, "null": float})
