"""Pictures of a report: a tidy frame in, matplotlib Axes out.

Every function takes the frame that `measure` makes and an optional `ax`, and returns the Axes; none shows or
writes anything. Without an `ax` they open a pyplot figure, as wide as a column, so that notebooks display it;
`figures` draws on figures that pyplot never hears of. The null is what uniform attention would give.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.reports.cells import attention as attention
from sinkscope.reports.cells import heatmap as heatmap
from sinkscope.reports.drawing import (
    LINE,
    MARK,
    NULL,
    PLAIN,
    SERIES,
    SIZE,
    WIDE,
    axis_name,
    constant_null,
    finish,
    layer_series,
    legend_below,
    models_of,
    of_key,
    rows_of,
    short,
    title_of,
    without_queries,
)
from sinkscope.reports.patches import grid as grid
from sinkscope.reports.patches import is_grid as is_grid
from sinkscope.reports.words import said

#: What the curves of `progression` are known by on an Axes that they share.
CURVE = "sinkscope-curve"


def progression(frame: DataFrame, metric: str = "sink_mass", *, ax: Axes | None = None, label: str | None = None) -> Axes:
    """A metric by layer, averaged over heads and texts, with the null dashed and the range of the texts.

    On an Axes that has such a curve already, the next one gets another colour, and a dashed null of its own if it differs.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per layer or per head.
        ax: where to draw; a new figure without it.
        label: what the legend calls the curve; by default the model's name.

    Raises:
        SinkscopeError: no such metric; the message lists those there are.
    """
    series, count = layer_series(frame, metric)
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    layers = series.index.to_numpy(float)
    before = sum(line.get_gid() == CURVE for line in ax.lines)
    colour, name = SERIES[before % len(SERIES)], models_of(frame) if label is None else label
    style: dict[str, Any] = {"color": colour, "markersize": 2.5, "linewidth": 1.2, "gid": CURVE}
    ax.plot(layers, series["value"], "o-", label=name, **style)
    if count > 1:
        band: dict[str, Any] = {"color": colour, "alpha": 0.2, "linewidth": 0}
        label = _once(ax, said(f"range of {count} texts", frame.attrs))
        ax.fill_between(layers, series["low"], series["high"], label=label, **band)
    _null(ax, series, colour if before else NULL, f"uniform attention, {name}" if before else "uniform attention")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, f"{metric} by layer, mean of heads", "layer", axis_name(metric), legend=True)


def compare(reports: Mapping[str, Any] | Sequence[Any], metric: str = "sink_mass", *, text: str = "all") -> list[Axes]:
    """Two or more reports in one picture: a heatmap of each, on one scale, and below them their curves by layer.

    Args:
        reports: reports (or their frames), called by their models' names; or a mapping from name to report.
        metric: a metric with one value per head.
        text: a text's label, or `all` for the mean over texts.

    Returns:
        The heatmaps' Axes, and last that of the curves.

    Raises:
        SinkscopeError: fewer than two reports; no such metric or text in one of them.
    """
    named = dict(reports) if isinstance(reports, Mapping) else _names([getattr(r, "frame", r) for r in reports])
    frames = {name: getattr(report, "frame", report) for name, report in named.items()}
    if len(frames) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(frames)}")
    values = [rows_of(frame, metric, text)[["value", "null"]] for frame in frames.values()]
    low, high = min(0.0, *(float(v["value"].min()) for v in values)), max(float(np.nanmax(v.to_numpy(float))) for v in values)
    figure = plt.figure(figsize=(3.5 * len(frames), 5.4), layout="constrained", dpi=SIZE["dpi"])
    grid = figure.add_gridspec(2, len(frames), height_ratios=(1.2, 1))
    axes = [figure.add_subplot(grid[0, i]) for i in range(len(frames))]
    curves = figure.add_subplot(grid[1, :])
    for ax, (name, frame) in zip(axes, frames.items(), strict=True):
        heatmap(frame, metric, text=text, ax=ax, vmin=low, vmax=high)
        ax.set_title(f"{short(name, 40)}\n{ax.get_title().partition(chr(10))[2]}", fontsize=8, **PLAIN)
        progression(frame if text == "all" else frame[frame["text"] == text], metric, ax=curves, label=name)
    return [*axes, curves]


def _names(frames: Sequence[DataFrame]) -> dict[str, DataFrame]:
    """Call frames by their models' names, numbered where these are the same."""
    models = [models_of(frame) for frame in frames]
    return {f"{m} ({i + 1})" if models.count(m) > 1 else m: f for i, (m, f) in enumerate(zip(models, frames, strict=True))}


def _once(ax: Axes, label: str) -> str:
    """Keep a label out of the legend that is there already."""
    return f"_{label}" if label in ax.get_legend_handles_labels()[1] else label


def _null(ax: Axes, series: DataFrame, colour: str = NULL, label: str = "uniform attention") -> None:
    """Draw what uniform attention gives, where that is known and not drawn already."""
    x, null = series.index.to_numpy(float), series["null"].to_numpy(float)
    there = [line.get_xydata() for line in ax.lines if line.get_linestyle() == "--"]
    drawn = any(
        len(xy) == len(x) and np.allclose(xy, np.stack([x, null], 1), equal_nan=True) for xy in map(np.asarray, there)
    )
    if not np.isnan(null).all() and not drawn:
        ax.plot(x, null, "--", color=colour, linewidth=1, label=label)


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
    _null(ax, profile)
    ax.plot(keys[:1], [first], "o", color=MARK, markersize=5, clip_on=False, zorder=3)
    label, at = f"position {keys[0]:.0f}: {first:.3g}", (keys[0], first)
    halo = [withStroke(linewidth=2, foreground="white")]  # it lies on the curve
    style: dict[str, Any] = {"color": MARK, "fontsize": 7, "va": "center", "path_effects": halo}
    ax.annotate(label, at, (7, 0), textcoords="offset points", **style)
    if len(profile) > 64:
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, keys[-1])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_yscale("log", nonpositive="mask")
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, title_of(rows, text, metric), "key position", axis_name(metric), legend=True)


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
    if constant is not None:
        ax.axvline(constant, color=NULL, linestyle="--", label=f"uniform attention: {constant:.3g}")
    elif len(nulls):
        ax.axvspan(nulls.min(), nulls.max(), color=NULL, alpha=0.3, linewidth=0, label="uniform attention")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    return finish(ax, title_of(rows, text, metric, of_key(rows)), axis_name(metric), "heads", legend=True)


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
    legend_below(ax)
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


def figures(
    frame: DataFrame,
    attention: DataFrame | None = None,
    tokens: Sequence[str] | None = None,
    patches: tuple[str, Sequence[str]] | None = None,
) -> dict[str, Figure]:
    """Every picture that there is data for, by file stem; without `sink_mass`, of the first metric of heads.

    Args:
        frame: tidy measurements.
        attention: columns `query, key, value`, for the picture of one short text.
        tokens: that text's tokens, if not in its column `key_token`.
        patches: label of an image, and the names of its positions.
    """
    frame = without_queries(frame)
    over = frame["text"] == "all"  # where a metric of several keys may bear another name
    by_head = frame[over if over.any() else ~over].dropna(subset=["head", "value"])["metric"].unique().tolist()
    metric = "sink_mass" if "sink_mass" in by_head else "".join(by_head[:1])
    draw = {f.__name__: partial(f, frame, metric) for f in (heatmap, progression, distribution) if metric}
    if "position_profile" in frame["metric"].unique():
        draw["positions"] = partial(positions, frame)
    if patches is not None and "received_profile" in frame["metric"].unique():
        draw["grid"] = partial(grid, frame, patches[1], text=patches[0])
    if attention is not None:
        draw["attention"] = partial(_attention, attention, tokens)
    drawn = {stem: Figure(**SIZE) for stem in draw}
    for stem, function in draw.items():
        function(ax=drawn[stem].add_subplot())
    return drawn
