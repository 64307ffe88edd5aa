"""SinkReport: what `measure` found, as tidy tables, pictures and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics import BUILT_IN
from sinkscope.metrics.base import AcrossTexts, AnyMetric
from sinkscope.reports import intervals, notes
from sinkscope.reports.compare import compared
from sinkscope.reports.paged import Paged
from sinkscope.reports.pictures import Pictures
from sinkscope.reports.shown import Shown
from sinkscope.reports.tables import COLUMNS as COLUMNS
from sinkscope.reports.tables import SUMMARY_COLUMNS as SUMMARY_COLUMNS
from sinkscope.reports.tables import tables
from sinkscope.reports.words import said, sentences
from sinkscope.results import ALL, Tally, TextResult

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class SinkReport(Paged, Pictures):
    """Attention-sink statistics of one model on some texts.

    Attributes:
        frame: tidy, the finest rows: one per (text, metric, layer, head, key) as far as these apply, with the null beside
            each value. `text` is a label, or `all` for the mean over texts with its standard error.
        totals: one row per model-level number; see :meth:`summary`.
        about: model, versions, engine and why, dtype, BOS decision, texts and their tokens, arguments; `notes`: what to know
            before reading the numbers, such as texts of unequal length and metrics without a number.
        attention: `query, key, value`: attention of one short text averaged over layers and heads, where it was asked for.
        patterns: `layer, head, query, key, query_token, value`: every head's attention of one short text, where it was
            asked for (:func:`sinkscope.attention_patterns`); the page's explorer shows it.
    """

    frame: pd.DataFrame
    totals: pd.DataFrame
    about: dict[str, Any] = field(repr=False)
    attention: pd.DataFrame | None = field(default=None, repr=False)
    patterns: pd.DataFrame | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Let pictures know what the frame is of."""
        self.frame.attrs |= {name: self.about[name] for name in ("reads", "side") if name in self.about}

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
        asked = list(asked)
        frame, summary = tables(tally, asked, about, results)
        texts: list[dict[str, Any]] = [{"label": label, "n_tokens": n} for label, n in tally.texts]
        for text, r in zip(texts, results, strict=False):
            text["tokens"] = list(r.sequence.keyed.strings)
            if r.sequence.crossed:
                text["queries"] = list(r.sequence.strings)
        about = about | {"texts": texts}
        told = sentences(summary[summary["text"] == ALL], about["arguments"]["key"], about)
        units = {m.name: m.unit for m in asked if m.name not in BUILT_IN and not isinstance(m, AcrossTexts) and m.unit}
        about = about | {"sentences": told} | ({"units": units} if units else {})
        return cls(frame, summary, about | {"notes": notes.of_measure(tally, asked, about)})

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
        """Give the summary over all texts with the 95% interval of each mean.

        Returns:
            The columns of :meth:`summary`, `low, high`, and `interval`: how it was made, such as `t, logit, 5 texts`
            (Student's t on a scale on which it can't leave what is possible), or why there is none.
        """
        rows = self.summary(ALL)
        single = self.totals[(self.totals["text"] != ALL) & self.totals["value"].notna()]
        lengths = single["text"].map({t["label"]: t["n_tokens"] for t in self.about["texts"]}).astype(float)
        counts, means = (getattr(lengths.groupby(single["metric"]), what)() for what in ("count", "mean"))
        found = []
        for name, value, error in zip(rows["metric"], rows["value"], rows["std_error"], strict=True):
            bounds = intervals.bounds_of(name, float(means.get(name, 1.0)), self.about.get("units"))
            found.append(intervals.of_mean(value, error, int(counts.get(name, 0)), bounds, len(self.texts)))
        how = [said(i.said, self.about) for i in found]
        return rows.assign(low=[i.low for i in found], high=[i.high for i in found], interval=how)

    def top(self, metric: str = "sink_mass", n: int = 10, *, text: str = ALL) -> pd.DataFrame:
        """Give the n rows where a metric is largest: the strongest heads, or positions.

        Raises:
            SinkscopeError: no such metric or text in this report.
        """
        rows = self.frame[(self.frame["metric"] == self._metric(metric)) & (self.frame["text"] == self._fine(text))]
        return rows.nlargest(n, "value").reset_index(drop=True)

    def compare(self, other: SinkReport) -> pd.DataFrame:
        """Put another report's summary beside this one, with the difference and its 95% interval.

        Texts that both have (of the same label, and as far as is known the same words) are compared pair by pair;
        where they are not all the same, the interval is Welch's, of two independent means.

        Returns:
            One row per metric in both: `metric, value, std_error, null`, the same of the other, `difference` (other minus
            this), its `low, high` and `interval` (how it was made, or why there is none), and `note`: what makes the two
            numbers hard to compare, such as texts of other lengths. Standard errors are each report's own, across its
            texts; a paired difference is that of the texts which have both numbers.

        Raises:
            SinkscopeError: the other is no SinkReport.
        """
        if not isinstance(other, SinkReport):
            raise SinkscopeError(f"a SinkReport compares with a SinkReport, not with a {type(other).__name__}")
        return compared(self, other)

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
        from sinkscope.reports.arrays import of_measurements

        return of_measurements(self.frame, column, self.about)

    # Files.

    def data(self) -> dict[str, Any]:
        """Give all that the page shows as a dictionary, that of :meth:`json`."""
        from sinkscope.reports import page

        numbers = pd.concat([self.totals[self.totals["text"] != ALL], self.intervals()], ignore_index=True)
        return page.measured(self.frame, numbers, self.about, self.attention, self.patterns)

    def save(self, directory: str | Path) -> Path:
        """Write tables, pictures and the page into a directory.

        Args:
            directory: made if need be; files of an earlier report in it are replaced.

        Returns:
            The directory: `measurements.csv`, `summary.csv`, both as `.parquet`, `summary.json`, the pictures as PNG,
            `report.html`, and `patterns.parquet` where there are patterns.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from sinkscope.reports import files

        tables = {"measurements": self.frame, "summary": self.summary()}
        if self.attention is not None:
            tables["attention"] = self.attention
        files.check_writable(directory)
        large = {} if self.patterns is None else {"patterns": self.patterns}
        return files.save(directory, tables, self.figures(), self.page(), self.about, large)

    def show(self, height: int = 720) -> Shown:
        """Open the page inside a notebook's cell, `height` pixels high."""
        return Shown(self.page(), height)

    def __str__(self) -> str:
        """Say in one line what this is, and in one each what to know before reading the numbers."""
        n, lengths = len(self.texts), [t["n_tokens"] for t in self.about["texts"]]
        of = said(f"{n} text{'s' * (n != 1)} of {notes.tokens_of(lengths)}", self.about)
        return "\n".join([f"SinkReport: {self.about['model']}, {of}, engine {self.about['engine']}", *self._notes])

    __repr__ = __str__

    @property
    def _notes(self) -> list[str]:
        return [f"note: {note}" for note in self.about.get("notes", [])]

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
