"""The picture of a sweep: a map of layers and heads in colours centred on zero, or a curve over layers or positions."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.reports.drawing import LINE, NULL, SIZE, WIDE, every, finish

#: Blue for what helps, red for what costs; zero is white.
DIVERGING = "RdBu_r"
VALUES = ("delta_loss", "kl")
UNIT = "nats per token"
#: Colours are logarithmic beyond a share of the largest cost where all but a tenth of the places stand below that.
FEW = 0.1


def costs(rows: DataFrame, value: str, *, placebo: bool, title: str, ax: Axes | None = None) -> Axes:
    """Draw what an edit costs at each place.

    Args:
        rows: one per place; see :meth:`SweepReport.summary`.
        value: `"delta_loss"` or `"kl"`.
        placebo: draw the placebo's numbers, in the colours of the edit's.
        title: stands above.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: another value, or no placebo was run.
    """
    if value not in VALUES:
        raise unknown("value", value, VALUES)
    name = f"placebo_{value}" if placebo else value
    if name not in rows:
        raise SinkscopeError("no placebo was run: sweep(..., placebo=True)")
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    title = f"{title}\nthe placebo's" if placebo else title
    if "head" in rows:
        return _map(rows, name, value, title, ax)
    return _curve(rows, name, title, ax)


def beside(rows: DataFrame, title: str) -> Figure:
    """Draw the edit's map and its placebo's in one picture; a curve has both on one Axes."""
    two = "head" in rows and "placebo_delta_loss" in rows
    size = SIZE | {"figsize": (7.0, 2.8)} if two else SIZE if "head" in rows else WIDE
    figure = Figure(**size)
    costs(rows, "delta_loss", placebo=False, title=title, ax=figure.add_subplot(1, 1 + two, 1))
    if two:
        costs(rows, "delta_loss", placebo=True, title=title, ax=figure.add_subplot(1, 2, 2))
    return figure


def norm_of(values: Any) -> Normalize:
    """Give colours that are symmetric around zero, logarithmic where few places cost much and the others would be white.

    >>> norm_of([-1.0, 0.5, 0.8]).vmin, type(norm_of([1.0] + [0.01] * 20)).__name__
    (-1.0, 'SymLogNorm')
    """
    size = np.abs(np.asarray(values, float))
    size = size[np.isfinite(size)]
    most = float(size.max(initial=0.0)) or 1.0
    usual = float(np.quantile(size, 1 - FEW)) if len(size) else most
    if usual >= FEW * most:
        return Normalize(-most, most)
    return SymLogNorm(max(usual, most / 1000), vmin=-most, vmax=most)


def diverging(ax: Axes, cells: DataFrame, norm: Normalize, unit: str) -> None:
    """Draw cells in colours that are centred on zero, with their bar."""
    table = np.ma.masked_invalid(cells.to_numpy(float, na_value=np.nan))
    image = ax.imshow(table, DIVERGING, norm=norm, aspect="auto", interpolation="nearest")
    bar = ax.figure.colorbar(image, ax=ax)
    bar.ax.tick_params(labelsize=7)
    bar.set_label(unit, fontsize=7)


def _map(rows: DataFrame, name: str, value: str, title: str, ax: Axes) -> Axes:
    cells = rows.pivot(index="layer", columns="head", values=name).sort_index().sort_index(axis=1)
    diverging(ax, cells, norm_of(rows[value]), f"{'KL' if value == 'kl' else 'difference in loss'}, {UNIT}")
    for of, labels in (("y", cells.index), ("x", cells.columns)):
        at = every(len(labels), 16 if of == "y" else 10)
        ax.set(**{f"{of}ticks": at, f"{of}ticklabels": [str(labels[i]) for i in at]})
    return finish(ax, title, "head", "layer")


def _curve(rows: DataFrame, name: str, title: str, ax: Axes) -> Axes:
    axis = "layer" if "layer" in rows else "position"
    x, y = rows[axis].to_numpy(float), rows[name].to_numpy(float)
    ax.axhline(0, color=NULL, linewidth=0.8)
    ax.plot(x, y, "o-", color=LINE, markersize=2.5, linewidth=1.2, label="the edit" if name in VALUES else "its placebo")
    prefix = "placebo_" if name.startswith("placebo_") else ""
    if name.endswith("delta_loss") and f"{prefix}low" in rows:
        low, high = (rows[f"{prefix}{side}"].to_numpy(float) for side in ("low", "high"))
        ax.fill_between(x, low, high, color=LINE, alpha=0.2, linewidth=0, label="95% interval")
    if f"placebo_{name}" in rows:
        ax.plot(x, rows[f"placebo_{name}"].to_numpy(float), "--", color=NULL, linewidth=1, label="its placebo")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    of = "KL" if name.endswith("kl") else "difference in loss"
    return finish(ax, title, axis, f"{of} ({UNIT})", legend=True)
