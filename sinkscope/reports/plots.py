"""Pictures of a report: a tidy frame in, matplotlib Axes out.

Every function takes the frame that `measure` makes and an optional `ax`, and returns the Axes; none shows or
writes anything. Without an `ax` they open a pyplot figure, as wide as a column, so that notebooks display it;
`figures` draws on figures that pyplot never hears of. The null is what uniform attention would give.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.reports.drawing import (
    COLOUR_MAP,
    LINE,
    MARK,
    NULL,
    PLAIN,
    SIZE,
    WIDE,
    constant_null,
    every,
    finish,
    labelled,
    layer_series,
    null_line,
    query_by_key,
    rows_of,
    short,
    title_of,
    without_queries,
)


def heatmap(frame: DataFrame, metric: str = "sink_mass", *, text: str = "all", ax: Axes | None = None) -> Axes:
    """One coloured cell per layer (row, the first on top) and head (column); a constant null is on the bar.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per head; the colour bar names its unit.
        text: a text's label, or `all` for the mean over texts.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such metric or text; the message lists those there are.
    """
    rows = rows_of(frame, metric, text)
    cells = rows.pivot(index="layer", columns="head", values="value").sort_index().sort_index(axis=1)
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    _cells(ax, cells, labelled(metric), constant_null(rows))
    ticks = every(len(cells), 16), every(cells.shape[1], 10)
    ax.set_yticks(ticks[0], labels=[str(cells.index[i]) for i in ticks[0]])
    ax.set_xticks(ticks[1], labels=[str(cells.columns[i]) for i in ticks[1]])
    return finish(ax, title_of(metric, text, rows["key"].iloc[0]), "head", "layer")


def progression(frame: DataFrame, metric: str = "sink_mass", *, ax: Axes | None = None) -> Axes:
    """A metric by layer, averaged over heads and texts, with the null dashed and the range of the texts.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per layer or per head.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such metric; the message lists those there are.
    """
    series, count = layer_series(frame, metric)
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    layers = series.index.to_numpy(float)
    ax.plot(layers, series["value"], "o-", color=LINE, markersize=2.5, linewidth=1.2, label="mean of heads")
    if count > 1:
        band: dict[str, Any] = {"color": LINE, "alpha": 0.2, "linewidth": 0, "label": f"range of {count} texts"}
        ax.fill_between(layers, series["low"], series["high"], **band)
    null_line(ax, series)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, f"{metric} by layer", "layer", labelled(metric), legend=True)


def positions(frame: DataFrame, *, text: str | None = None, metric: str = "position_profile", ax: Axes | None = None) -> Axes:
    """How attention spreads over key positions, mean of layers; both axes are logarithmic above 64 positions.

    Args:
        frame: tidy measurements.
        text: a text's label; by default `all` if the texts are equally long, else the longest one.
        metric: a metric with one value per key position.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such metric or text; the message lists those there are.
    """
    rows = rows_of(frame, metric, needs="key")
    if text is None:  # texts of unequal length have no common profile
        last = rows.groupby("text")["key"].max().sort_index(key=lambda labels: labels != "all")
        text = str(last.index[0] if last.nunique() == 1 else last.drop("all", errors="ignore").idxmax())
    profile = rows_of(frame, metric, text, "key").groupby("key")[["value", "null"]].mean()
    keys, first = profile.index.to_numpy(float), float(profile["value"].iloc[0])
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    ax.plot(keys, profile["value"], color=LINE, linewidth=0.9, label="mean of layers")
    null_line(ax, profile)
    ax.plot(keys[:1], [first], "o", color=MARK, markersize=5, clip_on=False, zorder=3)
    label, at = f"position {keys[0]:.0f}: {first:.3g}", (keys[0], first)
    ax.annotate(label, at, (7, 0), textcoords="offset points", color=MARK, fontsize=7, va="center")
    if len(profile) > 64:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, keys[-1])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_yscale("log", nonpositive="mask")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, title_of(metric, text), "key position", labelled(metric), legend=True)


def distribution(frame: DataFrame, metric: str = "sink_mass", *, text: str = "all", ax: Axes | None = None) -> Axes:
    """How many heads have which value, with the null dashed, or as a span where layers differ in it.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per head.
        text: a text's label, or `all` for the mean over texts.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such metric or text; the message lists those there are.
    """
    rows = rows_of(frame, metric, text)
    nulls, constant = rows["null"].dropna(), constant_null(rows)
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    ax.hist(rows["value"], bins=20, color=LINE, alpha=0.5, edgecolor="white", label=f"{len(rows)} heads")
    ax.margins(y=0.3)  # room for the legend
    if constant is not None:
        ax.axvline(constant, color=NULL, linestyle="--", label=f"uniform attention: {constant:.3g}")
    elif len(nulls):
        ax.axvspan(nulls.min(), nulls.max(), color=NULL, alpha=0.3, linewidth=0, label="uniform attention")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, title_of(metric, text, rows["key"].iloc[0]), labelled(metric), "heads", legend=True)


def attention(attention_frame: DataFrame, tokens: Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """Who looks at whom in one short text: a row per query, a column per key; at most 20 tokens are named.

    Args:
        attention_frame: columns `query, key, value` (share of the query's attention); later keys that get none stay blank.
        tokens: the text of each token; spaces and control characters are made visible, long ones are cut. None takes the
            column `key_token`, which :func:`sinkscope.attention_map` gives.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: a position lies outside `tokens`.
    """
    last = int(attention_frame[["query", "key"]].to_numpy().max())
    if tokens is None:
        tokens = attention_frame.sort_values("key").drop_duplicates("key")["key_token"].tolist()
    if last >= len(tokens):
        raise SinkscopeError(f"attention reaches position {last}, but there are {len(tokens)} tokens")
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    _cells(ax, query_by_key(attention_frame, len(tokens)), "share of a query's attention", None)
    ticks = every(len(tokens), 20)
    labels = [short(tokens[i].replace(" ", "·")) for i in ticks]
    ax.set_xticks(ticks, labels=labels, rotation=90, **PLAIN)
    ax.set_yticks(ticks, labels=labels, **PLAIN)
    return finish(ax, "attention, mean of heads and layers", "key", "query")


def loss_curve(curves: DataFrame, *, text: str | None = None, ax: Axes | None = None) -> Axes:
    """Loss by position, a running mean for each intervention; the unedited run is grey and dashed.

    Args:
        curves: columns `text, intervention, position, loss` (nats per token).
        text: a text's label; by default the longest one.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such text; the message lists those there are.
    """
    labels = curves["text"].unique()
    if text is None:
        text = str(curves.groupby("text")["position"].max().idxmax())
    if text not in labels:
        raise unknown("text", text, labels)
    rows = curves[curves["text"] == text]
    size = max(1, rows["position"].nunique() // 32)
    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    for name, run in rows.groupby("intervention", sort=False):
        loss = run["loss"].rolling(size, center=True, min_periods=1).mean()
        style: dict[str, Any] = {"color": NULL, "linestyle": "--", "zorder": 3} if name == "none" else {}
        ax.plot(run["position"], loss, linewidth=1, label=short(str(name), 48), **style)
    ylabel = f"loss (nats), mean of {size} tokens" if size > 1 else "loss (nats)"
    finish(ax, f"loss by position, {short(text, 24)}", "position", ylabel)
    ax.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)  # it would cover curves
    return ax


def estimates(table: DataFrame, quantity: str, *, unit: str = "", log: bool = False, ax: Axes | None = None) -> Axes:
    """One quantity of a study: a dot with its 95% interval per case, chance as a bar, published figures as hollow dots.

    Args:
        table: columns `model, case, quantity, value, low, high, null, evidence`; see `sinkscope.studies`.
        quantity: which rows.
        unit: of the quantity, for the axis.
        log: draw it on a logarithmic axis.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: no such quantity; the message lists those there are.
    """
    if quantity not in set(table["quantity"]):
        raise unknown("quantity", quantity, table["quantity"].unique())
    rows = table[(table["quantity"] == quantity) & table["value"].notna()]
    ours, theirs = rows[rows["evidence"] == "measured"], rows[rows["evidence"] != "measured"]
    several = ours["model"].nunique() > 1
    names = [f"{m}, {case}" if several else str(case) for m, case in zip(ours["model"], ours["case"], strict=True)]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = [place[name] for name in names]
    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    below, above = (abs(ours["value"] - ours[end]).fillna(0).to_numpy(float) for end in ("low", "high"))
    who = "measured" if several else str(ours["model"].iloc[0])
    style: dict[str, Any] = {"fmt": "o", "color": LINE, "markersize": 4, "capsize": 2, "zorder": 3}
    ax.errorbar(ours["value"], at, xerr=(below, above), label=f"{short(who, 24)}, 95% interval", **style)
    if ours["null"].notna().any():
        ax.plot(ours["null"], at, "|", color=NULL, markersize=12, markeredgewidth=1.5, label="chance")
    shown = theirs[theirs["case"].isin(place)]
    for marker, (model, of) in zip("sD^vPX<>*p", shown.groupby("model", sort=False), strict=False):
        y = [place[case] - 0.22 for case in of["case"]]
        ax.plot(of["value"], y, marker, color=MARK, markersize=3.5, fillstyle="none", label=f"{model} (published)")
    ax.set_yticks(range(len(place)), labels=[short(name, 34) for name in place], **PLAIN)
    ax.set_ylim(len(place) - 0.4, -0.6)
    ax.grid(axis="x", alpha=0.3)
    if log:
        ax.set_xscale("log")
    finish(ax, "", f"{quantity} ({unit})" if unit else quantity, "")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.4, -0.2), ncols=2, frameon=False)
    return ax


_attention = attention  # `figures` has an argument of that name


def figures(frame: DataFrame, attention: DataFrame | None = None, tokens: Sequence[str] | None = None) -> dict[str, Figure]:
    """Every picture that there is data for, by file stem; without `sink_mass`, of the first metric of heads.

    Args:
        frame: tidy measurements.
        attention: columns `query, key, value`, for the picture of one short text.
        tokens: that text's tokens, if not in its column `key_token`.
    """
    frame = without_queries(frame)
    over = frame["text"] == "all"  # where a metric of several keys may bear another name
    by_head = frame[over if over.any() else ~over].dropna(subset=["head", "value"])["metric"].unique().tolist()
    metric = "sink_mass" if "sink_mass" in by_head else "".join(by_head[:1])
    draw = {f.__name__: partial(f, frame, metric) for f in (heatmap, progression, distribution) if metric}
    if "position_profile" in frame["metric"].unique():
        draw["positions"] = partial(positions, frame)
    if attention is not None:
        draw["attention"] = partial(_attention, attention, tokens)
    drawn = {stem: Figure(**SIZE) for stem in draw}
    for stem, function in draw.items():
        function(ax=drawn[stem].add_subplot())
    return drawn


def _cells(ax: Axes, cells: DataFrame, label: str, null: float | None) -> None:
    values = np.ma.masked_invalid(cells.to_numpy(float, na_value=np.nan))
    low, high = min(0.0, float(values.min())), max(float(values.max()), null or 0.0)
    image = ax.imshow(values, COLOUR_MAP, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.set_label(label, fontsize=8, **PLAIN)
    if null is not None:  # among the ticks, in place of those that it would cover
        ticks = [t for t in bar.get_ticks() if low <= t <= high and abs(t - null) > (high - low) / 16]
        bar.set_ticks([*ticks, null], labels=[*(f"{tick:.3g}" for tick in ticks), f"null {null:.3g}"])
        bar.ax.axhline(null, color=MARK, linewidth=1.5)
    bar.ax.tick_params(labelsize=7)
