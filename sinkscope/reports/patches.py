"""A picture of an image: what each of its patches receives, where it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from pandas import DataFrame

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.reports.drawing import COLOUR_MAP, MARK, PLAIN, SIZE, axis_name, every, finish, rows_of, title_of

#: What the position of a patch is called.
PATCH = re.compile(r"patch (\d+),(\d+)")
#: How strongly the cells cover the image.
COVER = 0.65


def is_grid(tokens: Sequence[str]) -> bool:
    """Tell names of patches in reading order, with those of other positions among them or not."""
    found = [(int(place[1]), int(place[2])) for place in map(PATCH.fullmatch, tokens) if place]
    rows, columns = (max((place[axis] for place in found), default=0) + 1 for axis in (0, 1))
    return len(found) > 1 and found == [(row, column) for row in range(rows) for column in range(columns)]


def grid(
    frame: DataFrame,
    tokens: Sequence[str],
    metric: str = "received_profile",
    *,
    text: str = "all",
    layer: int | None = None,
    image: Any = None,
    ax: Axes | None = None,
) -> Axes:
    """What each patch of an image receives, where it lies; [CLS] and registers stand apart, in the same colours.

    Colours are logarithmic. What uniform attention would give is marked on their bar and written below.

    Args:
        frame: tidy measurements.
        tokens: names of the positions: `patch row,column`, any other of what stands apart.
        metric: a metric with one value per key position, averaged over heads.
        text: an image's label, or `all` for the mean over images of one size.
        layer: one layer; None averages over all.
        image: laid below the cells: an array `[height, width]`, `[height, width, 3]` or `[3, height, width]`; numbers
            that are no bytes, such as normalised pixels, are stretched from their least to their largest.
        ax: where to draw; a new figure without it.

    Raises:
        SinkscopeError: the positions are no patches; no such metric, text or layer; no image.
    """
    if not is_grid(tokens):
        raise SinkscopeError(f"these positions are no patches of an image, but {list(tokens[:4])}: positions() draws them")
    rows = rows_of(frame, metric, text, "key")
    if layer is not None:
        if layer not in set(rows["layer"]):
            raise unknown("layer", str(layer), [str(int(one)) for one in rows["layer"].dropna().unique()])
        rows = rows[rows["layer"] == layer]
    profile = rows.groupby("key")[["value", "null"]].mean()
    if len(profile) != len(tokens):
        raise SinkscopeError(f"{text!r} has {len(profile)} positions, and {len(tokens)} have names: images of several sizes?")
    values, places = profile["value"].to_numpy(float), [PATCH.fullmatch(token) for token in tokens]
    at = np.array([[int(n) for n in place.groups()] for place in places if place])
    cells = np.full(at.max(0) + 1, np.nan)
    cells[tuple(at.T)] = values[[place is not None for place in places]]
    ax = plt.figure(**SIZE).add_subplot() if ax is None else ax
    if image is not None:
        ax.imshow(_pixels(image), extent=(-0.5, cells.shape[1] - 0.5, cells.shape[0] - 0.5, -0.5), zorder=0)
    some = values[values > 0]
    norm = LogNorm(some.min(initial=1.0), some.max(initial=0.0)) if len(some) else None
    drawn = ax.imshow(cells, norm=norm, cmap=COLOUR_MAP, alpha=1.0 if image is None else COVER, zorder=1)
    ax.set_xticks(every(cells.shape[1], 6))
    ax.set_yticks(every(cells.shape[0], 6))
    _apart(ax, drawn, [(t, float(v)) for t, v, place in zip(tokens, values, places, strict=True) if not place], cells.shape)
    bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
    bar.set_label(axis_name(metric), fontsize=8, **PLAIN)
    bar.ax.tick_params(which="both", labelsize=6)
    null = float(profile["null"].mean())
    if np.isfinite(null):
        bar.ax.axhline(null, color=MARK, linewidth=1.5)
    of = "mean of layers" if layer is None else f"layer {layer}"
    return finish(ax, title_of(rows, text, metric), f"{of}; uniform attention: {null:.3g}" if np.isfinite(null) else of, "")


def _apart(ax: Axes, drawn: Any, ahead: Sequence[tuple[str, float]], shape: Sequence[int]) -> None:
    """Draw the positions that are no patches as cells in a column beside the grid, large enough to be seen."""
    side = max(1.0, shape[0] / 8)
    for n, (name, value) in enumerate(ahead):
        left, top = -0.5 - 2 * side, -0.5 + 1.6 * n * side
        ax.add_patch(Rectangle((left, top), side, side, facecolor=drawn.cmap(drawn.norm(value)), edgecolor="none"))
        ax.text(left + side / 2, top + 1.05 * side, name, fontsize=5.5, ha="center", va="top", **PLAIN)
    if ahead:
        ax.set_xlim(-0.5 - 2.4 * side, shape[1] - 0.5)
        ax.set_ylim(max(shape[0] - 0.5, -0.5 + 1.6 * len(ahead) * side), -0.5)
        ax.spines[["left", "top", "bottom", "right"]].set_visible(False)


def _pixels(image: Any) -> np.ndarray:
    """Give an image as matplotlib draws it."""
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    pixels = pixels[0] if pixels.ndim == 4 and len(pixels) == 1 else pixels
    if pixels.ndim == 3 and len(pixels) in (1, 3) and pixels.shape[-1] not in (3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[-1] not in (1, 3, 4)):
        raise SinkscopeError(f"image has the shape {list(pixels.shape)}: give one, [height, width, 3] or [3, height, width]")
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels
    if pixels.dtype != np.uint8:
        low, high = float(pixels.min()), float(pixels.max())
        pixels = (pixels.astype(float) - low) / max(high - low, 1e-12)
    return np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels
