"""Edits beside their placebos, and beside each other: what of a difference is the edit's own, and what could be chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from sinkscope.errors import SinkscopeError
from sinkscope.results import ALL

#: Permutations of a test that does not go through all of them: up to 13 texts, it does.
PERMUTATIONS = 9999
#: What a summary says of an edit's placebos.
COLUMNS = ("placebos", "placebo_delta_loss", "placebo_std", "placebo_p")


@dataclass(frozen=True)
class EffectTest:
    """A paired permutation test of two edits, across texts.

    Attributes:
        a: an edit.
        b: another, or what stands for the first one's placebos.
        difference: mean over texts of what `a` changes the loss by, less what `b` does, in nats per token.
        p_value: share of the ways to swap the two within texts that give a mean at least as far from 0; two-sided.
        texts: how many there are; with fewer than 6, no p-value is below 0.05.
        exact: whether all ways were gone through, else 9,999 of them.
    """

    a: str
    b: str
    difference: float
    p_value: float
    texts: int
    exact: bool

    def __str__(self) -> str:
        """Say it in a line."""
        how = "" if self.exact else f", {PERMUTATIONS:,} permutations"
        return (
            f"{self.a} against {self.b}: {self.difference:+.4f} nats per token, p = {self.p_value:.2g} (paired permutation "
            f"test, {self.texts} texts{how})"
        )


def tested(frame: pd.DataFrame, a: str, others: Sequence[str], b: str) -> EffectTest:
    """Test one edit against the mean of others, text by text; `frame` is :class:`EffectReport`'s, `b` what they are called.

    Raises:
        SinkscopeError: there are not two texts with a difference for each.
    """
    table = _by_text(frame)
    pairs = pd.DataFrame({"a": table[a], "b": table[list(others)].mean(axis=1, skipna=False)}).dropna()
    if len(pairs) < 2:
        raise SinkscopeError(
            f"a paired test needs at least two texts in which both {a} and {b} have a difference to the unedited run; there "
            f"{'is one' if len(pairs) == 1 else 'is none'}: give evaluate several texts"
        )
    x, y = pairs["a"].to_numpy(float), pairs["b"].to_numpy(float)
    return EffectTest(a, b, float((x - y).mean()), paired_p(x, y), len(pairs), 2 ** len(pairs) <= PERMUTATIONS)


def paired_p(x: Float[np.ndarray, " text"], y: Float[np.ndarray, " text"]) -> float:
    """Give the two-sided p-value of a paired permutation test of means.

    >>> paired_p(np.array([1.0, 2.0, 3.0]), np.zeros(3))  # 2 of the 8 ways to swap
    0.25
    """
    from scipy.stats import permutation_test

    found = permutation_test(
        (x, y),
        lambda a, b, axis: (a - b).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        random_state=0,
    )
    return float(found.pvalue)


def beside(frame: pd.DataFrame, names: Sequence[str], text: str, placebos: Mapping[str, str]) -> pd.DataFrame:
    """Give a row per edit: how many placebos it has, their mean difference, its spread over them, and the test's p-value.

    Args:
        frame: :class:`EffectReport`'s.
        names: the edits.
        text: a text's label, or `all`, which alone is tested.
        placebos: placebo -> edit.
    """
    delta = frame[frame["text"] == text].set_index("intervention")["delta_loss"]
    rows = [_row(frame, name, [p for p, of in placebos.items() if of == name], delta, text == ALL) for name in names]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"placebos": int})


def _row(frame: pd.DataFrame, name: str, mine: Sequence[str], delta: pd.Series, test: bool) -> tuple[Any, ...]:
    if not mine:
        return 0, math.nan, math.nan, math.nan
    values = delta[list(mine)]
    try:
        p = tested(frame, name, mine, "its placebos").p_value if test else math.nan
    except SinkscopeError:  # one text
        p = math.nan
    return len(mine), float(values.mean()), float(values.std(ddof=1)), p


def _by_text(frame: pd.DataFrame) -> pd.DataFrame:
    """Give the differences by text and edit."""
    return frame[frame["text"] != ALL].pivot(index="text", columns="intervention", values="delta_loss")


def words(row: Mapping[Any, Any]) -> str:
    """Say in a table's cell what placebos did: mean, spread, p-value; nothing where there are none."""
    if not row["placebos"] or math.isnan(row["placebo_delta_loss"]):
        return ""
    spread = "" if math.isnan(row["placebo_std"]) else f" ± {row['placebo_std']:.3f}"
    return f"{row['placebo_delta_loss']:+.3f}{spread}" + (
        "" if math.isnan(row["placebo_p"]) else f", p={row['placebo_p']:.2g}"
    )
