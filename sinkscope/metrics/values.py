"""Value: what one metric says about one text, with its null; made of means over rows, laid out as tidy rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.metrics.base import AcrossTexts, AnyMetric, Array, Metric, mean_of

#: Stands for no layer, head, key or query until the frame is made.
MISSING = np.iinfo(np.int64).min


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
        heads: how many heads each layer has, where layers differ in it: the others, NaN, are none. None elsewhere.
    """

    name: str
    tag: str
    key: int | None
    axes: tuple[str, ...]
    value: Array
    null: Array
    total: float | None
    total_null: float | None
    heads: tuple[int, ...] | None = None


def values_of(
    m: AnyMetric,
    means: dict[str, Array],
    nulls: dict[str, Array],
    key: int | None,
    tag: str,
    tokens: int,
    causal: bool,
    heads: Mapping[str, tuple[int, ...] | None],
) -> list[Value]:
    """Finish one metric for one sequence; `tokens` counts its keys, `heads` those of each layer, where they differ."""
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
                None if len(axes) == 3 else mean_of(value),
                None if len(axes) == 3 else mean_of(null[name]),
                heads[m.name],
            )
            for name, value in m.finish(means[m.name]).items()
        ]
    value, null_value = m(means, tokens, causal), m(nulls, tokens, causal)
    total, null_total = (float(m.total(value)), float(m.total(null_value))) if m.total else (None, None)
    return [Value(m.name, tag, key, m.axes, value, null_value, total, null_total, heads[m.of[0]])]


def difference(a: Value, b: Value, name: str) -> Value:
    """Subtract one value of a text from another: across texts, that is a paired difference."""
    total, null = (None if x is None or y is None else x - y for x, y in ((a.total, b.total), (a.total_null, b.total_null)))
    return Value(name, a.tag, a.key, a.axes, a.value - b.value, a.null - b.null, total, null, a.heads)


@dataclass
class Rows:
    """Values laid out as tidy rows; the one frame is made at the end, however many there are.

    Attributes:
        layers: what the layers are called.
        pieces: of each value its text, metric, number of tokens and columns.
    """

    layers: Sequence[int]
    pieces: list[tuple[str, str, int, dict[str, Array]]] = field(default_factory=list)

    def add(self, value: Value, label: str, tokens: int, std_error: Array | None = None) -> None:
        """Add an array; no row for positions that a metric leaves out (NaN on the key or query axis), and heads not there."""
        shape = value.value.shape
        index = dict(zip(value.axes, np.indices(shape).reshape(len(shape), value.value.size), strict=True))
        there = np.ones(value.value.size, dtype=bool)
        if value.heads is not None and "head" in index:
            there = index["head"] < np.asarray(value.heads)[index["layer"]]
        if "layer" in index:
            index["layer"] = np.asarray(self.layers)[index["layer"]]
        if "key" not in index and value.key is not None:
            index["key"] = np.full(value.value.size, value.key)
        columns: dict[str, Any] = {
            **index,
            "value": value.value.reshape(-1),
            "std_error": np.full(value.value.size, np.nan) if std_error is None else std_error.reshape(-1),
            "null": np.broadcast_to(value.null, shape).reshape(-1),
        }
        if {"key", "query"} & set(value.axes):
            there &= ~np.isnan(columns["value"])
        if not there.all():
            columns = {name: column[there] for name, column in columns.items()}
        # Of several keys, those whose position differs from text to text would be one in the mean over texts.
        self.pieces.append((label, value.name + (value.tag if value.key is None else ""), tokens, columns))

    def frame(self) -> pd.DataFrame:
        """Give `text, metric, layer, head, key, value, std_error, null, tokens`, and `query` after `key` if any has it."""
        labels, metrics, tokens, columns = zip(*self.pieces, strict=True) if self.pieces else ((), (), (), ())
        sizes = [len(c["value"]) for c in columns]
        axes = ["layer", "head", "key", *(["query"] if any("query" in c for c in columns) else [])]
        found: dict[str, Any] = {
            "text": pd.Series(labels, dtype=None if labels else object).repeat(sizes).array,
            "metric": pd.Series(metrics, dtype=None if metrics else object).repeat(sizes).array,
        }
        for axis in axes:
            index = [c.get(axis, np.full(n, MISSING)) for c, n in zip(columns, sizes, strict=True)]
            whole = np.concatenate([np.zeros(0, dtype=int), *index])
            found[axis] = pd.arrays.IntegerArray(whole, whole == MISSING)
        for name in ("value", "std_error", "null"):
            found[name] = np.concatenate([np.zeros(0), *(c[name] for c in columns)])
        found["tokens"] = pd.array(np.repeat(np.array(tokens, dtype=int), sizes), dtype="Int64")
        return pd.DataFrame(found)
