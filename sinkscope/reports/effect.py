"""EffectReport: what `evaluate` found, as tidy tables, a picture and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics.across import t_interval
from sinkscope.reports import notes
from sinkscope.reports.paged import Paged
from sinkscope.reports.placebos import EffectTest, beside, tested
from sinkscope.reports.placebos import words as placebo_words
from sinkscope.reports.words import number, percent
from sinkscope.results import ALL, BLOCKS, FEWEST, NONE, Effects, Run

if TYPE_CHECKING:
    from pathlib import Path

    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Columns of `.frame` and effects.csv.
COLUMNS = ["model", "text", "intervention", "tokens", "loss", "perplexity", "delta_loss", "kl", "std_error"]
COLUMNS += ["sink_mass", "sink_position"]
#: Tokens that must be scored for an interval over the blocks of one text, and rows of a table that are printed.
FEWEST_TOKENS, MOST_ROWS = FEWEST * 8, 24


@dataclass(frozen=True, eq=False, repr=False)
class EffectReport(Paged):
    """What interventions did to a model's predictions.

    Attributes:
        frame: tidy, the columns of `effects.csv`: one row per (text, intervention), and per intervention one for `all`
            texts; placebos have theirs. `none` is the unedited run. `tokens` counts the predictions scored; `loss` is in nats
            per token. An edit that drops or swaps tokens is scored on those that stand in both runs, `none` on all:
            `delta_loss` is against the unedited run on the same tokens, `std_error` its standard error; `kl` is
            KL(clean || edited) in nats; `sink_mass` is the mean attention to the first token, over layers, heads and
            queries (NaN where it was dropped), and `sink_position` the position that receives most attention in all.
        details: the same rows: 95% interval of `delta_loss`, share of top-1 predictions that stay, the sink's token.
        curves: loss by position, of placebos not: columns `text, intervention, position, loss`; of many texts the mean over
            `all`.
        about: model, versions, engine and why, how intervals were made, arguments; `notes`: what to know before reading the
            numbers, such as edits that changed nothing.
    """

    frame: pd.DataFrame
    details: pd.DataFrame
    curves: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def assemble(cls, effects: Effects, about: dict[str, Any]) -> EffectReport:
        """Build the tables."""
        runs = effects.runs
        texts = list(dict.fromkeys(r.text for r in runs))
        rows: list[tuple[Any, ...]] = []
        more: list[tuple[Any, ...]] = []
        for run in runs:
            _add(rows, more, run, run.text, run.tokens, run.mean_loss, run.delta, run.error, run.blocks)
        for name in dict.fromkeys(r.intervention for r in runs):
            group = [r for r in runs if r.intervention == name]
            losses, deltas = np.array([r.mean_loss for r in group]), np.array([r.delta for r in group])
            if len(group) > 1:
                error, n = float(deltas.std(ddof=1) / math.sqrt(len(group))), len(group)
            else:
                error, n = group[0].error, group[0].blocks
            tokens = sum(r.tokens for r in group)
            _add(rows, more, _pooled(group), ALL, tokens, float(losses.mean()), float(deltas.mean()), error, n)
        frame = pd.DataFrame(rows, columns=COLUMNS[1:])
        frame.insert(0, "model", about["model"])
        frame["sink_position"] = frame["sink_position"].astype("Int64")
        details = pd.DataFrame(more, columns=["text", "intervention", "low", "high", "top1_agreement", "sink_token"])
        how = "across texts" if len(texts) > 1 else f"across up to {BLOCKS} consecutive blocks of the one text"
        about = about | {"interval": f"95%, Student's t, paired, {how}"}
        found = notes.of_evaluate(runs, about["texts"])
        found += [f"{name} has no placebo" for name in about.pop("unmatched", [])]
        report = cls(frame, details, effects.table(), about | {"notes": found})
        return replace(report, curves=report.curves[report.curves["intervention"].isin(report.interventions)])

    @property
    def interventions(self) -> list[str]:
        """The interventions that were asked for, in their text form, `none` first."""
        names = self.frame["intervention"].unique()
        asked = {NONE, *(self.about.get("arguments", {}).get("interventions") or names)}
        return [name for name in names if name in asked or name not in self._placebos]

    @property
    def _placebos(self) -> dict[str, str]:
        """Placebo -> edit."""
        found: dict[str, str] = self.about.get("placebos") or {}
        return found

    def summary(self, text: str = ALL) -> pd.DataFrame:
        """Give one row per intervention: the columns of `.frame`, `low, high, top1_agreement, sink_token`, and `interval`.

        The last says how the interval of `delta_loss` was made, or why there is none. Where placebos were run: how many
        (`placebos`), their mean `placebo_delta_loss` and its standard deviation over them, `placebo_std`; for `all` of
        several texts `placebo_p`, the p-value of :meth:`test` between the two.

        Raises:
            SinkscopeError: no such text.
        """
        both = self.frame.merge(self.details, on=["text", "intervention"])
        if text not in set(both["text"]):
            raise SinkscopeError(f"no text {text!r} in this report; there are {sorted(set(both['text']))}")
        rows = both[(both["text"] == text) & both["intervention"].isin(self.interventions)]
        rows = rows.drop(columns=["model", "text"]).reset_index(drop=True)
        rows = rows.assign(interval=[self._how(r, text) for r in rows.to_dict("records")])
        if not self._placebos:
            return rows
        return rows.join(beside(self.frame, rows["intervention"].tolist(), text, self._placebos))

    def test(self, a: Any, b: Any = None) -> EffectTest:
        """Test whether two edits change the loss alike: a paired permutation test of their differences across texts.

        Args:
            a: an intervention of this report, as an object or in text form.
            b: another; None: the mean of the first one's placebos (`evaluate(..., placebo=5)`).

        Raises:
            SinkscopeError: it is not in this report, it has no placebo there, or there are not two texts.
        """
        names = self.frame["intervention"].unique().tolist()
        for name in (str(a), *(() if b is None else (str(b),))):
            if name not in names:
                raise unknown("intervention in this report", name, names)
        if b is not None:
            return tested(self.frame, str(a), [str(b)], str(b))
        mine = [placebo for placebo, of in self._placebos.items() if of == str(a)]
        if not mine:
            raise SinkscopeError(f"{a} has no placebo in this report: evaluate(..., placebo=5), or name another edit")
        return tested(self.frame, str(a), mine, mine[0] if len(mine) == 1 else f"its {len(mine)} placebos")

    def _how(self, row: Mapping[Any, Any], text: str) -> str:
        """Say what the interval of a row is across, or why there is none."""
        if row["low"] == row["low"]:
            several = text == ALL and len(self.about["texts"]) > 1
            return f"t, {len(self.about['texts'])} texts" if several else f"t, {min(BLOCKS, row['tokens'] // 8)} blocks"
        if "no_clean_run" in self.about and row["delta_loss"] != row["delta_loss"]:
            return "none: no unedited run"
        return f"none: {row['tokens']} tokens scored, {FEWEST_TOKENS} needed"

    def to_xarray(self, text: str | None = None) -> xr.Dataset:
        """Give the tables as an xarray Dataset: a variable per number, over `text` and `intervention`.

        Args:
            text: only this one (`"all"` for the means over texts).

        Raises:
            SinkscopeError: xarray is not installed, or there is no such text.
        """
        from sinkscope.reports.arrays import of_effects

        return of_effects(self.frame.merge(self.details, on=["text", "intervention"]), text, self.about)

    def loss_curve(self, *, text: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw loss by position, a running mean per intervention; `text` is one text, by default the longest."""
        from sinkscope.reports import plots

        return plots.loss_curve(self.curves, text=text, ax=ax)

    def figures(self) -> dict[str, Figure]:
        """Draw everything that this report can be drawn as: file stem -> matplotlib Figure."""
        from matplotlib.figure import Figure

        from sinkscope.reports.drawing import WIDE

        figure = Figure(**WIDE)
        self.loss_curve(ax=figure.add_subplot())
        return {"loss": figure}

    def save(self, directory: str | Path) -> Path:
        """Write tables, picture and page into a directory.

        Returns:
            The directory: `effects.csv`, `details.csv` (intervals, agreement, tokens) and `curves.csv` (loss by position),
            the same as `.parquet`, `loss.png`, `report.html` and `summary.json`.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from sinkscope.reports import files

        files.check_writable(directory)
        tables = {"effects": self.frame, "details": self.details, "curves": self.curves}
        return files.save(directory, tables, self.figures(), self.page(), self.about)

    def data(self) -> dict[str, Any]:
        """Give all that the page shows as a dictionary, that of :meth:`json`."""
        from sinkscope.reports import page

        return page.evaluated(self.summary(), self.curves, self.about)

    @property
    def headline(self) -> str:
        """Say in one line what this is."""
        n, texts = len(self.interventions) - 1, self.about["texts"]
        of = f"{len(texts)} text{'s' * (len(texts) != 1)} of {notes.tokens_of([t['n_tokens'] for t in texts])}"
        return f"EffectReport: {self.about['model']}, {n} intervention{'s' * (n != 1)}, {of}"

    @property
    def _hidden(self) -> bool:
        """Whether placebos have no rows of their own."""
        return not set(self._placebos) <= set(self.interventions)

    @property
    def _notes(self) -> list[str]:
        return [f"note: {note}" for note in self.about.get("notes", [])]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Give the table for people: its header, and a row per intervention; what is not known says why, or is empty."""
        header = ["intervention", "loss", "perplexity", "difference", "95% interval", "KL", "on token 0", "most goes to"]
        rows = []
        if self._hidden:
            header.insert(5, "placebo")
        for r in self.summary().to_dict("records"):
            known = {name: not pd.isna(value) for name, value in r.items()}
            place = f"{r['sink_position']} {r['sink_token']!r}" if known["sink_position"] else r["sink_token"]
            interval = f"{r['low']:+.3f} to {r['high']:+.3f}" if known["low"] else r["interval"]
            if r["intervention"] == NONE:
                known["delta_loss"], interval = False, ""  # what the others are compared with
            numbers = [number(r["perplexity"]), f"{r['delta_loss']:+.3f}" if known["delta_loss"] else "", interval]
            numbers += [placebo_words(r)] if self._hidden else []
            loss, kl = (f"{r[name]:.3f}" if known[name] else "" for name in ("loss", "kl"))
            rows.append([r["intervention"], loss, *numbers, kl, percent(r["sink_mass"]) if known["sink_mass"] else "", place])
        return header, rows

    def __str__(self) -> str:
        """Print the table, in nats per token, and what to know before reading it."""
        header, rows = self.cells()
        more = len(rows) - MOST_ROWS
        table = pd.DataFrame(rows[:MOST_ROWS], columns=header).to_string(index=False, max_colwidth=48)
        cut = [f"... {more} more: effect.summary() has all"] if more > 0 else []
        return "\n".join([self.headline, table, *cut, *self._notes])

    __repr__ = __str__


def _pooled(group: Sequence[Run]) -> Run:
    """Average what is reported of several texts; the sink's position is theirs if it is the same in all."""
    first = group[0]
    same = all(r.sink_position == first.sink_position for r in group)
    kl, agreement, mass = (float(np.mean([getattr(r, k) for r in group])) for k in ("kl", "agreement", "sink_mass"))
    place, token = (first.sink_position, first.sink_token) if same else (-1, "(varies)")
    numbers = {"kl": kl, "agreement": agreement, "sink_mass": mass, "sink_position": place, "sink_token": token}
    return replace(first, text=ALL, **numbers)  # type: ignore[arg-type]


def _add(
    rows: list[tuple[Any, ...]],
    more: list[tuple[Any, ...]],
    run: Run,
    text: str,
    tokens: int,
    loss: float,
    delta: float,
    error: float,
    n: int,
) -> None:
    low, high = t_interval(delta, error, n) if n > 1 and not math.isnan(error) else (math.nan, math.nan)
    perplexity = math.inf if loss >= 700 else math.exp(loss)
    position = None if run.sink_position < 0 else run.sink_position
    rows.append((text, run.intervention, tokens, loss, perplexity, delta, run.kl, error, run.sink_mass, position))
    more.append((text, run.intervention, low, high, run.agreement, run.sink_token))
