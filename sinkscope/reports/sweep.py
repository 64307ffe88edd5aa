"""SweepReport: what one edit costs at every head, layer or position, as a tidy table, a picture and files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics.across import SIGNED, t_interval
from sinkscope.reports import notes
from sinkscope.reports.intervals import of_mean
from sinkscope.reports.paged import Paged
from sinkscope.results import ALL, BLOCKS, Run

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sinkscope.reports.sink import SinkReport

#: Columns of `.frame` and sweep.csv: a place, the edit there, and what it costs; the same of its placebo.
PLACE = ["layer", "head", "position"]
NUMBERS = ["delta_loss", "low", "high", "kl", "std_error"]
COLUMNS = ["model", "text", *PLACE, "intervention", "tokens", "loss", *NUMBERS, "top1_agreement"]
COLUMNS += [f"placebo_{name}" for name in NUMBERS]
#: Places that are printed.
SHOWN = 10
#: Letters in a line of a picture's title: more would not stand above a map.
LINE = 44


class Row(NamedTuple):
    """A place (layer, head, position), the run of the edit there, and the runs of its placebos."""

    place: tuple[int | None, int | None, int | None]
    name: str
    placebos: tuple[str, ...]


class Correlation(NamedTuple):
    """A correlation, its 95% interval, and how that was made, or why there is none (NaN)."""

    value: float
    low: float
    high: float
    said: str


@dataclass(frozen=True, eq=False, repr=False)
class SweepReport(Paged):
    """What one edit costs at every place.

    Attributes:
        frame: tidy, the columns of `sweep.csv`: one row per text and place, and per place one for `all` texts that have it.
            `layer`, `head`, `position` say where (empty where the sweep does not go over it), `intervention` is the edit
            there. `delta_loss` is the difference of the loss to the unedited run on the same tokens, in nats per token, with
            its 95% interval and standard error; `kl` is KL(clean || edited); `placebo_...` the same of the edit's placebo
            there, a mean where several were drawn.
        about: model, versions, engine and why, how intervals were made, what was shared between runs, arguments; `notes`.
    """

    frame: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def assemble(cls, runs: Iterable[Run], rows: Mapping[str, Sequence[Row]], about: dict[str, Any]) -> SweepReport:
        """Build the table; `rows` are those of each text."""
        found = {(run.text, run.intervention): run for run in runs}
        places: dict[Any, list[_Cell]] = {}
        lines = []
        for text, of in rows.items():
            for row in of:
                cell = _Cell(found[text, row.name], [found[text, name] for name in row.placebos])
                places.setdefault(row.place, []).append(cell)
                lines.append((text, *row.place, row.name, *_line([cell])))
        names = {row.place: row.name for of in rows.values() for row in of}
        lines += [(ALL, *place, names[place], *_line(cells)) for place, cells in places.items()]
        frame = pd.DataFrame(lines, columns=COLUMNS[1:])
        frame.insert(0, "model", about["model"])
        frame = frame.astype(dict.fromkeys(PLACE, "Int64"))
        how = "across texts" if len(rows) > 1 else f"across up to {BLOCKS} consecutive blocks of the one text"
        about = about | {"interval": f"95%, Student's t, paired, {how}"}
        return cls(frame, about | {"notes": _notes(frame, about)})

    @property
    def over(self) -> str:
        """What the sweep goes over: `heads`, `layers` or `positions`."""
        return str(self.about["arguments"]["over"])

    @property
    def edit(self) -> str:
        """The edit in its text form."""
        return str(self.about["arguments"]["edit"])

    def summary(self, text: str = ALL) -> pd.DataFrame:
        """Give one row per place, of one text or of `all`: the columns of `.frame` that say something.

        Raises:
            SinkscopeError: no such text.
        """
        if text not in set(self.frame["text"]):
            raise unknown("text in this report", text, self.frame["text"].unique())
        rows = self.frame[self.frame["text"] == text].drop(columns=["model", "text"])
        return rows.dropna(axis="columns", how="all").reset_index(drop=True)

    def top(self, n: int = 10, text: str = ALL) -> pd.DataFrame:
        """Give the `n` places where the edit costs most, the largest `delta_loss` first; rows of :meth:`summary`."""
        rows = self.summary(text).sort_values("delta_loss", ascending=False, kind="stable")
        return rows.head(n).reset_index(drop=True)

    def heatmap(self, value: str = "delta_loss", *, text: str = ALL, placebo: bool = False, ax: Axes | None = None) -> Axes:
        """Draw what each place costs: a map of layers and heads, its colours centred on zero, else a curve with its interval.

        Args:
            value: `"delta_loss"` or `"kl"`.
            text: one text's label, or `all`.
            placebo: draw the placebo's map, in the colours of the edit's.
            ax: where to draw; a new figure without it.

        Raises:
            SinkscopeError: no such text; no placebo was run.
        """
        from sinkscope.reports import costs

        return costs.costs(self.summary(text), value, placebo=placebo, title=self._title(text), ax=ax)

    def rank_correlation(self, report: SinkReport, metric: str = "sink_mass") -> Correlation:
        """Correlate what heads cost with a metric of theirs: Spearman's rank correlation over all heads, text by text.

        Args:
            report: of the same model, with its finest rows of the same texts.
            metric: one with a value per head.

        Returns:
            `(value, low, high, said)`: the mean over texts with its 95% interval across them, on the logit scale, and how
            that was made; one text has none.

        Raises:
            SinkscopeError: this is no sweep over heads, or no text is in both reports.
        """
        from scipy.stats import spearmanr

        from sinkscope.reports.drawing import rows_of

        if self.over != "heads":
            raise SinkscopeError(f"a rank correlation over heads needs sweep(over='heads'), this one went over {self.over}")
        ours, theirs = (f.astype({"layer": float, "head": float}) for f in (self.frame, rows_of(report.frame, metric)))
        both = ours.merge(theirs, on=["text", "layer", "head"])
        by_text = both[both["text"] != ALL].groupby("text", sort=False)
        values = np.array([spearmanr(rows["delta_loss"], rows["value"]).statistic for _, rows in by_text], float)
        if not len(values):
            raise SinkscopeError(f"no text has both a sweep and {metric} by head: measure the same texts, per_text=True")
        error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return Correlation(float(values.mean()), *of_mean(float(values.mean()), error, len(values), SIGNED, len(values)))

    def beside(self, report: SinkReport) -> SinkReport:
        """Give a report of the same model with what each head costs as a metric of its own, `cost[EDIT]`.

        The metric's null is what the placebo costs.

        Raises:
            SinkscopeError: this is no sweep over heads, another model, or no text in common.
        """
        from sinkscope.reports.joined import joined

        return joined(report, self)

    def figures(self) -> dict[str, Figure]:
        """Draw everything that this report can be drawn as: file stem -> matplotlib Figure."""
        from sinkscope.reports import costs

        return {"costs": costs.beside(self.summary(), self._title(ALL))}

    def save(self, directory: str | Path) -> Path:
        """Write the table (`sweep.csv`, `.parquet`), picture (`costs.png`), page and `summary.json` into a directory.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from sinkscope.reports import files

        files.check_writable(directory)
        return files.save(directory, {"sweep": self.frame}, self.figures(), self.page(), self.about)

    def data(self) -> dict[str, Any]:
        """Give all that the page shows as a dictionary, that of :meth:`json`."""
        from sinkscope.reports import page

        return page.swept(self.frame, self.about)

    @property
    def headline(self) -> str:
        """Say in one line what this is."""
        texts, places = self.about["texts"], len(self.frame.drop_duplicates(PLACE))
        of = f"{len(texts)} text{'s' * (len(texts) != 1)} of {notes.tokens_of([t['n_tokens'] for t in texts])}"
        return f"SweepReport: {self.about['model']}, {self.edit} at {places} {self.over}, {of}"

    def cells(self, n: int = SHOWN) -> tuple[list[str], list[list[str]]]:
        """Give the table for people: its header, and a row for each of the places that cost most."""
        rows = self.top(n)
        places = [name for name in PLACE if name in rows]
        header = [*places, "difference", "95% interval", "KL", *(["placebo"] if "placebo_delta_loss" in rows else [])]
        cells = []
        for r in rows.to_dict("records"):
            known = "low" in r and r["low"] == r["low"]
            cells.append([*(str(r[name]) for name in places), f"{r['delta_loss']:+.4f}"])
            cells[-1] += [f"{r['low']:+.4f} to {r['high']:+.4f}" if known else "", f"{r['kl']:.4f}"]
            cells[-1] += [f"{r['placebo_delta_loss']:+.4f}"] if "placebo_delta_loss" in r else []
        return header, cells

    def _title(self, text: str) -> str:
        of = f"{len(self.about['texts'])} texts" if text == ALL and len(self.about["texts"]) > 1 else text
        said = f"{self.edit}, {'the one text' if of == ALL else of}"
        return "\n".join([self.about["model"], *textwrap.wrap(said, LINE, break_long_words=False)])

    def __str__(self) -> str:
        """Print the places that cost most, in nats per token, and what to know before reading them."""
        header, rows = self.cells()
        more = len(self.summary()) - len(rows)
        table = pd.DataFrame(rows, columns=header).to_string(index=False)
        cut = [f"... {more} more: sweep.summary() has all"] if more > 0 else []
        return "\n".join([self.headline, table, *cut, *(f"note: {note}" for note in self.about.get("notes", []))])

    __repr__ = __str__


class _Cell(NamedTuple):
    """A place in one text: the edit's run, and its placebos'."""

    run: Run
    placebos: list[Run]


def _line(cells: Sequence[_Cell]) -> tuple[Any, ...]:
    """Average a place over texts: what stands in a row after the edit's name."""
    runs = [cell.run for cell in cells]
    loss, agreement = (float(np.mean([getattr(run, of) for run in runs])) for of in ("mean_loss", "agreement"))
    single = (runs[0].error, runs[0].blocks) if len(runs) == 1 else None
    ours = _numbers([run.delta for run in runs], [run.kl for run in runs], single)
    drawn = [cell.placebos for cell in cells]
    theirs: tuple[float, ...] = (math.nan,) * len(NUMBERS)
    if all(drawn):
        deltas, kls = ([float(np.mean([getattr(run, of) for run in some])) for some in drawn] for of in ("delta", "kl"))
        alone = None
        if len(drawn) == 1 and len(drawn[0]) == 1:
            alone = (drawn[0][0].error, drawn[0][0].blocks)
        elif len(drawn) == 1:  # of one text: across draws
            spread = np.array([run.delta for run in drawn[0]])
            alone = (float(spread.std(ddof=1) / math.sqrt(len(spread))), len(spread))
        theirs = _numbers(deltas, kls, alone)
    return (sum(run.tokens for run in runs), loss, *ours, agreement, *theirs)


def _numbers(deltas: Sequence[float], kls: Sequence[float], alone: tuple[float, int] | None) -> tuple[float, ...]:
    """Give the mean difference, its interval, the mean KL and the standard error; `alone` is that of one text."""
    mean, n = float(np.mean(deltas)), len(deltas)
    error, n = alone if alone is not None else (float(np.std(deltas, ddof=1) / math.sqrt(n)), n)
    low, high = t_interval(mean, error, n) if n > 1 and not math.isnan(error) else (math.nan, math.nan)
    return mean, low, high, float(np.mean(kls)), error


#: KL in nats below which an edit has changed nothing but rounding.
IDLE = 1e-9


def _notes(frame: pd.DataFrame, about: Mapping[str, Any]) -> list[str]:
    """Say what to know before reading: places where nothing changed, intervals that exclude zero by chance."""
    rows, found = frame[frame["text"] == ALL], []
    idle = int((rows["kl"].abs() < IDLE).sum())
    if idle:
        found.append(f"the edit changed nothing at {idle} of {len(rows)} {about['arguments']['over']}")
    asked, without = about["arguments"]["placebo"], sorted(set(frame.loc[frame["placebo_kl"].isna(), "text"]) - {ALL})
    if asked and without:
        found.append(f"no placebo in {len(without)} of {len(about['texts'])} texts, which are too short for one")
    known = rows.dropna(subset=["low"])
    if len(known) >= 20:
        apart = int(((known["low"] > 0) | (known["high"] < 0)).sum())
        said = (
            f"{apart} of {len(known)} intervals exclude zero; about {round(0.05 * len(known))} would if nothing had changed"
        )
        theirs = known.dropna(subset=["placebo_low"])
        if len(theirs):
            other = int(((theirs["placebo_low"] > 0) | (theirs["placebo_high"] < 0)).sum())
            said += f". Of the placebo's {len(theirs)}, {other} do"
        found.append(said)
    return found
