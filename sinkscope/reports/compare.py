"""Reports side by side: the same texts pair by pair, others as two independent samples, and what makes them incomparable."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports import intervals
from sinkscope.reports.notes import tokens_of
from sinkscope.results import ALL

if TYPE_CHECKING:
    from sinkscope.reports.sink import SinkReport

#: Letters of a text that are compared, and the share of them that must agree: tokenizers write a text differently.
LETTERS, ALIKE = 200, 0.9


def side_by_side(reports: Mapping[str, SinkReport]) -> pd.DataFrame:
    """Put the summaries of several reports into one table, with the differences to the first.

    Args:
        reports: name to report.

    Returns:
        Indexed by metric; for every report the columns `NAME` (value) and `NAME null`. Then, for every report after the
        first, `NAME - FIRST` (of the texts which have both numbers, if these are compared pair by pair), its `low` and
        `high`, and `interval` and `note` as in :meth:`SinkReport.compare`. A metric that a report does not have is NaN there.

    Raises:
        SinkscopeError: fewer than two reports, or reports of different kinds.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    columns = {}
    for name, report in reports.items():
        rows = report.summary(ALL).set_index("metric")
        columns[name], columns[f"{name} null"] = rows["value"], rows["null"]
    order = dict.fromkeys(m for report in reports.values() for m in report.summary(ALL)["metric"])
    (first, base), *others = reports.items()
    for name, report in others:
        rows = compared(base, report).set_index("metric")
        title = f"{name} - {first}"
        columns[title] = rows["difference"]
        columns |= {f"{title} {column}": rows[column] for column in ("low", "high", "interval", "note")}
    return pd.DataFrame(columns).reindex(list(order))


def compared(first: SinkReport, second: SinkReport) -> pd.DataFrame:
    """Compare two reports metric by metric; see :meth:`SinkReport.compare`."""
    columns = ["metric", "value", "std_error", "null"]
    both = first.summary(ALL)[columns].merge(second.summary(ALL)[columns], on="metric", suffixes=("", "_other"))
    why = _why_not_paired(first, second)
    ours, theirs = _by_text(first), _by_text(second)
    mean = float(np.mean([text["n_tokens"] for report in (first, second) for text in report.about["texts"]]))
    found, differences, notes = [], [], []
    for row in both.to_dict("records"):
        name = row["metric"]
        difference = row["value_other"] - row["value"]
        if name not in ours or name not in theirs:
            found.append(intervals.Interval(np.nan, np.nan, "none: about the texts together"))
        else:
            pair = [table[name].dropna() for table in (ours, theirs)]
            if not why:
                pair = list(map(pd.Series, pair[0].align(pair[1], join="inner")))
                difference = float((pair[1] - pair[0]).mean()) if len(pair[0]) else np.nan
            bounds = intervals.bounds_of(name, mean, _units(first, second))
            one, other = (p.to_numpy(float) for p in pair)
            found.append(intervals.of_difference(one, other, bounds, paired=not why))
        differences.append(difference)
        notes.append(_note(row, why))
    low, high, said = zip(*found, strict=True) if found else ((), (), ())
    return both.assign(difference=differences, low=low, high=high, interval=said, note=notes)


def _by_text(report: SinkReport) -> pd.DataFrame:
    """Lay out the numbers of single texts, a row per text and a column per metric."""
    return report.totals[report.totals["text"] != ALL].pivot(index="text", columns="metric", values="value")


def _units(*reports: SinkReport) -> dict[str, str]:
    return {name: unit for report in reports for name, unit in report.about.get("units", {}).items()}


def _why_not_paired(first: SinkReport, second: SinkReport) -> str:
    """Say why texts can't be compared pair by pair; empty where they can."""
    ours, theirs = ({t["label"]: t for t in r.about["texts"]} for r in (first, second))
    if ours.keys() != theirs.keys():
        return "other texts"
    if not all(_alike(text, theirs[label]) for label, text in ours.items()):
        return "other texts of the same labels"
    return ""


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Tell whether two texts may be the same: their first letters agree, or are not known."""
    a, b = (_letters(text.get("tokens", [])) for text in (one, other))
    return not a or not b or SequenceMatcher(None, a, b, autojunk=False).ratio() >= ALIKE


def _letters(tokens: list[str]) -> str:
    """Letters and digits of a text's beginning without accents, case and special tokens, which differ between tokenizers."""
    words = "".join(t for t in tokens[: 2 * LETTERS] if not (t[:1] + t[-1:] in ("<>", "[]") and len(t) > 2))
    plain = unicodedata.normalize("NFKD", words).casefold()
    return "".join(c for c in plain if c.isascii() and c.isalnum())[:LETTERS]


def _note(row: Mapping[Any, Any], why: str) -> str:
    """Say what makes two numbers hard to compare."""
    null, other = row["null"], row["null_other"]
    differ = not (np.isnan(null) or np.isnan(other) or np.isclose(null, other, rtol=0.01, atol=1e-12))
    chance = f"chance differs: {null:.3g} and {other:.3g}" if differ else ""
    return "; ".join(filter(None, (why, chance)))


def lengths_differ(reports: Mapping[str, SinkReport]) -> str:
    """Say how long the texts of each report are, where these lengths differ; empty where they don't."""
    lengths = {name: [t["n_tokens"] for t in report.about["texts"]] for name, report in reports.items()}
    if len({tuple(sorted(of)) for of in lengths.values()}) == 1:
        return ""
    said = "; ".join(f"{name}: {tokens_of(of)}" for name, of in lengths.items())
    return (
        f"the texts' lengths differ ({said}), and with them chance and most numbers: compare beyond chance, "
        "or cut them with max_tokens="
    )
