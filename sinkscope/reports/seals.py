"""Seals: what says that a directory holds a whole report, by the digest of every file; and how one takes another's place.

A report is written into a hidden folder beside the old one (`HALF`). When all of it is there, its seal last, the folder gets
the name `WHOLE`: from that moment on the directory holds the new report, wherever its files stand. They are then moved into
place, the seal last. So a kill or a full disk at any moment leaves the old report or the new one, never a mix.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.runs.schema import fits

#: Written last: a directory without it holds no whole report.
SEAL = "summary.json"
HALF, WHOLE = ".sinkscope-half", ".sinkscope-whole"
#: The files of a report: never a path that leads elsewhere.
NAME = re.compile(r"[A-Za-z0-9_-]+\.(csv|parquet|png|html|json)")
#: What a report of 0.1.0, whose seal lists no files, may consist of.
OLD = tuple(f"{stem}.png" for stem in ("heatmap", "progression", "distribution", "positions", "attention", "loss"))
OLD += tuple(
    f"{stem}{kind}"
    for stem in ("measurements", "summary", "attention", "effects", "details", "curves")
    for kind in (".csv", ".parquet")
)
OLD += ("report.html",)
Fill = Callable[[Path], Any]


def replace(path: Path, fills: Mapping[str, Fill], about: Mapping[str, Any]) -> None:
    """Put a report in the place of what a directory holds.

    Args:
        path: the directory.
        fills: file name -> what writes it.
        about: the seal; it gets the digests of the files.

    Raises:
        OSError: the folder can't be written; the old report is still there.
        SinkscopeError: a file can't be written, or a link stands in the way; likewise.
    """
    settle(path)
    half = path / HALF
    try:
        half.mkdir()
        for name, fill in fills.items():
            try:
                fill(half / name)
            except OSError as error:
                raise SinkscopeError(f"can't write {str(path / name)!r}: {error.strerror or error}") from None
        digests = {name: digest_of((half / name).read_bytes()) for name in fills}
        (half / SEAL).write_text(_sealed(about, digests), encoding="utf-8")
        half.rename(path / WHOLE)
    finally:
        _clear(half)
    settle(path)


def settle(path: Path) -> None:
    """Finish what a kill left: a half report goes, of a whole one every file takes its place."""
    _clear(path / HALF)
    whole = _no_link(path / WHOLE)
    names = _files(whole / SEAL)
    if names:
        for name in _left_over(path, names):
            (path / name).unlink(missing_ok=True)
        (path / SEAL).unlink(missing_ok=True)
        for name in names:
            if (whole / name).is_file():
                (whole / name).replace(path / name)
        (whole / SEAL).replace(path / SEAL)
    _clear(whole)


class Sealed:
    """A report in a directory, as it was saved.

    Attributes:
        about: the seal, without the digests.
    """

    def __init__(self, path: Path) -> None:
        """Read the seal.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged; says so.
        """
        whole = _no_link(path / WHOLE)
        self._places = [whole, path] if (whole / SEAL).is_file() else [path]
        text = (self._places[0] / SEAL).read_bytes()
        try:
            about = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{SEAL} is damaged: it is no JSON") from None
        fits(about, {}, SEAL)
        self._digests = about.pop("files", None)
        if self._digests is not None:
            fits(self._digests, {SEAL: str, ...: str}, f"{SEAL}: files")
            own = self._digests.pop(SEAL)
            if own != _own(about, self._digests):
                raise ValueError(f"{SEAL} is damaged: its checksum differs")
        self.about: dict[str, Any] = about

    def files(self) -> dict[str, bytes]:
        """Read every file that is there and that the seal names; of a report of 0.1.0 the tables, which nothing vouches for.

        Raises:
            ValueError: one is damaged; says which.
        """
        named = self._digests if self._digests is not None else [name for name in OLD if name.endswith(".parquet")]
        found = {}
        for name in named:
            at = next((place / name for place in self._places if (place / name).is_file()), None)
            if at is None or not NAME.fullmatch(name):
                continue
            found[name] = at.read_bytes()
            if self._digests is not None and digest_of(found[name]) != self._digests[name]:
                raise ValueError(f"{name} is damaged, or was changed: its checksum differs")
        return found


def digest_of(data: bytes) -> str:
    """Digest what a file holds."""
    return hashlib.sha256(data).hexdigest()


def _sealed(about: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    files = dict(digests) | {SEAL: _own(about, digests)}
    return json.dumps(dict(about) | {"files": files}, indent=1, ensure_ascii=False)


def _own(about: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """Digest a seal by what it says, however it is laid out."""
    said = json.loads(json.dumps([about, digests]))
    return digest_of(json.dumps(said, sort_keys=True).encode())


def _files(seal: Path) -> dict[str, str] | None:
    """Give the files that a seal names, with their digests; None of a report of 0.1.0, nothing of what is no seal."""
    try:
        about = json.loads(seal.read_bytes())
        if isinstance(about, dict) and "files" not in about:
            return None if "sinkscope" in about else {}
        return {name: str(digest) for name, digest in about["files"].items() if NAME.fullmatch(name) and name != SEAL}
    except Exception:  # whatever a damaged seal makes the readers raise
        return {}


def _left_over(path: Path, names: Iterable[str]) -> list[str]:
    """Give the files of the old report that the new one has not: those that are as they were written."""
    old = _files(path / SEAL)
    there = [name for name in (OLD if old is None else old) if name not in names and (path / name).is_file()]
    return there if old is None else [name for name in there if digest_of((path / name).read_bytes()) == old[name]]


def _clear(folder: Path) -> None:
    """Remove a folder of ours, in which nothing else should lie."""
    if _no_link(folder).is_dir():
        for file in folder.iterdir():
            if NAME.fullmatch(file.name):
                file.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:
            raise SinkscopeError(f"something else than a report is in the way, in {str(folder)!r}: remove it") from None


def _no_link(folder: Path) -> Path:
    if folder.is_symlink():
        raise SinkscopeError(f"{str(folder)!r} is a link, which is not followed: remove it")
    return folder
