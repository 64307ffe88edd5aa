"""EffectReport: what `evaluate` found, as tidy tables, a picture and files."""

from __future__ import annotations

import datetime
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.metrics.across import t_interval

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

#: Columns of `.frame` and effects.csv.
COLUMNS = ["model", "text", "intervention", "tokens", "loss", "perplexity", "delta_loss", "kl", "std_error"]
COLUMNS += ["sink_mass", "sink_position"]
#: Consecutive blocks that one text's tokens are cut into for an interval, where there are enough of them.
BLOCKS, FEWEST = 16, 4
ALL, NONE = "all", "none"


@dataclass(frozen=True)
class Run:
    """One text under one intervention: per-token losses in nats of the clean and the edited pass, at `positions`."""

    text: str
    intervention: str
    tokens: int
    positions: np.ndarray
    loss: np.ndarray
    clean_loss: np.ndarray
    kl: float
    agreement: float
    sink_mass: float
    sink_position: int
    sink_token: str


@dataclass(frozen=True, eq=False)
class EffectReport:
    """What interventions did to a model's predictions.

    Attributes:
        frame: tidy, the columns of `effects.csv`: one row per (text, intervention), and per intervention one for `all`
            texts. `none` is the unedited run. `tokens` counts the predictions scored; `loss` is in nats per token;
            `delta_loss` is against the unedited run on the same tokens, `std_error` its standard error; `kl` is
            KL(clean || edited) in nats; `sink_mass` is the mean attention to the first token, over layers, heads and
            queries (NaN where it was dropped), and `sink_position` the position that receives most attention in all.
        details: the same rows: 95% interval of `delta_loss`, share of top-1 predictions that stay, the sink's token.
        curves: loss by position: columns `text, intervention, position, loss`.
        about: model, versions, engine and why, how intervals were made, arguments.
    """

    frame: pd.DataFrame
    details: pd.DataFrame
    curves: pd.DataFrame
    about: dict[str, Any] = field(repr=False)

    @classmethod
    def assemble(cls, runs: Sequence[Run], about: dict[str, Any]) -> EffectReport:
        """Build the tables."""
        texts = list(dict.fromkeys(r.text for r in runs))
        rows: list[tuple[Any, ...]] = []
        more: list[tuple[Any, ...]] = []
        for run in runs:
            delta = run.loss - run.clean_loss
            error, n = _block_error(delta)
            _add(rows, more, run, run.text, run.tokens, mean(run.loss), mean(delta), error, n)
        for name in dict.fromkeys(r.intervention for r in runs):
            group = [r for r in runs if r.intervention == name]
            losses = np.array([mean(r.loss) for r in group])
            deltas = np.array([mean(r.loss - r.clean_loss) for r in group])
            if len(group) > 1:
                error, n = float(deltas.std(ddof=1) / math.sqrt(len(group))), len(group)
            else:
                error, n = _block_error(group[0].loss - group[0].clean_loss)
            tokens = sum(r.tokens for r in group)
            _add(rows, more, _pooled(group), ALL, tokens, float(losses.mean()), float(deltas.mean()), error, n)
        frame = pd.DataFrame(rows, columns=COLUMNS[1:])
        frame.insert(0, "model", about["model"])
        frame["sink_position"] = frame["sink_position"].astype("Int64")
        details = pd.DataFrame(more, columns=["text", "intervention", "low", "high", "top1_agreement", "sink_token"])
        curves = pd.concat(
            [
                pd.DataFrame({"text": r.text, "intervention": r.intervention, "position": r.positions, "loss": r.loss})
                for r in runs
            ],
            ignore_index=True,
        )
        how = "across texts" if len(texts) > 1 else f"across up to {BLOCKS} consecutive blocks of the one text"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(frame, details, curves, about | {"interval": f"95%, Student's t, paired, {how}", "created": now})

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
        from sinkscope import plots

        return plots.loss_curve(self.curves, text=text, ax=ax)

    def save(self, directory: str | Path) -> Path:
        """Write tables, picture and page into a directory; see :func:`sinkscope.files.save_effects`."""
        from sinkscope import files

        return files.save_effects(self, directory)

    def page(self) -> str:
        """Give the self-contained HTML page."""
        from sinkscope import page

        return page.render_effects(self.summary(), self.about, self.loss_curve)

    def _repr_html_(self) -> str:
        shown = self.summary().set_index("intervention")[
            ["loss", "perplexity", "delta_loss", "low", "high", "kl", "sink_mass"]
        ]
        return f"<p>{html.escape(str(self))}</p>{shown.to_html(float_format='{:.3f}'.format, na_rep='', escape=True)}"

    def __str__(self) -> str:
        """Say in one line what this is."""
        n, t = len(self.interventions) - 1, len(self.about["texts"])
        return f"EffectReport: {self.about['model']}, {n} intervention{'s' * (n != 1)}, {t} text{'s' * (t != 1)}"


def mean(values: np.ndarray) -> float:
    """Average; NaN where there is nothing."""
    return float(values.mean()) if len(values) else math.nan


def _block_error(delta: np.ndarray) -> tuple[float, int]:
    """Standard error of a mean over one text, across consecutive blocks, since neighbouring tokens are not independent."""
    n = min(BLOCKS, len(delta) // 8)
    if n < FEWEST:
        return math.nan, n
    means = np.array([part.mean() for part in np.array_split(delta, n)])
    return float(means.std(ddof=1) / math.sqrt(n)), n


def _pooled(group: Sequence[Run]) -> Run:
    """Average what is reported of several texts; the sink's position is theirs if it is the same in all."""
    first = group[0]
    same = all(r.sink_position == first.sink_position for r in group)
    kl, agreement, mass = (float(np.mean([getattr(r, k) for r in group])) for k in ("kl", "agreement", "sink_mass"))
    return Run(
        ALL,
        first.intervention,
        first.tokens,
        first.positions,
        first.loss,
        first.clean_loss,
        kl,
        agreement,
        mass,
        first.sink_position if same else -1,
        first.sink_token if same else "(varies)",
    )


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
