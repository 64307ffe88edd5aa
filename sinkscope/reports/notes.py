"""What a reader should know before reading the numbers: found in the numbers themselves, kept in `about["notes"]`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sinkscope.metrics import BUILT_IN
from sinkscope.metrics.base import AnyMetric
from sinkscope.reports.words import said
from sinkscope.results import NONE, Group, Run, Tally

#: A mean over texts mixes lengths where the longest has more than this many times the tokens of the shortest.
UNEQUAL = 1.5
#: Nats per token that two ways of computing the same may differ by.
ROUNDING = 1e-6


def of_measure(tally: Tally, asked: Iterable[AnyMetric], about: Mapping[str, Any]) -> list[str]:
    """Say what is odd about what `measure` found: texts of unequal length, metrics without a number."""
    lengths = [n for _, n in tally.texts]
    notes = []
    if max(lengths) > UNEQUAL * min(lengths):
        notes.append(
            f"the texts have {tokens_of(lengths)}: a mean over them mixes lengths, on which most numbers and all nulls "
            f"depend; {'' if 'reads' in about else 'max_tokens= makes them equal, '}summary(label) gives one text"
        )
    for group in tally.groups.values():
        notes += _of_metric(group, len(tally.texts))
    found = {group.name.partition("@")[0] for group in tally.groups.values()}
    missing = [m.name for m in asked if hasattr(m, "needs") and m.name.partition("@")[0] not in found]
    return [said(note, about) for note in notes] + [f"{name} gave no number" for name in missing]


def _of_metric(group: Group, texts: int) -> list[str]:
    """Say what is odd about one metric; built-in ones leave heads out on purpose, and profiles have no mean."""
    name, count = group.name + group.tag, group.value.count
    if name.partition("@")[0].partition("[")[0] == "sink_positions":
        return []  # that no position is a sink is a finding
    if not count.any():
        where = "head" if "head" in group.axes else "place"
        return [f"{name} is NaN for every {where}{'' if texts == 1 else ' of every text'}: it has no number"]
    if group.name.partition("@")[0] in BUILT_IN:
        return []
    if "key" in group.axes:
        return [f"{name} gives a number for every key: it is in .frame and top(), and has no row in the summary"]
    absent = int((count < texts).sum())
    if absent:
        return [f"{name} is NaN for {absent} of {count.size} heads, in some text or all: its means leave them out"]
    return []


def of_evaluate(runs: Sequence[Run], texts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which edits changed nothing at all: the same loss at every token, and a KL divergence of exactly 0."""
    lengths = {str(text["label"]): int(text["n_tokens"]) for text in texts}
    notes = []
    for name in dict.fromkeys(run.intervention for run in runs if run.intervention != NONE):
        mine = [run for run in runs if run.intervention == name]
        drawn = re.search(r"'(?:noise|shuffle|donor)'", name) is not None
        idle = [run.text for run in mine if _idle(run, drawn) or _too_wide(name, lengths[run.text])]
        if not idle:
            continue
        where = "" if len(idle) == len(mine) else f" in {_some(idle)}"
        why = ""
        if all(_too_wide(name, lengths[label]) for label in idle):
            why = f" (no key was evicted: {tokens_of([lengths[label] for label in idle])})"
        elif drawn:
            why = " (what was drawn equals what was there)"
        notes.append(f"{name} changed nothing{where}{why}")
    return notes


def _idle(run: Run, drawn: bool) -> bool:
    """Tell whether nothing changed; what was drawn in another pass is equal up to rounding."""
    return abs(run.kl) <= (ROUNDING if drawn else 0) and abs(run.delta) <= (ROUNDING if drawn else 0)


def _too_wide(name: str, tokens: int) -> bool:
    """Tell whether an edit is one window, and holds all tokens of a text."""
    size = re.fullmatch(r"(?:sink_|streaming_|recompute_)?window\(size=(\d+)[^&]*\)", name)
    return size is not None and int(size[1]) >= tokens


def _some(labels: Sequence[str]) -> str:
    """Name a few texts."""
    return ", ".join(map(repr, labels[:3])) + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def tokens_of(lengths: Sequence[int]) -> str:
    """Say how long texts are.

    >>> tokens_of([5, 1265]), tokens_of([7, 7])
    ('5 to 1,265 tokens', '7 tokens')
    """
    low, high = min(lengths), max(lengths)
    return f"{low:,} tokens" if low == high else f"{low:,} to {high:,} tokens"
