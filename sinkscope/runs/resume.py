"""Going on after an interruption: what is finished is kept on disk, batch by batch, until the report is written.

A batch is the unit, since the texts that share a forward pass share its rounding: a run that goes on ends with the very
numbers of one that was never stopped. What was kept and is damaged, or looks otherwise than it must, is run again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import count
from typing import Any, TypeVar

from sinkscope.errors import SinkscopeError
from sinkscope.metrics.accumulate import Moments
from sinkscope.metrics.values import Value
from sinkscope.results import Group, Run, Tally, TextResult
from sinkscope.runs.schema import fits
from sinkscope.runs.share import Share
from sinkscope.runs.store import FOLDER, LOCK, Arrays, Store, claimed, forget
from sinkscope.tokens import TextTokens

__all__ = ["FOLDER", "LOCK", "Finished", "Running", "Store", "claimed", "forget", "keep_runs", "kept_runs"]

T = TypeVar("T")
#: What the JSON of a value, of a file of running means and of a file of `evaluate` looks like.
NAMED = {"name": str, "tag": str, "key": int | None, "axes": [str], "heads": [int]}
VALUE = NAMED | {"total": float | None, "total_null": float | None}
RUNNING = {"batches": [str], "texts": [(str, int)], "totals": [(str, str, float, float)], "groups": [NAMED | {"held": [str]}]}
RUN: dict[str, Any] = {"text": str, "intervention": str, "sink_token": str}
RUN |= dict.fromkeys(("tokens", "sink_position", "blocks"), int)
RUN |= dict.fromkeys(("kl", "agreement", "sink_mass", "mean_loss", "delta", "error"), float)
RUNS = {"runs": [RUN], "located": {...: str}}


def _taken_up(store: Store, name: str, shape: Any, build: Callable[[Any, Arrays], T]) -> T | None:
    """Build what was kept; None where nothing was, or something else: it is run again."""
    kept = store.read(name)
    if kept is None:
        return None
    try:
        fits(kept[0], shape)
        return build(*kept)
    except Exception:  # forged: whatever it makes the building raise
        return None


# --- measure: texts whose numbers are all kept, or running means of them -----------------------------------------------


class Finished:
    """Texts each of whose numbers are kept: a file per batch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.results: list[TextResult] = []

    def has(self, sequences: Sequence[TextTokens]) -> bool:
        """Take up a batch if it was finished before."""
        found = _taken_up(
            self.store,
            self.store.name(sequences),
            [[VALUE]],
            lambda about, arrays: [
                TextResult(s, tuple(_value(v, arrays, f"{row}-{i}") for i, v in enumerate(values)))
                for row, (s, values) in enumerate(zip(sequences, about, strict=True))
            ],
        )
        self.results += found or []
        return found is not None

    def add(self, results: Sequence[TextResult]) -> None:
        """Keep a batch's results."""
        arrays = {
            f"{row}-{i}-{what}": getattr(value, what)
            for row, result in enumerate(results)
            for i, value in enumerate(result.values)
            for what in ("value", "null")
        }
        about = [[_fields(v) for v in r.values] for r in results]
        self.store.write(self.store.name([r.sequence for r in results]), about, arrays)
        self.results += results

    def close(self) -> None:
        """Do nothing: every batch has its file."""

    def end(self, share: Share, labels: Sequence[str]) -> tuple[Tally, list[TextResult]]:
        """Give all texts of all processes, in order."""
        found = {r.sequence.label: r for part in share.gather(self.results) for r in part}
        results = [found[label] for label in labels]
        tally = Tally()
        for result in results:
            tally.add(result)
        return tally, results


class Running:
    """Running means over texts, for as many of them as there are: one file, with a few numbers per text.

    It is written after every batch while that is quick, and then so often that it takes a twentieth of the time.
    """

    def __init__(self, store: Store, share: Share) -> None:
        """Take up what was finished before.

        Args:
            store: where.
            share: each process has a file of its own.
        """
        self.store = store
        self.file = f"{store.name([])}-{share.rank}-of-{share.world}"
        self.tally = Tally()
        self.batches: list[str] = []
        found = _taken_up(store, self.file, RUNNING, lambda about, arrays: (about["batches"], _tally(about, arrays)))
        if found is not None:
            self.batches, self.tally = found
        self._taken, self._seen = len(self.batches), 0
        self._unsaved, self._next = False, 0.0

    def has(self, sequences: Sequence[TextTokens]) -> bool:
        """Tell whether a batch is among those taken up.

        Raises:
            SinkscopeError: the texts are not those of the run that was interrupted.
        """
        if self._seen == self._taken:
            return False
        if self.batches[self._seen] != self.store.name(sequences):
            raise self._other_texts()
        self._seen += 1
        return True

    def add(self, results: Sequence[TextResult]) -> None:
        """Add a batch's results."""
        self._unsaved = False  # while it is half added
        for result in results:
            self.tally.add(result)
        if self.store.folder is not None:
            self.batches.append(self.store.name([r.sequence for r in results]))
            self._unsaved = True
            if time.monotonic() >= self._next:
                self.close()

    def close(self) -> None:
        """Write what has not been written yet."""
        if self._unsaved:
            start, arrays = time.monotonic(), Arrays()
            groups = [_kept_group(g, arrays, str(i)) for i, g in enumerate(self.tally.groups.values())]
            about = {"batches": self.batches, "texts": self.tally.texts, "totals": self.tally.totals, "groups": groups}
            self.store.write(self.file, about, arrays)
            self._unsaved = False
            self._next = time.monotonic() + 20 * (time.monotonic() - start)

    def end(self, share: Share, labels: Sequence[str]) -> tuple[Tally, list[TextResult]]:
        """Give the means over the texts of all processes, and no single text."""
        if self._seen < self._taken:
            raise self._other_texts()
        tally, *others = share.gather(self.tally)
        for other in others:
            tally.merge(other)
        place = dict(zip(labels, count()))
        tally.texts.sort(key=lambda text: place[text[0]])
        tally.totals.sort(key=lambda total: place[total[0]])
        return tally, []

    def _other_texts(self) -> SinkscopeError:
        return SinkscopeError(
            f"{str(self.store.folder)!r} holds the beginning of this run on other texts: give the same texts in the same "
            "order, or delete it to begin anew"
        )


def _fields(value: Value) -> dict[str, Any]:
    return {name: getattr(value, name) for name in ("name", "tag", "key", "axes", "total", "total_null")} | _heads(value)


def _heads(of: Value | Group) -> dict[str, Any]:
    return {"heads": of.heads or ()}


def _axes(fields: dict[str, Any]) -> dict[str, Any]:
    """Give axes and heads as they were before JSON."""
    return {"axes": tuple(fields["axes"]), "heads": tuple(fields["heads"]) or None}


def _value(fields: dict[str, Any], arrays: Arrays, at: str) -> Value:
    return Value(**fields | _axes(fields), value=arrays[f"{at}-value"], null=arrays[f"{at}-null"])


#: The moments of a group, and the arrays of moments.
MOMENTS, ARRAYS = ("value", "null", "total", "total_null"), ("count", "mean", "m2")


def _kept_group(group: Group, arrays: Arrays, at: str) -> dict[str, Any]:
    """Put a group's moments among the arrays; the rest JSON can hold."""
    held = [name for name in MOMENTS if getattr(group, name) is not None]
    arrays.update({f"{at}-{name}-{of}": getattr(getattr(group, name), of) for name in held for of in ARRAYS})
    return {"name": group.name, "tag": group.tag, "key": group.key, "axes": group.axes, "held": held} | _heads(group)


def _tally(about: dict[str, Any], arrays: Arrays) -> Tally:
    groups = [_group(g, arrays, str(i)) for i, g in enumerate(about["groups"])]
    texts, totals = ([tuple(row) for row in about[name]] for name in ("texts", "totals"))
    return Tally({(g.name, g.tag): g for g in groups}, totals, texts)


def _group(about: dict[str, Any], arrays: Arrays, at: str) -> Group:
    held: dict[str, Any] = dict.fromkeys(MOMENTS)
    held |= {name: Moments(*(arrays[f"{at}-{name}-{of}"] for of in ARRAYS)) for name in about["held"]}
    return Group(about["name"], about["tag"], about["key"], **_axes(about), **held)


# --- evaluate -------------------------------------------------------------------------------------------------------


#: A text's runs, and what was located in it: the edits as written -> as they were made.
Found = tuple[list[Run], dict[str, str]]


def kept_runs(store: Store, sequence: TextTokens, *beside: TextTokens) -> Found | None:
    """Give a text's runs if they were finished before; they may depend on texts `beside` it."""

    def build(about: Any, arrays: Arrays) -> Found:
        runs = [Run(**r, **{of: arrays[f"{i}-{of}"] for of in CURVES}) for i, r in enumerate(about["runs"])]
        return runs, about["located"]

    return _taken_up(store, store.name([sequence, *beside]), RUNS, build)


def keep_runs(store: Store, found: Found, sequence: TextTokens, *beside: TextTokens) -> None:
    """Keep a text's runs."""
    runs, located = found
    arrays = {f"{i}-{of}": getattr(run, of) for i, run in enumerate(runs) for of in CURVES}
    about = [{f.name: getattr(run, f.name) for f in fields(run) if f.name not in CURVES} for run in runs]
    store.write(store.name([sequence, *beside]), {"runs": about, "located": located}, arrays)


CURVES = ("positions", "loss", "clean_loss")
