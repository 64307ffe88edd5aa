"""report.html: a whole report on one page that needs no network, no server and no library to be looked into.

`render` puts all that the figures show into the page as JSON, and a script in `page.html.j2` draws it as SVG.
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
from sinkscope.reports.drawing import COLOUR_MAP, first_key, labelled, layer_series, query_by_key, visible, without_queries
from sinkscope.reports.page.parts import environment, facts

MOST_TOKENS = 1200  # of one text, shown
MOST_TEXTS = 8  # to be looked into one by one
MOST_NUMBERS = 400_000  # about 3 MB; large models and long texts leave room for fewer texts
MOST_PAIRS = 64  # queries and keys of the attention picture
PROFILES = {"position_profile": "share of all attention", "received_profile": "mean attention of queries that see it"}


def render(
    frame: DataFrame,
    summary: DataFrame,
    meta: Mapping[str, Any],
    attention: DataFrame | None = None,
    tokens: Sequence[str] = (),
) -> str:
    """A report as one HTML page.

    Args:
        frame: tidy measurements; a figure whose metric they lack is left out.
        summary: model-level numbers, columns `text, metric, value, std_error, null`.
        meta: how it was measured: `model`, `texts` (`label`, `n_tokens`, `tokens`), `sentences`, ...
        attention: columns `query, key, value`: mean attention of one short text.
        tokens: that text's tokens; by default the column `key_token`, else numbers.
    """
    texts = meta.get("texts", [])
    looked_into = [text for text in texts if "tokens" in text]
    profiled = {name: words for name, words in PROFILES.items() if name in set(frame["metric"])}
    if not looked_into and profiled:  # of many texts there is the mean alone
        longest = int(frame.loc[frame["metric"].isin(list(profiled)), "key"].max()) + 1
        looked_into = [{"label": "all", "n_tokens": longest, "tokens": []}]
    data = _data(frame, looked_into) | {"attention": None if attention is None else _pairs(attention, tokens)}
    overall = "all" if "all" in set(summary["text"]) or not texts else texts[0]["label"]
    template = environment().get_template("page.html.j2")
    return template.render(
        data=data,
        model=meta.get("model", "a model"),
        texts=texts,
        sentences=list(meta.get("sentences", {}).values()),
        numbers=_numbers(summary[summary["text"] == overall], len(texts)),
        by_text=_by_text(summary, [text["label"] for text in data["texts"]]),
        profiled=profiled,
        shaded=any(text["tokens"] for text in looked_into),
        sinks=_sinks(frame, data["texts"]),
        facts=facts(meta),
    )


def _data(frame: DataFrame, texts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the script draws: cells by metric and text, and as many texts as there is room for."""
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
        "colours": [to_hex(colour) for colour in mpl.colormaps[COLOUR_MAP](np.linspace(0, 1, 32))],
        "layers": layers,
        "heads": heads,
        "names": {metric: visible(labelled(metric)) for metric in metrics},
        "cells": cells,
        "bands": {metric: _band(frame, metric, layers) for metric in metrics},
        "texts": [_text(text, frame[frame["text"] == text["label"]], layers) for text in texts],
    }


def _list(values: Any) -> list[float | None]:
    return [float(f"{x:.3g}") if math.isfinite(x) else None for x in np.asarray(values, float).tolist()]


def _table(cells: DataFrame) -> list[list[float | None]]:
    return [_list(row) for row in cells.to_numpy(float, na_value=np.nan)]


def _grid(rows: DataFrame, column: str, layers: list[int], heads: list[int]) -> Any:
    """Rows of layers, or the one number that is in every cell."""
    table = _table(rows.pivot(index="layer", columns="head", values=column).reindex(layers, columns=heads))
    return table[0][0] if all(value == table[0][0] for row in table for value in row) else table


def _band(frame: DataFrame, metric: str, layers: list[int]) -> dict[str, Any] | None:
    series, count = layer_series(frame, metric)
    series = series.reindex(layers)
    low, high = _list(series["low"]), _list(series["high"])
    return {"name": f"range of {count} texts", "low": low, "high": high} if count > 1 else None


def _text(text: Mapping[str, Any], rows: DataFrame, layers: list[int]) -> dict[str, Any]:
    """A text's tokens and profiles; layer by layer only `position_profile`, to save room."""
    keys, profiles = range(min(MOST_TOKENS, text["n_tokens"])), {}
    for metric, of in rows[rows["metric"].isin(list(PROFILES))].groupby("metric"):
        table = of.pivot(index="layer", columns="key", values="value").reindex(layers, columns=keys)
        profiles[metric] = {
            "mean": _list(table.mean()),
            "null": _list(of.groupby("key")["null"].mean().reindex(keys)),
            "layers": _table(table) if metric == "position_profile" else [],
        }
    tokens = ["↵\n".join(map(visible, token.split("\n"))) for token in text["tokens"][:MOST_TOKENS]]
    about = {"label": text["label"], "name": visible(text["label"]), "count": text["n_tokens"], "tokens": tokens}
    return about | {"profiles": profiles}


def _pairs(attention: DataFrame, tokens: Sequence[str]) -> dict[str, Any]:
    if not tokens and "key_token" in attention:
        tokens = attention.drop_duplicates("key").sort_values("key")["key_token"].tolist()
    count = min(MOST_PAIRS, int(attention["key"].max()) + 1)
    names = [visible(tokens[key]) if key < len(tokens) else str(key) for key in range(count)]
    return {"tokens": names, "value": _table(query_by_key(attention, count))}


def _numbers(rows: DataFrame, n_texts: int) -> list[dict[str, Any]]:
    found = []
    for metric, value, error, null in rows[["metric", "value", "std_error", "null"]].itertuples(index=False):
        low, high = t_interval(value, error, n_texts)
        interval = "\N{EN DASH}" if math.isnan(low) else f"{low:.3g} to {high:.3g}"
        name = f"{metric} (how many)" if metric.startswith("sink_positions") else labelled(metric)
        found.append({"metric": name, "value": value, "interval": interval, "null": null})
    return found


def _by_text(summary: DataFrame, labels: list[str]) -> DataFrame:
    table = summary[summary["text"].isin(labels)].pivot_table("value", "metric", "text", sort=False)
    return table.reindex(columns=[label for label in labels if label in table])


def _sinks(frame: DataFrame, texts: list[dict[str, Any]]) -> list[tuple[str, int, str, float]]:
    """The five strongest sinks of each text: its name, position, token, share of heads."""
    rows, found = frame[frame["metric"].str.startswith("sink_positions")], []
    for text in texts:
        top = rows[rows["text"] == text["label"]].nlargest(5, "value")
        for key, share in zip(top["key"].tolist(), top["value"].tolist(), strict=True):
            token = text["tokens"][key].replace("\n", "") if key < len(text["tokens"]) else ""
            found.append((text["name"], key, token, share))
    return found
