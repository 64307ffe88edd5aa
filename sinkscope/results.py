"""What a run finds, before anybody looks at it: numbers of texts and moments over them, losses under edits.

`measure` fills a :class:`Tally`, `evaluate` fills :class:`Effects`; both merge, so batches, texts and processes combine
exactly. `runs/resume.py` keeps them on disk, `reports/` makes tables of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.metrics.accumulate import Moments
from sinkscope.metrics.values import Value
from sinkscope.tokens import TextTokens

#: Labels: the rows that hold means over texts; the run without an edit.
ALL, NONE = "all", "none"
#: Consecutive blocks that one text's tokens are cut into for an interval, where there are enough of them.
BLOCKS, FEWEST = 16, 4
NOTHING = np.zeros(0)


# --- measure --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextResult:
    """All values of one text."""

    sequence: TextTokens
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Group:
    """One metric over many texts: moments of its numbers, of their null and of the model-level number.

    Attributes are those of :class:`Value`; `key` is None where texts differ in it.
    """

    name: str
    tag: str
    key: int | None
    axes: tuple[str, ...]
    value: Moments
    null: Moments
    total: Moments | None
    total_null: Moments | None
    heads: tuple[int, ...] | None = None

    @classmethod
    def of(cls, v: Value) -> Group:
        """One text's."""
        total, null = (None if t is None else Moments.of(np.asarray(t, dtype=float)) for t in (v.total, v.total_null))
        return cls(v.name, v.tag, v.key, v.axes, Moments.of(v.value), Moments.of(v.null), total, null, v.heads)

    def merge(self, other: Group) -> Group:
        """Combine with the same metric over other texts."""
        return replace(
            self,
            key=self.key if self.key == other.key else None,
            value=self.value.merge(other.value),
            null=self.null.merge(other.null),
            total=self.total and other.total and self.total.merge(other.total),
            total_null=self.total_null and other.total_null and self.total_null.merge(other.total_null),
        )


@dataclass
class Tally:
    """What is kept of texts whose numbers are not: groups by (metric, tag), model-level numbers by text, and the texts.

    `totals` are (label, metric, value, null), `texts` (label, tokens: in cross-attention the source's): a few numbers per
    text; nothing else grows.
    """

    groups: dict[tuple[str, str], Group] = field(default_factory=dict)
    totals: list[tuple[str, str, float, float]] = field(default_factory=list)
    texts: list[tuple[str, int]] = field(default_factory=list)

    def add(self, result: TextResult) -> None:
        """Add a text."""
        label = result.sequence.label
        self.texts.append((label, len(result.sequence.keyed)))
        for v in result.values:
            self._add((v.name, v.tag), Group.of(v))
            if v.total is not None and v.total_null is not None:
                self.totals.append((label, v.name + v.tag, v.total, v.total_null))

    def merge(self, other: Tally) -> None:
        """Add another's texts."""
        self.texts += other.texts
        self.totals += other.totals
        for name, group in other.groups.items():
            self._add(name, group)

    def _add(self, name: tuple[str, str], group: Group) -> None:
        self.groups[name] = self.groups[name].merge(group) if name in self.groups else group


# --- evaluate -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One text under one intervention: per-token losses in nats of the clean and the edited pass, at `positions`.

    `mean_loss` and `delta` are means over the tokens scored, `error` the standard error of `delta` over `blocks` of them.
    """

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
    mean_loss: float
    delta: float
    error: float
    blocks: int

    @classmethod
    def of(
        cls,
        text: str,
        intervention: str,
        positions: np.ndarray,
        loss: np.ndarray,
        clean_loss: np.ndarray,
        **rest: Any,
    ) -> Run:
        """Average over the tokens."""
        delta = loss - clean_loss
        error, blocks = _block_error(delta)
        numbers = (mean(loss), mean(delta), error, blocks)
        given = {"positions": positions, "loss": loss, "clean_loss": clean_loss} | rest
        given |= dict(zip(("mean_loss", "delta", "error", "blocks"), numbers, strict=True))
        return cls(text, intervention, len(positions), **given)

    def slim(self) -> Run:
        """Let the tokens go."""
        return replace(self, positions=NOTHING, loss=NOTHING, clean_loss=NOTHING)


@dataclass
class Curve:
    """Mean loss by position, over many texts."""

    total: np.ndarray = field(default_factory=lambda: NOTHING)
    count: np.ndarray = field(default_factory=lambda: NOTHING)

    def add(self, positions: np.ndarray, losses: np.ndarray, counts: np.ndarray | float = 1.0) -> None:
        """Add summed losses, and how many of them, at some positions."""
        short = int(positions.max(initial=-1)) + 1 - len(self.total)
        if short > 0:
            self.total, self.count = (np.pad(x, (0, short)) for x in (self.total, self.count))
        self.total[positions] += losses
        self.count[positions] += counts

    def merge(self, other: Curve) -> None:
        """Add another's."""
        self.add(np.arange(len(other.total)), other.total, other.count)


@dataclass
class Effects:
    """Runs of many texts; where `per_text` is off, their tokens are averaged by position as they come.

    `located` says, by text, how edits were made that leave open where; `tokens` are the texts', where `per_text` keeps them.
    """

    per_text: bool
    runs: list[Run] = field(default_factory=list)
    curves: dict[str, Curve] = field(default_factory=dict)
    located: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, runs: Sequence[Run], located: dict[str, str], text: TextTokens | None = None) -> None:
        """Add a text's runs, what was located in it (edits as written -> as made), and its tokens, if they are shown."""
        if self.per_text and text is not None:
            self.tokens[text.label] = text.strings
        if located:
            self.located[runs[0].text] = located
        for run in runs:
            if not self.per_text:
                self.curves.setdefault(run.intervention, Curve()).add(run.positions, run.loss)
            self.runs.append(run if self.per_text else run.slim())

    def merge(self, other: Effects) -> None:
        """Add another's runs."""
        self.runs += other.runs
        self.located |= other.located
        self.tokens |= other.tokens
        for name, curve in other.curves.items():
            self.curves.setdefault(name, Curve()).merge(curve)

    def table(self) -> pd.DataFrame:
        """Give loss by position: of every text, or the mean over `all`."""
        if self.per_text:
            found = [(r.text, r.intervention, r.positions, r.loss) for r in self.runs]
        else:
            found = []
            for name, curve in self.curves.items():
                at = curve.count.nonzero()[0]
                found.append((ALL, name, at, curve.total[at] / curve.count[at]))
        pieces = [pd.DataFrame({"text": t, "intervention": i, "position": p, "loss": v}) for t, i, p, v in found]
        return pd.concat(pieces, ignore_index=True)


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
