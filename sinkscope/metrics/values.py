"""Value: what one metric says about one text, with its null; made of means over rows, laid out as tidy rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.metrics.base import AcrossTexts, AnyMetric, Array, Metric


@dataclass(frozen=True)
class Value:
    """One metric of one text.

    Attributes:
        name: as reported, such as `sink_rate@0.3`.
        tag: tells several sink positions apart in the summary, such as `[key=3]`; else empty.
        key: sink position looked at, or None.
        axes: axes of `value`, of `("layer", "head", "key", "query")`.
        value: the numbers.
        null: the same on uniform attention.
        total: the model-level number, or None.
        total_null: its null.
    """

    name: str
    tag: str
    key: int | None
    axes: tuple[str, ...]
    value: Array
    null: Array
    total: float | None
    total_null: float | None


def values_of(
    m: AnyMetric,
    means: dict[str, Array],
    nulls: dict[str, Array],
    key: int | None,
    tag: str,
    tokens: int,
    causal: bool,
) -> list[Value]:
    """Finish one metric for one sequence."""
    if isinstance(m, AcrossTexts):
        return []
    if isinstance(m, Metric):
        axes = ("layer", "head", "query" if m.per_query else "key")[: means[m.name].ndim]
        null = m.finish(nulls[m.name])
        return [
            Value(
                name,
                tag,
                key,
                axes,
                value,
                null[name],
                *((None, None) if len(axes) == 3 else (_mean(value), _mean(null[name]))),
            )
            for name, value in m.finish(means[m.name]).items()
        ]
    value, null_value = m(means, tokens, causal), m(nulls, tokens, causal)
    total = (float(m.total(value)), float(m.total(null_value))) if m.total else (None, None)
    return [Value(m.name, tag, key, m.axes, value, null_value, *total)]


def difference(a: Value, b: Value, name: str) -> Value:
    """Subtract one value of a text from another: across texts, that is a paired difference."""
    totals = [None if x is None or y is None else x - y for x, y in ((a.total, b.total), (a.total_null, b.total_null))]
    return Value(name, a.tag, a.key, a.axes, a.value - b.value, a.null - b.null, *totals)


def _mean(values: Array) -> float:
    """Mean over layers and heads of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def rows_of(value: Value, layers: Sequence[int], label: str, tokens: int, std_error: Array | None = None) -> pd.DataFrame:
    """Lay an array out as rows; positions that a metric leaves out (NaN on the key or query axis) give none.

    The column `query` is there where a metric is reported per query.
    """
    shape = value.value.shape
    index = dict(zip(value.axes, np.indices(shape).reshape(len(shape), value.value.size), strict=True))
    n = int(np.prod(shape, dtype=int))
    # Of several keys, those whose position differs from text to text would be one in the mean over texts.
    columns: dict[str, Any] = {"text": label, "metric": value.name + (value.tag if value.key is None else "")}
    for axis in ("layer", "head", "key", *(["query"] if "query" in index else [])):
        if axis in index:
            columns[axis] = pd.array(np.asarray(layers)[index[axis]] if axis == "layer" else index[axis], dtype="Int64")
        else:
            fixed = value.key if axis == "key" else None
            columns[axis] = pd.array([fixed] * n, dtype="Int64")
    columns["value"] = value.value.reshape(-1)
    columns["std_error"] = np.full(n, np.nan) if std_error is None else std_error.reshape(-1)
    columns["null"] = np.broadcast_to(value.null, shape).reshape(-1)
    columns["tokens"] = pd.array([tokens] * n, dtype="Int64")
    rows = pd.DataFrame(columns, index=range(n))
    return rows[rows["value"].notna()] if {"key", "query"} & set(value.axes) else rows
