"""StudyReport: our figures beside the published ones, with pictures, and a paragraph that says what was found."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sinkscope.metrics.across import ANY, POSITIVE, Bounds, t_interval
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.files import check_writable, write, write_table
from sinkscope.reports.sink import SinkReport

#: Of every study's table. `low` and `high` bound `value` (95%); `null` is what chance would give; published rows have a
#: `source`, and `evidence` says how it was read ("measured": ours).
COLUMNS = ["model", "case", "setting", "quantity", "value", "low", "high", "null", "source", "evidence"]
#: Written last: a directory without it holds no whole study.
SEAL = "study.json"
MEASURED = "measured"


class Estimate(NamedTuple):
    """A number with its 95% interval, and what chance would give; NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    null: float = math.nan

    @classmethod
    def of(cls, values: Iterable[float], null: float = math.nan, bounds: Bounds = ANY) -> Estimate:
        """Take the mean of independent numbers, such as one per text, with Student's t interval; NaN counts as absent.

        `bounds` says what the mean can be, and so can the interval.

        >>> Estimate.of([1.0, 2.0, 3.0]).value
        2.0
        """
        given = np.array([v for v in values if not math.isnan(v)], dtype=float)
        if not len(given):
            return cls(math.nan, null=null)
        error = float(given.std(ddof=1) / math.sqrt(len(given))) if len(given) > 1 else math.nan
        mean = float(given.mean())
        return cls(mean, *t_interval(mean, error, len(given), bounds), null)

    def exp(self) -> Estimate:
        """Give the same for exp of the number: perplexity from loss."""
        return Estimate(*(math.exp(min(v, 700.0)) for v in self[:3]))

    def __str__(self) -> str:
        """Write it with its interval: `0.512 (0.498 to 0.526)`."""
        if math.isnan(self.low):
            return f"{self.value:.3g}"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


#: One measured row: case, quantity, estimate, and the setting in words.
Row = tuple[str, str, Estimate, str]
Pictures = dict[str, Callable[..., Any]]


@dataclass(frozen=True, eq=False, repr=False)
class StudyReport:
    """One study on one model, or on several.

    Attributes:
        name: the study.
        question: what it asks, with its source.
        table: the columns of `COLUMNS`; ours first, then the published rows.
        verdict: what came out, in a few words.
        said: what was found and what was not, in a paragraph.
        about: model, versions, arguments.
        pictures: file stem -> function that draws on `ax=`; the first is the study's own.
        reports: what lies behind, by the folder that it is saved in; "" is the study's own folder.
    """

    name: str
    question: str
    table: pd.DataFrame
    verdict: str
    said: str
    about: dict[str, Any] = field(repr=False)
    pictures: Mapping[str, Callable[..., Any]] = field(repr=False)
    reports: Mapping[str, SinkReport | EffectReport] = field(default_factory=dict, repr=False)

    @property
    def ours(self) -> pd.DataFrame:
        """The measured rows."""
        return self.table[self.table["evidence"] == MEASURED]

    def estimate(self, case: str, quantity: str, model: str | None = None) -> Estimate:
        """Give one measured number.

        Raises:
            KeyError: there is no such row, or more than one.
        """
        rows = self.ours[(self.ours["case"] == case) & (self.ours["quantity"] == quantity)]
        rows = rows if model is None else rows[rows["model"] == model]
        if len(rows) != 1:
            raise KeyError(f"{len(rows)} rows for {case!r}, {quantity!r}")
        return Estimate(*rows[["value", "low", "high", "null"]].to_numpy(float)[0])

    def shown(self) -> pd.DataFrame:
        """Give the table for people: a line per model and case, a column per quantity, numbers with their intervals."""
        numbers = [Estimate(*row) for row in self.table[["value", "low", "high", "null"]].to_numpy(float)]
        said = [str(n) + ("" if math.isnan(n.null) else f" | {n.null:.3g}") for n in numbers]
        index = ["model", "case", "setting", "source"]
        wide = self.table.assign(said=said).pivot_table("said", index, "quantity", aggfunc="first", sort=False)
        return wide.fillna("").reset_index().rename_axis(columns=None)

    def save(self, directory: str | Path) -> Path:
        """Write the study, and all that its reports write.

        Returns:
            The directory: `study.csv`, the same as `.parquet`, `study.txt`, `study.html`, the pictures as PNG, `study.json`.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from matplotlib.figure import Figure

        from sinkscope.reports.drawing import WIDE

        path = check_writable(directory)
        (path / SEAL).unlink(missing_ok=True)
        for folder, report in self.reports.items():
            report.save(path / folder)
        write_table(self.table, path / "study")
        write(path / "study.txt", lambda p: p.write_text(f"{self.said}\n", encoding="utf-8"))
        for stem, draw in self.pictures.items():
            figure = Figure(**WIDE)
            draw(ax=figure.add_subplot())
            write(path / f"{stem}.png", partial(figure.savefig, format="png", dpi=160, bbox_inches="tight"))
        page = self.page()
        write(path / "study.html", lambda p: p.write_text(page, encoding="utf-8"))
        facts = {name: getattr(self, name) for name in ("name", "question", "verdict", "said", "about")}
        seal = json.dumps(facts | {"pictures": list(self.pictures)}, indent=1, ensure_ascii=False)
        write(path / SEAL, lambda p: p.write_text(seal, encoding="utf-8"))
        return path

    def page(self) -> str:
        """Give the self-contained HTML page."""
        from sinkscope.reports.page import render_study

        behind = {folder: f"{folder}/report.html" if folder else "report.html" for folder in self.reports}
        return render_study(
            self.name, self.question, self.verdict, self.said, self.shown(), self.pictures, behind, self.about
        )

    def _repr_html_(self) -> str:
        said = f"<p><b>{html.escape(self.verdict)}</b> {html.escape(self.said)}</p>"
        return said + self.shown().to_html(index=False, na_rep="", escape=True)

    def __str__(self) -> str:
        """Say what was found, in two lines."""
        models = ", ".join(dict.fromkeys(self.ours["model"]))
        return f"StudyReport: {self.name}, {models}\n{self.verdict}"

    __repr__ = __str__


def asked(doc: str | None) -> str:
    """Take a study's question from the first line of its module."""
    question = str(doc).partition(": ")[2].partition("\n")[0]
    return question[:1].upper() + question[1:]


def published(study: str) -> pd.DataFrame:
    """Give the published figures of a study, with their sources: the columns of `COLUMNS`."""
    with (resources("sinkscope.studies") / "published.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file, keep_default_na=False, dtype={"setting": str}).astype({"value": float})
    return rows[rows["study"] == study].reindex(columns=COLUMNS).astype({"low": float, "high": float, "null": float})


def tabulate(study: str, model: str, rows: Sequence[Row]) -> pd.DataFrame:
    """Put measured rows on top of the study's published ones."""
    ours = pd.DataFrame(
        [(model, case, setting, quantity, *estimate, "", MEASURED) for case, quantity, estimate, setting in rows],
        columns=COLUMNS,
    )
    theirs = published(study)
    return pd.concat([ours, theirs], ignore_index=True) if len(theirs) else ours


def beside(table: pd.DataFrame) -> str:
    """Say, of every published figure that a measured one has the case and quantity of, on which side of its interval it lies.

    >>> beside(tabulate("bos", "m", [("no BOS", "accuracy", Estimate(30.0, 25.0, 35.0), "")]))[:90]
    ' Published: no BOS, accuracy, 28.49 (gemma-7b), in our interval; no BOS, accuracy, 27.35 ('
    """
    ours = {(r["case"], r["quantity"]): r for r in table[table["evidence"] == MEASURED].to_dict("records")}
    parts = []
    for row in table[table["evidence"] != MEASURED].to_dict("records"):
        own = ours.get((row["case"], row["quantity"]))
        if own is not None and not math.isnan(own["low"]):
            side = "below" if row["value"] < own["low"] else "above" if row["value"] > own["high"] else "in"
            parts.append(f"{row['case']}, {row['quantity']}, {row['value']:g} ({row['model']}), {side} our interval")
    return f" Published: {'; '.join(parts)}." if parts else ""


def losses(effect: EffectReport, cases: Mapping[str, str], setting: str) -> list[Row]:
    """Give perplexity and difference of loss of each case, on the tokens that all score, with intervals.

    They are across texts; where there is one, across consecutive blocks of it.

    Args:
        effect: what `evaluate` found.
        cases: case -> intervention.
        setting: in words.
    """
    summary, rows = effect.summary().set_index("intervention"), []
    scored = effect.curves[effect.curves["intervention"].isin(list(cases.values()))]
    runs = scored.groupby(["text", "position"])["loss"].transform("count")
    scored = scored[runs == len(cases)]  # the same tokens in every case
    for case, intervention in cases.items():
        curves = scored[scored["intervention"] == intervention]
        by_text = [group["loss"].to_numpy() for _, group in curves.groupby("text", sort=False)]
        parts = by_text if len(by_text) > 1 else np.array_split(by_text[0], max(1, min(16, len(by_text[0]) // 8)))
        rows.append((case, "perplexity", Estimate.of([float(p.mean()) for p in parts], bounds=POSITIVE).exp(), setting))
        if intervention != "none":
            change = summary.loc[intervention, ["delta_loss", "low", "high"]]
            rows.append((case, "delta_loss", Estimate(*map(float, change)), setting))
    return rows


def costs(effect: EffectReport, cases: Mapping[str, str], setting: str) -> list[Row]:
    """Give the difference of loss, and KL(clean || edited), of each case (case -> intervention), across texts."""
    summary = effect.summary().set_index("intervention")
    rows: list[Row] = []
    for case, intervention in cases.items():
        change = summary.loc[intervention, ["delta_loss", "low", "high"]]
        rows.append((case, "delta_loss", Estimate(*map(float, change)), setting))
        rows.append((case, "kl", Estimate.of(by_text(effect, intervention, "kl"), bounds=POSITIVE), setting))
    return rows


def by_text(effect: EffectReport, intervention: str, quantity: str = "delta_loss") -> np.ndarray:
    """Give a number of an edit for each text, in their order."""
    rows = effect.frame[(effect.frame["intervention"] == intervention) & (effect.frame["text"] != "all")]
    values: np.ndarray = rows[quantity].to_numpy(float)
    return values


def sinks(report: SinkReport, case: str, metrics: Sequence[str], setting: str) -> list[Row]:
    """Give model-level numbers of a report, with their intervals across texts and nulls."""
    rows = report.intervals().set_index("metric")
    return [(case, m, Estimate(*map(float, rows.loc[m, ["value", "low", "high", "null"]])), setting) for m in metrics]
