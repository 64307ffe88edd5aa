"""Pictures made of coloured cells: layers by heads, queries by keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from pandas import DataFrame

from sinkscope.errors import SinkscopeError
from sinkscope.reports.costs import diverging, norm_of
from sinkscope.reports.drawing import (
    COLOUR_MAP,
    MARK,
    PLAIN,
    SIZE,
    axis_name,
    constant_null,
    every,
    finish,
    of_key,
    query_by_key,
    rows_of,
    short,
    title_of,
    tokens_of,
)


def heatmap(
    frame: DataFrame,
    metric: str = "sink_mass",
    *,
    text: str = "all",
    ax: Axes | None = None,
    vmin: float | None = None,
    vmax: float | None = None,
) -> Axes:
    """One coloured cell per layer (row, the first on top) and head (column); a constant null is on the bar.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per head; its unit stands below the colour bar.
        text: a text's label, or `all` for the mean over texts.
        ax: where to draw; a new figure without it.
        vmin: where the colours begin, so that several pictures have one scale; by default at 0 or the least value.
        vmax: where they end; by default at the largest value.

    Raises:
        SinkscopeError: no such metric or text; the message lists those there are.
    """
    rows = rows_of(frame, metric, text)
    cells = rows.pivot(index="layer", columns="head", values="value").sort_index().sort_index(axis=1)
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    if metric.startswith("cost["):  # of a sweep: it may be below zero
        diverging(ax, cells, norm_of(cells.to_numpy(float, na_value=np.nan)), axis_name(metric))
    else:
        _cells(ax, cells, axis_name(metric), constant_null(rows), vmin, vmax)
    ticks = every(len(cells), 16), every(cells.shape[1], 10)
    ax.set_yticks(ticks[0], labels=[str(cells.index[i]) for i in ticks[0]])
    ax.set_xticks(ticks[1], labels=[str(cells.columns[i]) for i in ticks[1]])
    return finish(ax, title_of(rows, text, metric, of_key(rows)), "head", "layer")


def attention(attention_frame: DataFrame, tokens: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Who looks at whom in one short text: a row per query, a column per key; at most 20 tokens are named.

    Args:
        attention_frame: columns `query, key, value` (share of the query's attention); later keys that get none stay blank.
        tokens: the text of each token; spaces and control characters are made visible, long ones are cut. None takes the
            column `key_token`, which :func:`sinkscope.attention_map` gives, beside `attrs` that say of which layer and head.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: a position lies outside `tokens`.
    """
    of_queries = tokens
    if tokens is None:
        tokens, of_queries = (tokens_of(attention_frame, axis) for axis in ("key", "query"))
    of_queries = of_queries or tokens
    for axis, known in (("key", tokens), ("query", of_queries)):
        last = int(attention_frame[axis].max())
        if last >= len(known):
            raise SinkscopeError(f"attention reaches position {last}, but there are {len(known)} tokens")
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    _cells(ax, query_by_key(attention_frame, len(of_queries), len(tokens)), "share of attention", None)
    ax.set_xticks(*_named(tokens), rotation=90, **PLAIN)
    ax.set_yticks(*_named(of_queries), **PLAIN)
    return finish(ax, _of_layer_and_head(attention_frame.attrs), "key", "query")


def _named(tokens: Sequence[str]) -> tuple[list[int], list[str]]:
    """Choose the tokens that are named, and give their names."""
    ticks = list(every(len(tokens), 20))
    return ticks, [short(tokens[i].replace(" ", "·")) for i in ticks]


def _of_layer_and_head(of: Mapping[Any, Any]) -> str:
    """Say what an attention map is of, as far as it says so itself."""
    if "layer" not in of:
        return "attention"
    layer, head = of["layer"], of.get("head")
    if layer is None:
        where = "mean of heads and layers" if head is None else f"head {head}, mean of layers"
    else:
        where = f"layer {layer}, " + ("mean of heads" if head is None else f"head {head}")
    name = of.get("model")
    return f"{short(str(name), 40)}\nattention, {where}" if name else f"attention, {where}"


def _cells(
    ax: Axes, cells: DataFrame, unit: str, null: float | None, vmin: float | None = None, vmax: float | None = None
) -> None:
    values = np.ma.masked_invalid(cells.to_numpy(float, na_value=np.nan))
    low = min(0.0, float(values.min())) if vmin is None else vmin
    high = max(float(values.max()), null or 0.0) if vmax is None else vmax
    image = ax.imshow(values, COLOUR_MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax)
    # Below, not beside: there it would stand at the next picture's y axis.
    place: dict[str, Any] = {"transform": bar.ax.transAxes, "fontsize": 7, "va": "top"}
    bar.ax.text(0, -0.03, fill(unit, 12), **place, **PLAIN)
    if null is not None and low <= null <= high:  # among the ticks, in place of those that it would cover
        ticks = [t for t in bar.get_ticks() if low <= t <= high and abs(t - null) > (high - low) / 16]
        bar.set_ticks([*ticks, null], labels=[*(f"{tick:.3g}" for tick in ticks), f"null {null:.3g}"])
        bar.ax.axhline(null, color=MARK, linewidth=1.5)
    bar.ax.tick_params(labelsize=7)
