"""All that a page shows of a measurement, as one dictionary: what `page`, `snippet`, `json` and `markdown` are made of.

`docs/report_schema.md` documents every key. A key that a reader relies on changes its meaning only with `SCHEMA_VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import to_hex
from pandas import DataFrame

from sinkscope.metrics.across import t_interval
from sinkscope.reports.costs import norm_of
from sinkscope.reports.drawing import (
    COLOUR_MAP,
    first_key,
    labelled,
    layer_series,
    query_by_key,
    tokens_of,
    visible,
    without_queries,
)
from sinkscope.reports.page.glance import glance
from sinkscope.reports.page.kinds import KINDS, QUIET, base, definition, kind, quiet
from sinkscope.reports.page.pack import pack
from sinkscope.reports.page.parts import facts
from sinkscope.reports.words import nouns, said

SCHEMA_VERSION = 1
MOST_TOKENS = 8192  # of one text, shown
MOST_TEXTS = 8  # to be looked into one by one
MOST_NUMBERS = 600_000  # about 3 MB; large models and long texts leave room for fewer texts
MOST_PAIRS = 64  # queries and keys of the attention picture
PROFILES = {"received_profile": "mean attention of queries that see it", "position_profile": "share of all attention"}


def measured(
    frame: DataFrame,
    summary: DataFrame,
    about: Mapping[str, Any],
    attention: DataFrame | None = None,
    patterns: DataFrame | None = None,
) -> dict[str, Any]:
    """Gather what a page shows of a measurement.

    Args:
        frame: tidy measurements; what is made of a metric that they lack is left out.
        summary: model-level numbers, columns `text, metric, value, std_error, null`, and `low, high` if they are known.
        about: how it was measured: `model`, `texts` (`label`, `n_tokens`, `tokens`), `sentences`, ...
        attention: columns `query, key, value`: mean attention of one short text.
        patterns: columns `layer, head, query, key, query_token, value`: every head's attention of one short text.
    """
    texts = about.get("texts", [])
    looked_into = [text for text in texts if "tokens" in text]
    profiled = {name: words for name, words in PROFILES.items() if name in set(frame["metric"])}
    if not looked_into and profiled:  # of many texts there is the mean alone
        longest = int(frame.loc[frame["metric"].isin(list(profiled)), "key"].max()) + 1
        looked_into = [{"label": "all", "n_tokens": longest, "tokens": []}]
    overall = "all" if "all" in set(summary["text"]) or not texts else texts[0]["label"]
    whole = summary[summary["text"] == overall]
    inside = _inside(frame, looked_into)
    keys = about.get("arguments", {}).get("key", [0])
    labels = [text["label"] for text in inside["texts"]]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "measure",
        "model": visible(str(about.get("model", "a model"))),
        "n_texts": len(texts),
        "n_tokens": sum(text["n_tokens"] for text in texts),
        "sentences": [visible(words) for words in about.get("sentences", {}).values()],
        "notes": [visible(note) for note in about.get("notes", [])],
        "nouns": nouns(about),
        "glance": glance(whole, inside, keys, about),
        "numbers": _numbers(whole, len(texts), about),
        "by_text": _by_text(summary, labels),
        "profiled": profiled,
        "sinks": _sinks(frame, inside["texts"]),
        "attention": None if attention is None else _pairs(attention),
        "patterns": None if patterns is None or not len(patterns) else _patterns(patterns, keys),
        "facts": [[name, visible(value)] for name, value in facts(about)],
    } | inside


def _inside(frame: DataFrame, texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Cells by metric and text, and as many texts as there is room for."""
    by_head = first_key(without_queries(frame).dropna(subset=["layer", "head", "value"]))
    layers = sorted(frame["layer"].dropna().unique().tolist())
    heads = sorted(by_head["head"].unique().tolist())
    metrics = by_head["metric"].unique().tolist()
    longest = max([min(MOST_TOKENS, text["n_tokens"]) for text in texts], default=0)
    room = MOST_NUMBERS // max(1, len(layers) * (len(heads) * len(metrics) + longest))
    texts = texts[: max(1, min(MOST_TEXTS, room))]
    cells: dict[Any, Any] = {metric: {} for metric in metrics}
    shown = by_head[by_head["text"].isin(["all", *(text["label"] for text in texts)])]
    for (metric, label), rows in shown.groupby(["metric", "text"]):
        cells[metric][label] = {of: _grid(rows, of, layers, heads) for of in ("value", "null", "std_error")}
    return {
        "colours": [to_hex(colour) for colour in mpl.colormaps[COLOUR_MAP](np.linspace(0, 1, 64))],
        "layers": layers,
        "heads": heads,
        "names": {metric: visible(labelled(metric)) for metric in metrics},
        "definitions": {metric: said(words, frame.attrs) for metric in metrics if (words := definition(metric))},
        "cells": cells,
        "scales": {
            metric: scale(by_head[by_head["metric"] == metric]["value"]) for metric in metrics if base(metric) == "cost"
        },
        "bands": {metric: _band(frame, metric, layers) for metric in metrics},
        "texts": [_text(text, frame[frame["text"] == text["label"]], layers) for text in texts],
    }


def floats(values: Any) -> list[float | None]:
    """Three digits each; None for what is not known."""
    return [float(f"{x:.3g}") if math.isfinite(x) else None for x in np.asarray(values, float).tolist()]


def scale(values: Any) -> dict[str, Any]:
    """Give the largest size, and the size from which colours are logarithmic, if they are."""
    norm = norm_of(values)
    return {"most": float(f"{norm.vmax:.3g}"), "linear": float(f"{getattr(norm, 'linthresh', norm.vmax):.3g}")}


def known(value: float) -> float | None:
    """Give a number as JSON has it."""
    return float(value) if math.isfinite(value) else None


def _table(cells: DataFrame) -> list[list[float | None]]:
    return [floats(row) for row in cells.to_numpy(float, na_value=np.nan)]


def _grid(rows: DataFrame, column: str, layers: list[int], heads: list[int]) -> Any:
    """Rows of layers, or the one number that is in every cell."""
    table = _table(rows.pivot(index="layer", columns="head", values=column).reindex(layers, columns=heads))
    return table[0][0] if all(value == table[0][0] for row in table for value in row) else table


def _band(frame: DataFrame, metric: str, layers: list[int]) -> dict[str, Any] | None:
    series, count = layer_series(frame, metric)
    series = series.reindex(layers)
    low, high = floats(series["low"]), floats(series["high"])
    return {"name": said(f"range of {count} texts", frame.attrs), "low": low, "high": high} if count > 1 else None


def _text(text: Mapping[str, Any], rows: DataFrame, layers: list[int]) -> dict[str, Any]:
    """A text's tokens, and its profiles layer by layer."""
    keys, profiles = range(min(MOST_TOKENS, text["n_tokens"])), {}
    for metric, of in rows[rows["metric"].isin(list(PROFILES))].groupby("metric"):
        table = of.pivot(index="layer", columns="key", values="value").reindex(layers, columns=keys)
        profiles[metric] = {
            "null": floats(of.groupby("key")["null"].mean().reindex(keys)),
            "layers": pack(table.to_numpy(float, na_value=np.nan), 16),
        }
    tokens = ["↵\n".join(map(visible, token.split("\n"))) for token in text["tokens"][:MOST_TOKENS]]
    about = {"label": text["label"], "name": visible(text["label"]), "count": text["n_tokens"], "tokens": tokens}
    return about | {"profiles": profiles}


def _pairs(attention: DataFrame) -> dict[str, Any]:
    names = {}
    for axis in ("query", "key"):
        tokens = tokens_of(attention, axis) or tokens_of(attention, "key")  # reports of old name the keys alone
        count = min(MOST_PAIRS, int(attention[axis].max()) + 1)
        names[axis] = [visible(tokens[at]) if at < len(tokens) else str(at) for at in range(count)]
    square = query_by_key(attention, len(names["query"]), len(names["key"]))
    return {"tokens": names["key"], "queries": names["query"], "value": _table(square)}


def _patterns(patterns: DataFrame, keys: Sequence[int | str]) -> dict[str, Any]:
    """Every head's rows (unknown of a head that the layer has not); of a causal text the keys up to the query alone."""
    rows = patterns.sort_values(["layer", "head", "query", "key"], kind="stable")
    count = int(rows["query"].max()) + 1
    tokens = rows.drop_duplicates("query").sort_values("query")["query_token"].astype(str).tolist()
    layers, heads = sorted(rows["layer"].unique().tolist()), sorted(rows["head"].unique().tolist())
    causal = not (rows["key"] > rows["query"]).any()
    per_head = count * (count + 1) // 2 if causal else count * count
    places = {count + key if isinstance(key, int) and key < 0 else key for key in keys}
    sinks = [i for i, token in enumerate(tokens) if i in places or token in places]
    each = np.full((len(layers), len(heads), per_head), np.nan)  # a layer may have fewer heads than another
    there = rows.drop_duplicates(["layer", "head"])
    at = np.searchsorted(layers, there["layer"]), np.searchsorted(heads, there["head"])
    each[at] = rows["value"].to_numpy(float).reshape(-1, per_head)
    return {
        "layers": layers,
        "heads": heads,
        "causal": bool(causal),
        "tokens": [visible(token) for token in tokens],
        "sinks": sinks,
        "value": pack(each.reshape(-1, per_head), 8),
    }


def _numbers(rows: DataFrame, n_texts: int, of: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the model-level numbers, by kind."""
    found = []
    if "low" not in rows:
        bounds = [t_interval(value, error, n_texts) for value, error in zip(rows["value"], rows["std_error"], strict=True)]
        rows = rows.assign(low=[low for low, _ in bounds], high=[high for _, high in bounds])
    for metric, value, low, high, null in rows[["metric", "value", "low", "high", "null"]].itertuples(index=False):
        name = f"{metric} (how many)" if metric.startswith("sink_positions") else labelled(metric)
        about = {"metric": metric, "name": visible(name), "kind": QUIET if quiet(value, null) else kind(metric)}
        numbers = {"value": known(value), "low": known(low), "high": known(high), "null": known(null)}
        found.append(about | {"definition": said(definition(metric), of)} | numbers)
    return [row | {"kind": said(row["kind"], of)} for row in sorted(found, key=lambda row: KINDS.index(row["kind"]))]


def _by_text(summary: DataFrame, labels: list[str]) -> dict[str, Any]:
    table = summary[summary["text"].isin(labels)].pivot_table("value", "metric", "text", sort=False)
    table = table.reindex(columns=[label for label in labels if label in table])
    rows = [[visible(str(name)), floats(row)] for name, row in zip(table.index, table.to_numpy(float), strict=True)]
    return {"labels": [visible(label) for label in table.columns], "rows": rows}


def _sinks(frame: DataFrame, texts: list[dict[str, Any]]) -> list[list[Any]]:
    """The five strongest sinks of each text: its name, position, token, share of heads."""
    rows, found = frame[frame["metric"].str.startswith("sink_positions")], []
    for text in texts:
        top = rows[rows["text"] == text["label"]].dropna(subset="value").nlargest(5, "value")
        for key, share in zip(top["key"].tolist(), top["value"].tolist(), strict=True):
            token = text["tokens"][key].replace("\n", "") if key < len(text["tokens"]) else ""
            found.append([text["name"], key, token, float(f"{share:.3g}")])
    return found
