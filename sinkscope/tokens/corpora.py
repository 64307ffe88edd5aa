"""Where texts come from: files, directories, streams; portion by portion, never whole in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.batches import Tokens
from sinkscope.tokens.encodings import separate

T = TypeVar("T")


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file, without a byte order mark; the error names the file and the byte where decoding failed."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except FileNotFoundError:
        raise SinkscopeError(f"no such file: {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise SinkscopeError(
            f"{str(path)!r} is not UTF-8 text: byte {error.start} can't be decoded. Convert it first."
        ) from None
    except OSError as error:
        raise SinkscopeError(f"can't read {str(path)!r}: {error.strerror}") from None


def portions(texts: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Give texts with the number of the first of them: all at once, or, of a stream, `size` at a time.

    A stream is an iterator, a generator, a dataset of `datasets`, a DataLoader (its batches come apart), a directory (its
    `.txt` files by name) or a `.jsonl` file (the field `text` of its lines): it is never whole in memory.
    """
    stream = as_stream(texts)
    if stream is None:
        yield 0, texts
        return
    first, waiting = 0, separate(stream)
    while some := list(islice(waiting, size)):
        yield first, some
        first += len(some)


class Corpus(Generic[T]):
    """Texts portion by portion, each made ready when its turn comes; the first at once, so that bad input is said early.

    Attributes:
        head: the first portion.
        total: how many texts there are, or None where a stream does not say.
        labels: label -> tokens of the texts that have come.
    """

    def __init__(self, texts: Any, size: int, prepare: Callable[[int, Any], tuple[Tokens, T]]) -> None:
        """Read the first portion; `prepare(number of the first text, texts)` makes one ready."""
        self._rest = (prepare(first, some) for first, some in portions(texts, size))
        head = next(self._rest, None)
        if head is None:
            raise SinkscopeError("no texts given: the stream is empty")
        self.head = head
        self.total = len(head[0]) if as_stream(texts) is None else _count(texts)
        self.labels: dict[str, int] = {}

    def __iter__(self) -> Iterator[tuple[Tokens, T]]:
        """Give the portions, once."""
        for tokens, ready in chain([self.head], self._rest):
            for s in tokens.sequences:
                if s.label in self.labels:
                    raise SinkscopeError(f"text labels must be distinct; {s.label!r} comes twice")
                self.labels[s.label] = len(s)
            yield tokens, ready


def as_stream(texts: Any) -> Iterable[Any] | None:
    """Give the texts of a stream one by one; None for texts that are there already."""
    if isinstance(texts, Path):
        if texts.is_dir():
            return sorted(texts.glob("*.txt"))
        return _lines(texts) if texts.suffix == ".jsonl" else None
    if isinstance(texts, pd.DataFrame):  # as a stream it would be the names of its columns
        return [{str(name): value for name, value in row.items()} for row in texts.to_dict("records")]
    numbers = isinstance(texts, pd.Series | pd.Index) and pd.api.types.is_numeric_dtype(texts.dtype)  # one row of ids
    there = numbers or isinstance(texts, str | bytes | Mapping | Sequence | Tensor | np.ndarray | Tokens)
    return None if there or not isinstance(texts, Iterable) else texts


def _count(stream: Any) -> int | None:
    """Give how many texts a stream has, if it knows: a DataLoader's length is in batches, its data set's is not."""
    sized: Any = stream.dataset if isinstance(stream, DataLoader) else stream
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _lines(path: Path) -> Iterator[Any]:
    """Read a `.jsonl` file line by line; an error names the line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)
                except (ValueError, RecursionError):
                    raise SinkscopeError(f"line {number} of {str(path)!r} is not JSON in UTF-8") from None
    except OSError as error:
        raise SinkscopeError(f"can't read {str(path)!r}: {error.strerror}") from None
