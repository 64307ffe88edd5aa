"""Going on after an interruption: what is finished is kept on disk, batch by batch, until the report is written.

A batch is the unit, since the texts that share a forward pass share its rounding: a run that goes on ends with the very
numbers of one that was never stopped. Files hold arrays and JSON, never pickles, and are moved into place when whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sinkscope.errors import SinkscopeError
from sinkscope.metrics.accumulate import Moments
from sinkscope.metrics.values import Value
from sinkscope.results import Group, Run, Tally, TextResult
from sinkscope.runs.share import Share
from sinkscope.tokens import TextTokens

#: Folder in the output directory; there only while a run is unfinished.
FOLDER, LOCK = "unfinished", "lock"
Arrays = dict[str, Any]


@contextmanager
def claimed(directory: str | Path | None) -> Iterator[None]:
    """Have a directory to oneself: a second run in it at the same time is refused. The lock of a killed run is gone with it.

    Raises:
        SinkscopeError: another process works there, or it can't be written.
    """
    if directory is None:
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(directory).expanduser() / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
        lock.acquire()
    except Timeout:
        raise SinkscopeError(
            f"another run is writing to {str(directory)!r}: wait for it, or give another directory"
        ) from None
    except OSError as error:
        raise SinkscopeError(f"can't write to the directory {str(directory)!r}: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()
        if not lock.is_locked and folder.is_dir() and {p.name for p in folder.iterdir()} <= {LOCK}:
            shutil.rmtree(folder, ignore_errors=True)


def forget(directory: str | Path) -> None:
    """Drop what is finished: the report has been written."""
    for path in (Path(directory).expanduser() / FOLDER).glob("*.npz"):
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Store:
    """Where a run keeps what is finished: files named by all that the numbers in them depend on.

    Attributes:
        folder: where; None keeps nothing.
        run: everything that the numbers depend on besides the texts.
    """

    folder: Path | None
    run: str

    @classmethod
    def of(cls, directory: str | Path | None, run: Mapping[str, Any]) -> Store:
        """Take up a run in a directory, or in none."""
        folder = None if directory is None else Path(directory).expanduser() / FOLDER
        return cls(folder, json.dumps(run, sort_keys=True, default=str))

    def name(self, sequences: Sequence[TextTokens]) -> str:
        """Give the name that stands for these texts in this run."""
        digest = hashlib.sha256(self.run.encode())
        for s in sequences:
            digest.update(s.label.encode() + b"\0" + s.ids.numpy().tobytes() + b"\0")
        return digest.hexdigest()[:32]

    def read(self, name: str) -> tuple[Any, Arrays] | None:
        """Give what was kept under a name; None where there is nothing whole."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
            return json.loads(str(found.pop("about"))), found
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # not whole, or not ours: it is simply run again

    def write(self, name: str, about: Any, arrays: Arrays) -> None:
        """Keep arrays, and what JSON can hold, under a name.

        Raises:
            SinkscopeError: they can't be written; what was kept before is still there.
        """
        if self.folder is None:
            return
        path = self.folder / f"{name}.npz"
        half = path.with_suffix(".half")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with half.open("wb") as file:
                np.savez(file, about=np.array(json.dumps(about)), **arrays)
            half.replace(path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise SinkscopeError(
                f"can't write to {str(self.folder)!r}: {error.strerror}. What is finished stays there: the same call goes on"
            ) from None


# --- measure: texts whose numbers are all kept, or running means of them -----------------------------------------------


class Finished:
    """Texts each of whose numbers are kept: a file per batch."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.results: list[TextResult] = []

    def has(self, sequences: Sequence[TextTokens]) -> bool:
        """Take up a batch if it was finished before."""
        about, arrays = self.store.read(self.store.name(sequences)) or ([], {})
        if len(about) != len(sequences):
            return False
        self.results += [
            TextResult(s, tuple(_value(v, arrays, f"{row}-{i}") for i, v in enumerate(values)))
            for row, (s, values) in enumerate(zip(sequences, about, strict=True))
        ]
        return True

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
        about, arrays = store.read(self.file) or ({}, {})
        if about:
            self.batches = about["batches"]
            self.tally.texts = [(label, n) for label, n in about["texts"]]
            self.tally.totals = [(label, name, value, null) for label, name, value, null in about["totals"]]
            groups = [_group(g, arrays, str(i)) for i, g in enumerate(about["groups"])]
            self.tally.groups = {(g.name, g.tag): g for g in groups}
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
    return {name: getattr(value, name) for name in ("name", "tag", "key", "axes", "total", "total_null")}


def _value(fields: dict[str, Any], arrays: Arrays, at: str) -> Value:
    return Value(**fields | {"axes": tuple(fields["axes"])}, value=arrays[f"{at}-value"], null=arrays[f"{at}-null"])


#: The moments of a group, and the arrays of moments.
MOMENTS, ARRAYS = ("value", "null", "total", "total_null"), ("count", "mean", "m2")


def _kept_group(group: Group, arrays: Arrays, at: str) -> dict[str, Any]:
    """Put a group's moments among the arrays; the rest JSON can hold."""
    held = [name for name in MOMENTS if getattr(group, name) is not None]
    arrays.update({f"{at}-{name}-{of}": getattr(getattr(group, name), of) for name in held for of in ARRAYS})
    return {"name": group.name, "tag": group.tag, "key": group.key, "axes": group.axes, "held": held}


def _group(about: dict[str, Any], arrays: Arrays, at: str) -> Group:
    held: dict[str, Any] = dict.fromkeys(MOMENTS)
    held |= {name: Moments(*(arrays[f"{at}-{name}-{of}"] for of in ARRAYS)) for name in about["held"]}
    return Group(about["name"], about["tag"], about["key"], tuple(about["axes"]), **held)


# --- evaluate -------------------------------------------------------------------------------------------------------


#: A text's runs, and what was located in it: the edits as written -> as they were made.
Found = tuple[list[Run], dict[str, str]]


def kept_runs(store: Store, sequence: TextTokens) -> Found | None:
    """Give a text's runs if they were finished before."""
    about, arrays = store.read(store.name([sequence])) or ({}, {})
    if not about:
        return None
    return [Run(**r, **{of: arrays[f"{i}-{of}"] for of in CURVES}) for i, r in enumerate(about["runs"])], about["located"]


def keep_runs(store: Store, sequence: TextTokens, found: Found) -> None:
    """Keep a text's runs."""
    runs, located = found
    arrays = {f"{i}-{of}": getattr(run, of) for i, run in enumerate(runs) for of in CURVES}
    about = [{f.name: getattr(run, f.name) for f in fields(run) if f.name not in CURVES} for run in runs]
    store.write(store.name([sequence]), {"runs": about, "located": located}, arrays)


CURVES = ("positions", "loss", "clean_loss")
