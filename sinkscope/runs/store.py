"""A folder for what is finished of a run: files with a digest, named by all that the numbers in them depend on.

Files hold arrays and JSON, never pickles, and are moved into place when whole. What is damaged is not there; no link is
followed, and nothing is deleted that was not written here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sinkscope.errors import SinkscopeError
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.tokens import TextTokens

#: Folder in the output directory, there only while a run is unfinished; in it the lock, and the files.
FOLDER, LOCK = "unfinished", "sinkscope.lock"
OURS = re.compile(r"[0-9a-f]{32}(-\d+-of-\d+)?\.(npz|half)")
Arrays = dict[str, Any]


def folder_of(directory: str | Path) -> Path:
    """Give the folder in a directory.

    Raises:
        SinkscopeError: it is a link.
    """
    folder = Path(directory).expanduser() / FOLDER
    for path in (folder, folder / LOCK):
        if path.is_symlink():
            raise SinkscopeError(f"{str(path)!r} is a link, which is not followed: remove it, or give another directory")
    return folder


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

    folder = folder_of(directory)
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
        with suppress(OSError):
            if not lock.is_locked and {p.name for p in folder.iterdir()} <= {LOCK}:
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()


def forget(directory: str | Path) -> None:
    """Drop what is finished: the report has been written."""
    folder = folder_of(directory)
    for path in folder.iterdir() if folder.is_dir() else ():
        if OURS.fullmatch(path.name):
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
        """Take up a run in a directory, or in none; what JSON can't hold of what it depends on counts by its digest."""
        folder = None if directory is None else folder_of(directory)
        return cls(folder, json.dumps(run, sort_keys=True, default=fingerprint))

    def name(self, sequences: Sequence[TextTokens]) -> str:
        """Give the name that stands for these texts in this run."""
        digest = hashlib.sha256(self.run.encode())
        for s in sequences:
            digest.update(s.label.encode() + b"\0" + s.ids.numpy().tobytes() + b"\0")
            if s.source is not None:
                digest.update(s.source.ids.numpy().tobytes() + b"\0\0")
            for given in (*s.tensors, *(() if s.source is None else s.source.tensors)):
                digest.update(f"{given.dtype} {tuple(given.shape)}\0".encode())
                digest.update(given.contiguous().view(torch.uint8).numpy().tobytes() + b"\0\0\0")
        return digest.hexdigest()[:32]

    def read(self, name: str) -> tuple[Any, Arrays] | None:
        """Give what was kept under a name; None where there is nothing whole."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is None or path.is_symlink() or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
            about, digest = (str(found.pop(part)) for part in ("about", "digest"))
            return (json.loads(about), found) if digest == _digest(name, about, found) else None
        except Exception:  # not whole, or not ours, whatever it makes the readers raise: it is simply run again
            return None

    def write(self, name: str, about: Any, arrays: Arrays) -> None:
        """Keep arrays, and what JSON can hold, under a name.

        Raises:
            SinkscopeError: they can't be written; what was kept before is still there.
        """
        if self.folder is None:
            return
        path = self.folder / f"{name}.npz"
        half = path.with_suffix(".half")
        text = json.dumps(about)
        arrays = {key: np.asarray(array) for key, array in arrays.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            half.unlink(missing_ok=True)  # of a killed run; or a link
            with half.open("xb") as file:
                np.savez(file, about=np.array(text), digest=np.array(_digest(name, text, arrays)), **arrays)
            half.replace(path)
        except OSError as error:
            with suppress(OSError):
                half.unlink(missing_ok=True)
            raise SinkscopeError(
                f"can't write to {str(self.folder)!r}: {error.strerror}. What is finished stays there: the same call goes on"
            ) from None


def _digest(name: str, about: str, arrays: Arrays) -> str:
    """Digest what is in a file, and its name: a file under another's name is not what it says."""
    digest = hashlib.sha256(f"{name}\0{about}\0".encode())
    for key in sorted(arrays):
        array = np.ascontiguousarray(arrays[key])
        digest.update(f"{key} {array.dtype.str} {arrays[key].shape}\0".encode() + array.tobytes())
    return digest.hexdigest()
