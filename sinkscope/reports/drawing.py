"""What all pictures share: colours and sizes, words in one style, and the rows that a picture is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation
from pandas import DataFrame, isna

from sinkscope.errors import unknown
from sinkscope.reports.intervals import unit_of
from sinkscope.reports.words import said

SIZE: dict[str, Any] = {"figsize": (3.5, 2.8), "layout": "constrained", "dpi": 200}  # a column's width
WIDE = SIZE | {"figsize": (5.2, 3.2)}  # for curves with long names
COLOUR_MAP = "viridis"  # perceptually uniform, and safe for the colour-blind
LINE, MARK, NULL = "#0072B2", "#D55E00", "#595959"  # Okabe and Ito's blue and vermilion; a grey
SERIES = (LINE, "#E69F00", "#009E73", "#CC79A7", "#56B4E9", MARK)  # of several curves on one Axes; theirs as well
PLAIN: dict[str, Any] = {"parse_math": False, "usetex": False}  # a `$` in a token or a label is a dollar
SIGNS = {ord("\n"): "↵", ord("\t"): "⇥"}


def labelled(metric: str) -> str:
    """A metric's name, with its unit if it is a built-in one.

    >>> labelled("sink_mass[key=3]"), labelled("my_metric")
    ('sink_mass[key=3] (share of attention)', 'my_metric')
    """
    unit = unit_of(metric)
    return f"{metric} ({unit})" if unit else metric


def axis_name(metric: str) -> str:
    """What stands at an axis of a picture whose title names the metric: the unit, or the metric where it has none.

    >>> axis_name("sink_rate@0.3"), axis_name("my_metric")
    ('share of heads', 'my_metric')
    """
    return unit_of(metric) or metric


def visible(token: str) -> str:
    r"""A token's text in which nothing hides: line breaks, control and formatting characters become signs.

    >>> visible("a\n"), visible("\x00\u202e")
    ('a↵', '⟨U+0000⟩⟨U+202E⟩')
    """
    return "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in token.translate(SIGNS))


def in_figures(axis: Axis) -> None:
    """Have a logarithmic axis that spans a decade or two name 1, 2 and 5 in plain figures."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def first_key(rows: DataFrame) -> DataFrame:
    """Of the rows that differ in nothing but the key that they look at, those of the first key."""
    return rows.sort_values("key").drop_duplicates(["text", "metric", "layer", "head"]).sort_index()


def tokens_of(attention_frame: DataFrame, axis: str) -> list[str]:
    """The tokens of an attention map's queries or keys; none where it does not name them."""
    name = f"{axis}_token"
    return attention_frame.sort_values(axis).drop_duplicates(axis)[name].tolist() if name in attention_frame else []


def query_by_key(attention_frame: DataFrame, queries: int, keys: int) -> DataFrame:
    """The first queries and keys; blank where nothing goes to a later key: it is not seen."""
    seen = attention_frame[(attention_frame["key"] <= attention_frame["query"]) | (attention_frame["value"] > 0)]
    return seen.pivot(index="query", columns="key", values="value").reindex(range(queries), columns=range(keys))


def layer_series(frame: DataFrame, metric: str) -> tuple[DataFrame, int]:
    """A metric by layer, averaged over heads, and how far the texts disagree.

    Args:
        frame: tidy measurements.
        metric: a metric with one value per layer or per head.

    Returns:
        A frame indexed by layer with `value` and `null`, averaged over texts, and `low` and `high`, the least
        and the largest text (not a t interval: of few texts that leaves what is possible); how many texts there are.

    Raises:
        SinkscopeError: no such metric; the message lists those there are.
    """
    rows = rows_of(frame, metric, needs="layer")
    over = rows["text"] == "all"
    mean = rows[over if over.any() else ~over].groupby("layer")[["value", "null"]].mean()
    texts = rows[~over].pivot_table("value", "layer", "text")
    return mean.assign(low=texts.min(axis=1), high=texts.max(axis=1)), texts.shape[1]


def rows_of(frame: DataFrame, metric: str, text: str | None = None, needs: str = "head") -> DataFrame:
    """Give the rows of a metric (and text) that have a value on an axis.

    Raises:
        SinkscopeError: there are none; the message lists those there are.
    """
    rows = without_queries(frame).dropna(subset=[needs, "value"])
    for column, wanted in (("text", text), ("metric", metric)):
        if wanted is not None:
            if wanted not in (available := rows[column].unique()):
                raise unknown(column, wanted, available)
            rows = rows[rows[column] == wanted]
    return rows if needs == "key" else first_key(rows)


def without_queries(frame: DataFrame) -> DataFrame:
    """Leave out what is reported per query: no picture of heads or keys is made of it."""
    return frame[frame["query"].isna()] if "query" in frame else frame


def constant_null(rows: DataFrame) -> float | None:
    """Give the null if it is the same in all rows."""
    nulls = rows["null"].to_numpy(float)
    return float(nulls[0]) if np.allclose(nulls, nulls[0], rtol=1e-9) else None  # NaN is close to nothing


def finish(ax: Axes, title: str, xlabel: str, ylabel: str, *, legend: bool = False) -> Axes:
    """Give a picture its words, in the sizes that all have."""
    ax.set_title(title, fontsize=8, **PLAIN)
    ax.set_xlabel(xlabel, fontsize=8, **PLAIN)
    ax.set_ylabel(ylabel, fontsize=8, **PLAIN)
    ax.tick_params(labelsize=7)
    if legend:
        ax.spines[["top", "right"]].set_visible(False)
        legend_below(ax)
    return ax


def legend_below(ax: Axes) -> None:
    """Put the legend below the axis' name, where it covers no curve and no band."""
    below = ax.transAxes + ScaledTranslation(0, -26 / 72, ax.figure.dpi_scale_trans)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=2, frameon=False, fontsize=7)


def title_of(rows: DataFrame, text: str, metric: str, of: str = "") -> str:
    """Say which model a picture is of, and what it shows of which text."""
    return f"{models_of(rows)}\n{metric}{of}, {said('mean of texts', rows.attrs) if text == 'all' else short(text, 24)}"


def of_key(rows: DataFrame) -> str:
    """Say which key a metric looks at, if it is one."""
    key = rows["key"].iloc[0]
    return "" if isna(key) else f" of key {key}"


def models_of(rows: DataFrame) -> str:
    """Name the model that rows are of."""
    return short(", ".join(map(str, rows["model"].dropna().unique())), 40) if "model" in rows else ""


def every(count: int, most: int) -> list[int]:
    """Give at most about `most` ticks, at round steps."""
    step = next(n * 10**power for power in range(9) for n in (1, 2, 5) if count <= most * n * 10**power)
    return list(range(0, count, step))


def short(token: str, most: int = 10) -> str:
    """Cut a token to what fits beside an axis."""
    label = visible(token[: most + 1])
    return label if len(label) <= most else label[: most - 1] + "…"
