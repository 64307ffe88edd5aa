"""EffectReport: what `evaluate` found, as tidy tables, a picture and files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.metrics.across import t_interval
from sinkscope.results import ALL, BLOCKS, Effects, Run

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

#: Columns of `.frame` and effects.csv.
COLUMNS = ["model", "text", "intervention", "tokens", "loss", "perplexity", "delta_loss", "kl", "std_error"]
COLUMNS += ["sink_mass", "sink_position"]


@dataclass(frozen=True, eq=False)
class EffectReport:
    """What interventions did to a model's predictions.

    Attributes:
        frame: tidy, the columns of `effects.csv`: one row per (text, intervention), and per intervention one for `all`
            texts. `none` is the unedited run. `tokens` counts the predictions scored; `loss` is in nats per token. An edit
            that drops or swaps tokens is scored on those that stand in both runs, `none` on all: `delta_loss` is against
            the unedited run on the same tokens, `std_error` its standard error; `kl` is
            KL(clean || edited) in nats; `sink_mass` is the mean attention to the first token, over layers, heads and
            queries (NaN where it was dropped), and `sink_position` the position that receives most attention in all.
        details: the same rows: 95% interval of `delta_loss`, share of top-1 predictions that stay, the sink's token.
        curves: loss by position: columns `text, intervention, position, loss`; of many texts the mean over `all`.
        about: model, versions, engine and why, how intervals were made, arguments.
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
        return cls(frame, details, effects.table(), about | {"interval": f"95%, Student's t, paired, {how}"})

    @property
    def interventions(self) -> list[str]:
        """The interventions in their text form, `none` first."""
        return list(self.frame["intervention"].unique())

    def summary(self, text: str = ALL) -> pd.DataFrame:
        """Give one row per intervention: the columns of `.frame` and `low, high, top1_agreement, sink_token`.

        Raises:
            SinkscopeError: no such text.
        """
        both = self.frame.merge(self.details, on=["text", "intervention"])
        if text not in set(both["text"]):
            raise SinkscopeError(f"no text {text!r} in this report; there are {sorted(set(both['text']))}")
        return both[both["text"] == text].drop(columns=["model", "text"]).reset_index(drop=True)

    def loss_curve(self, *, text: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw loss by position, a running mean per intervention; `text` is one text, by default the longest."""
        from sinkscope.reports import plots

        return plots.loss_curve(self.curves, text=text, ax=ax)

    def save(self, directory: str | Path) -> Path:
        """Write tables, picture and page into a directory.

        Returns:
            The directory: `effects.csv`, `details.csv` (intervals, agreement, tokens) and `curves.csv` (loss by position),
            the same as `.parquet`, `loss.png`, `report.html` and `summary.json`.

        Raises:
            SinkscopeError: the directory can't be written.
        """
        from matplotlib.figure import Figure

        from sinkscope.reports import files
        from sinkscope.reports.drawing import WIDE

        files.check_writable(directory)
        figure = Figure(**WIDE)
        self.loss_curve(ax=figure.add_subplot())
        tables = {"effects": self.frame, "details": self.details, "curves": self.curves}
        return files.save(directory, tables, {"loss": figure}, self.page(), self.about)

    def page(self) -> str:
        """Give the self-contained HTML page."""
        from sinkscope.reports import page

        return page.render(self.data())

    def snippet(self) -> str:
        """Give the page as a fragment for another page: what a notebook shows."""
        from sinkscope.reports import page

        return page.snippet(self.data())

    def json(self) -> str:
        """Give all that the page shows as JSON; the documentation says what every key means."""
        from sinkscope.reports import page

        return page.as_json(self.data())

    def markdown(self) -> str:
        """Give the numbers and how they were made as Markdown, for an issue or an appendix."""
        from sinkscope.reports import page

        return page.markdown(self.data())

    def data(self) -> dict[str, Any]:
        """Give all that the page shows as a dictionary, that of :meth:`json`."""
        from sinkscope.reports import page

        return page.evaluated(self.summary(), self.curves, self.about)

    def _repr_html_(self) -> str:
        return self.snippet()

    def __str__(self) -> str:
        """Say in one line what this is."""
        n, t = len(self.interventions) - 1, len(self.about["texts"])
        return f"EffectReport: {self.about['model']}, {n} intervention{'s' * (n != 1)}, {t} text{'s' * (t != 1)}"


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
