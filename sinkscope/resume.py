"""Going on after an interruption: what is finished is kept on disk, batch by batch, until the report is written.

A batch is the unit, since the texts that share a forward pass share its rounding: a run that goes on ends with the very
numbers of one that was never stopped. Files hold arrays and JSON, never pickles, and are moved into place when whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinkscope.report import TextResult, Value
from sinkscope.tokens import Batch

#: Folder in the output directory; there only while a run is unfinished.
FOLDER = "unfinished"


class Finished:
    """The finished batches of a run, or nothing at all where no directory is given."""

    def __init__(self, directory: str | Path | None, run: Mapping[str, Any]) -> None:
        """Take up a run.

        Args:
            directory: where to keep batches; None keeps none.
            run: everything that the numbers depend on besides the texts; another run's batches are not taken up.
        """
        self.folder = None if directory is None else Path(directory).expanduser() / FOLDER
        self.run = json.dumps(run, sort_keys=True, default=str)

    def load(self, batch: Batch) -> list[TextResult] | None:
        """Give a batch's results if it was finished before."""
        path = self._path(batch)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about = json.loads(str(arrays["about"]))
                return [
                    TextResult(
                        sequence,
                        tuple(
                            Value(**fields, value=arrays[f"{row}-{i}-value"], null=arrays[f"{row}-{i}-null"])
                            for i, fields in enumerate(map(_with_tuple, about[row]))
                        ),
                    )
                    for row, sequence in enumerate(batch.sequences)
                ]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error):
            return None  # not whole, or not ours: the batch is simply run again

    def store(self, batch: Batch, results: Sequence[TextResult]) -> None:
        """Keep a batch's results."""
        path = self._path(batch)
        if path is None:
            return
        arrays: dict[str, Any] = {"about": np.array(json.dumps([[_fields(v) for v in r.values] for r in results]))}
        for row, result in enumerate(results):
            for i, value in enumerate(result.values):
                arrays[f"{row}-{i}-value"], arrays[f"{row}-{i}-null"] = value.value, value.null
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        with half.open("wb") as file:
            np.savez(file, **arrays)
        half.replace(path)

    def _path(self, batch: Batch) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(self.run.encode())
        for s in batch.sequences:
            digest.update(s.label.encode() + b"\0" + s.ids.numpy().tobytes() + b"\0")
        return self.folder / f"{digest.hexdigest()[:32]}.npz"


def _fields(value: Value) -> dict[str, Any]:
    return {name: getattr(value, name) for name in ("name", "tag", "key", "axes", "total", "total_null")}


def _with_tuple(fields: dict[str, Any]) -> dict[str, Any]:
    return fields | {"axes": tuple(fields["axes"])}


def forget(directory: str | Path) -> None:
    """Drop the finished batches: the report has been written."""
    shutil.rmtree(Path(directory).expanduser() / FOLDER, ignore_errors=True)
