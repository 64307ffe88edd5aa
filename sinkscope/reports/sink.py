"""SinkReport: what `measure` found, as tidy tables, pictures and files."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics.across import t_interval
from sinkscope.metrics.base import AcrossTexts, AnyMetric
from sinkscope.metrics.values import Value, rows_of
from sinkscope.reports.words import sentences
from sinkscope.results import ALL, Tally, TextResult

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Columns of `.frame` and measurements.csv, and of `.summary()` and summary.csv.
COLUMNS = ["model", "text", "metric", "layer", "head", "key", "value", "std_error", "null", "tokens"]
#: A column more where a metric is reported per query, after `key`.
QUERY = "query"
SUMMARY_COLUMNS = ["text", "metric", "value", "std_error", "null"]


@dataclass(frozen=True, eq=False)
class SinkReport:
    """Attention-sink statistics of one model on some texts.

    Attributes:
        frame: tidy, the finest rows: one per (text, metric, layer, head, key) as far as these apply, with the null beside
            each value. `text` is a label, or `all` for the mean over texts with its standard error.
        totals: one row per model-level number; see :meth:`summary`.
        about: model, versions, engine and why, dtype, BOS decision, texts and their tokens, arguments.
        attention: `query, key, value`: attention of one short text averaged over layers and heads, where it was asked for.
    """

    frame: pd.DataFrame
    totals: pd.DataFrame
    about: dict[str, Any] = field(repr=False)
    attention: pd.DataFrame | None = field(default=None, repr=False)

    @classmethod
    def assemble(
        cls, tally: Tally, asked: Iterable[AnyMetric], about: dict[str, Any], results: Sequence[TextResult] = ()
    ) -> SinkReport:
        """Build the tables.

        Args:
            tally: of all texts.
            asked: the metrics.
            about: gets the texts added.
            results: the texts whose finest rows go into the frame: all of them, or none.
        """
        layers = list(about["layers"])
        pieces = [rows_of(v, layers, r.sequence.label, len(r.sequence)) for r in results for v in r.values]
        totals = [(label, name, value, np.nan, null) for label, name, value, null in tally.totals]
        tokens = sum(n for _, n in tally.texts)
        for g in tally.groups.values():
            mean = Value(g.name, g.tag, g.key, g.axes, g.value.present, g.null.present, None, None)
            pieces.append(rows_of(mean, layers, ALL, tokens, g.value.std_error))
            if g.total is not None and g.total_null is not None:
                value, error, null = (float(x) for x in (g.total.present, g.total.std_error, g.total_null.present))
                totals.append((ALL, g.name + g.tag, value, error, null))
        summary = pd.DataFrame(totals, columns=SUMMARY_COLUMNS)
        summary = pd.concat([summary, _across(summary, asked)], ignore_index=True)
        frame = pd.concat(pieces, ignore_index=True) if pieces else pd.DataFrame(columns=COLUMNS[1:])
        frame.insert(0, "model", about["model"])
        texts: list[dict[str, Any]] = [{"label": label, "n_tokens": n} for label, n in tally.texts]
        for text, r in zip(texts, results, strict=False):
            text["tokens"] = list(r.sequence.strings)
        said = sentences(summary[summary["text"] == ALL], about["arguments"]["key"])
        columns = [c for c in (*COLUMNS[:6], QUERY, *COLUMNS[6:]) if c in frame or c != QUERY]
        return cls(frame[columns], summary, about | {"texts": texts, "sentences": said})

    @property
    def texts(self) -> list[str]:
        """Labels of the texts."""
        return [t["label"] for t in self.about["texts"]]

    @property
    def per_text(self) -> bool:
        """Whether the frame has rows of single texts, beside those of all."""
        return all("tokens" in t for t in self.about["texts"])

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics in the frame."""
        return list(self.frame["metric"].unique())

    def summary(self, text: str | None = None) -> pd.DataFrame:
        """Give the model-level numbers: columns `text, metric, value, std_error, null`.

        Args:
            text: only this text's rows (`"all"` for the means over texts).

        Raises:
            SinkscopeError: no such text.
        """
        if text is None:
            return self.totals.copy()
        return self.totals[self.totals["text"] == self._text(text)].reset_index(drop=True)

    def intervals(self) -> pd.DataFrame:
        """Give the summary over all texts with the 95% interval of each mean: columns `low, high` (Student's t)."""
        rows = self.summary(ALL)
        counts = self.totals[self.totals["text"] != ALL].groupby("metric")["value"].count()  # of texts that have the number
        given = zip(rows["metric"], rows["value"], rows["std_error"], strict=True)
        bounds = [t_interval(value, error, int(counts.get(name, 0))) for name, value, error in given]
        return rows.assign(low=[b[0] for b in bounds], high=[b[1] for b in bounds])

    def top(self, metric: str = "sink_mass", n: int = 10, *, text: str = ALL) -> pd.DataFrame:
        """Give the n rows where a metric is largest: the strongest heads, or positions.

        Raises:
            SinkscopeError: no such metric or text in this report.
        """
        rows = self.frame[(self.frame["metric"] == self._metric(metric)) & (self.frame["text"] == self._fine(text))]
        return rows.nlargest(n, "value").reset_index(drop=True)

    def compare(self, other: SinkReport) -> pd.DataFrame:
        """Put another report's summary beside this one.

        Returns:
            One row per metric in both: `metric, value, std_error, null`, the same of the other, and `difference`
            (other minus this). Standard errors are each report's own, across its texts.

        Raises:
            SinkscopeError: the other is no SinkReport.
        """
        if not isinstance(other, SinkReport):
            raise SinkscopeError(f"a SinkReport compares with a SinkReport, not with a {type(other).__name__}")
        columns = ["metric", "value", "std_error", "null"]
        both = self.summary(ALL)[columns].merge(other.summary(ALL)[columns], on="metric", suffixes=("", "_other"))
        return both.assign(difference=both["value_other"] - both["value"])

    def sink_positions(self, *, text: str | None = None) -> pd.DataFrame:
        """List the positions that act as sinks, with their tokens: columns `text, key, token, share_of_heads`.

        Raises:
            SinkscopeError: `sink_positions` was not measured, or no such text.
        """
        named = [m for m in self.about["arguments"]["metrics"] if m.partition("@")[0] == "sink_positions"]
        if not named:
            raise unknown("metric in this report", "sink_positions", self.metrics)
        if text == ALL:
            raise SinkscopeError("sink positions are a text's: leave text out for those of every text")
        rows = self.frame[(self.frame["metric"] == named[0]) & (self.frame["text"] != ALL)]
        if text is not None or not self.per_text:
            rows = rows[rows["text"] == self._fine(text or self.texts[0])]
        tokens = {t["label"]: t["tokens"] for t in self.about["texts"]}
        found = [tokens[label][key] for label, key in zip(rows["text"], rows["key"], strict=True)]
        listed: pd.DataFrame = rows[["text", "key"]].assign(token=found, share_of_heads=rows["value"])
        return listed.sort_values(["text", "share_of_heads"], ascending=[True, False]).reset_index(drop=True)

    def to_xarray(self, column: str = "value") -> xr.Dataset:
        """Give the frame as an xarray Dataset: a variable per metric, over those of `text, layer, head, key` that it has.

        Args:
            column: `"value"`, `"null"` or `"std_error"`.

        Raises:
            SinkscopeError: xarray is not installed, or there is no such column.
        """
        try:
            import xarray as xr
        except ImportError:
            raise SinkscopeError("to_xarray needs xarray: pip install xarray") from None
        if column not in ("value", "null", "std_error"):
            raise unknown("column", column, ["value", "null", "std_error"])
        variables = []
        for name, rows in self.frame.groupby("metric", sort=False):
            axes = [a for a in ("text", "layer", "head", QUERY) if a in rows and rows[a].notna().all()]
            if rows.duplicated(axes).any():
                axes.append("key")
            index = rows[axes].astype({a: int for a in axes if a != "text"})
            variables.append(index.assign(**{str(name): rows[column]}).set_index(axes).to_xarray())
        about = {name: str(self.about[name]) for name in ("model", "engine", "dtype", "bos")}
        return xr.merge(variables, join="outer", compat="no_conflicts").assign_attrs(about)

    # Pictures: each gives matplotlib Axes, to be shown or saved by the caller.

    def heatmap(self, metric: str = "sink_mass", *, text: str = ALL, ax: Axes | None = None) -> Axes:
        """Draw a metric by layer and head."""
        from sinkscope.reports import plots

        return plots.heatmap(self.frame, metric, text=text, ax=ax)

    def progression(self, metric: str = "sink_mass", *, ax: Axes | None = None) -> Axes:
        """Draw a metric over layers, with its null and the band across texts."""
        from sinkscope.reports import plots

        return plots.progression(self.frame, metric, ax=ax)

    def positions(self, metric: str = "position_profile", *, text: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw where attention lands over positions, position 0 marked, uniform attention beside it."""
        from sinkscope.reports import plots

        return plots.positions(self.frame, text=text, metric=metric, ax=ax)

    def distribution(self, metric: str = "sink_mass", *, text: str = ALL, ax: Axes | None = None) -> Axes:
        """Draw how a metric is distributed over heads."""
        from sinkscope.reports import plots

        return plots.distribution(self.frame, metric, text=text, ax=ax)

    def attention_heatmap(self, *, ax: Axes | None = None) -> Axes:
        """Draw who looks at whom in the one short text whose attention was kept.

        Raises:
            SinkscopeError: none was kept; says how to get one.
        """
        from sinkscope.reports import plots

        if self.attention is None:
            raise SinkscopeError(
                "this report keeps no attention map: plots.attention(ss.attention_map(model, text)) draws one; --out adds one"
            )
        return plots.attention(self.attention, ax=ax)

    def figures(self) -> dict[str, Figure]:
        """Draw everything that this report can be drawn as: file stem -> matplotlib Figure."""
        from sinkscope.reports import plots

        return plots.figures(self.frame, self.attention)

    # Files.

    def page(self) -> str:
        """Give the self-contained HTML page."""
        from sinkscope.reports import page

        return page.render(self.frame, self.totals, self.about, self.attention)

    def save(self, directory: str | Path) -> Path:
        """Write tables, pictures and the page into a directory.

        Args:
            directory: made if need be; files of an earlier report in it are replaced.

        Returns:
            The directory: `measurements.csv`, `summary.csv`, both as `.parquet`, `summary.json`, the pictures as PNG and
            `report.html`.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from sinkscope.reports import files

        tables = {"measurements": self.frame, "summary": self.summary()}
        if self.attention is not None:
            tables["attention"] = self.attention
        files.check_writable(directory)
        return files.save(directory, tables, self.figures(), self.page(), self.about)

    def _repr_html_(self) -> str:
        shown = self.intervals().set_index("metric")[["value", "low", "high", "null"]]
        return f"<p>{html.escape(str(self))}</p>{shown.to_html(float_format='{:.3f}'.format, na_rep='', escape=True)}"

    def __str__(self) -> str:
        """Say in one line what this is."""
        n = len(self.texts)
        return f"SinkReport: {self.about['model']}, {n} text{'s' * (n != 1)}, engine {self.about['engine']}"

    def _metric(self, name: str) -> str:
        if name not in self.metrics:
            raise unknown("metric in this report", name, self.metrics)
        return name

    def _fine(self, label: str) -> str:
        """Take a text that the frame has rows of."""
        if label != ALL and not self.per_text:
            raise SinkscopeError(
                f"this report keeps no rows of single texts ({len(self.texts)} texts): measure(..., per_text=True) keeps them"
            )
        return self._text(label)

    def _text(self, label: str) -> str:
        if label != ALL and label not in self.texts:
            raise unknown("text in this report", label, [ALL, *self.texts])
        return label


def _across(summary: pd.DataFrame, asked: Iterable[AnyMetric]) -> pd.DataFrame:
    """Add the rows of metrics about the variation from text to text."""
    rows = []
    for m in asked:
        if isinstance(m, AcrossTexts):
            names = [n for n in summary["metric"].unique() if n == m.of or n.startswith(f"{m.of}[")]
            for name in names:
                values = summary[(summary["metric"] == name) & (summary["text"] != ALL)]["value"].to_numpy()
                parts = m.fn(values)
                rows += [(ALL, f"{m.name}@{part}{name[len(m.of) :]}", v, np.nan, np.nan) for part, v in parts.items()]
    return pd.DataFrame(rows, columns=SUMMARY_COLUMNS).astype({"value": float, "std_error": float, "null": float})
