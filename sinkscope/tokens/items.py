"""Whatever the caller has -> (label, string, chat or ids) pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.corpora import read_text
from sinkscope.tokens.encodings import is_encoding, rows_of, separate
from sinkscope.tokens.features import Features, is_features, is_mixed, not_alone, not_text
from sinkscope.tokens.numbers import tensor_of

#: Characters of a label, at most: it stands in every row of a report.
LONGEST = 200


@dataclass(frozen=True)
class Chat:
    """The messages of one conversation, for the tokenizer's chat template."""

    messages: list[Any]


def items_of(texts: Any, attention_mask: Tensor | None, first: int = 0) -> list[tuple[str, Any]]:
    """Normalise the input to (label, str | Chat | ids) pairs."""
    texts = _plain(texts)
    if is_encoding(texts):
        return _numbered(rows_of(texts, "what was given", attention_mask))
    if attention_mask is not None:
        return _numbered(_without_pads(texts, attention_mask))
    if is_features(texts):
        raise not_text(texts, "what was given")
    if isinstance(texts, Mapping) and _chat(texts) is None:
        return [pair for label, text in texts.items() for pair in _named(label_of(label), text)]
    if isinstance(texts, Tensor):
        texts = list(texts) if texts.ndim == 2 else [texts]
    elif isinstance(texts, str | Path) or _chat(texts) is not None or is_row(texts):
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise SinkscopeError(f"texts is a {type(texts).__name__}: expected a string, a path, token ids, or several of these")
    items = []
    for i, text in enumerate(separate(texts, first), first):
        if isinstance(text, str) and _is_file(text):
            raise SinkscopeError(f"text {i} names a file: give Path({text!r}) to have it read")
        label = label_of(text.name) if isinstance(text, Path) else f"text {i}"
        items.append((label, _item(text, f"text {i}")))
    return items


def label_of(name: object) -> str:
    """Make a label that every file format can hold: what is no text becomes escapes, and what is long is cut.

    >>> label_of("a" * 1000)[-15:], len(label_of("a" * 1000))
    ('... 41edece42d63', 200)
    """
    label = str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    end = f"... {hashlib.sha256(label.encode()).hexdigest()[:12]}"
    return label if len(label) <= LONGEST else label[: LONGEST - len(end)] + end


def _plain(texts: Any) -> Any:
    """Take columns and arrays as what they hold: a tensor of numbers, or a list."""
    if not isinstance(texts, np.ndarray | pd.Series | pd.Index):
        return texts
    return tensor_of(texts) if np.asarray(texts).dtype.kind in "biufc" else texts.tolist()


def _numbered(rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"text {i}", row) for i, row in enumerate(rows)]


def _named(label: str, text: Any) -> list[tuple[str, Any]]:
    """Give what stands under a label: one text, or the rows of an encoding."""
    if not is_encoding(text):
        return [(label, _item(text, repr(label), row=False))]
    rows = rows_of(text, repr(label))
    return [(label if len(rows) == 1 else f"{label} {n}", row) for n, row in enumerate(rows)]


def _item(text: Any, where: str, *, row: bool = True) -> Any:
    """Read one text: a file, a chat, a row of a data set; strings and ids are passed on."""
    if isinstance(text, Path):
        return read_text(text)
    if isinstance(text, Features) or is_features(text):
        raise not_text(text, where)
    if is_mixed(text):
        raise not_alone(text, where)
    messages = _chat(text)
    if messages is not None:
        return Chat(messages)
    return _field(text, where) if row and isinstance(text, Mapping) else text


def _chat(given: Any) -> list[Any] | None:
    """Give the messages of a chat: of a list of them, of the field `messages` of a row, or the one that this is."""
    if isinstance(given, Mapping):
        if {"role", "content"} <= set(given):
            return [given]
        given = given.get("messages") if not isinstance(given.get("text"), str) else None
    if not isinstance(given, list | tuple) or not given:
        return None
    messages = all(isinstance(m, Mapping) and "role" in m and {"content", "tool_calls"} & set(m) for m in given)
    return list(given) if messages else None


def _field(row: Mapping[str, Any], where: str) -> Any:
    """Take the text out of a row of a dataset: its field `text`, or its only string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1:
        return row["text" if "text" in row else strings[0]]
    raise SinkscopeError(
        f"{where} has no field 'text', and not one string alone; its fields: {', '.join(map(str, row))}. Give the column "
        "that is meant, as in [row['tokens'] for row in rows]"
    )


def is_row(texts: Any) -> bool:
    """Tell one row of ids, of any type of integers."""
    if not isinstance(texts, Sequence) or not texts or isinstance(texts[0], str | bytes):
        return False
    return isinstance(texts[0], int | np.integer) or (isinstance(texts[0], Tensor | np.ndarray) and texts[0].ndim == 0)


def _is_file(text: str) -> bool:
    """Tell a path that was given as text: one short line that names a file which is there."""
    try:
        return len(text) < 256 and text.isprintable() and bool(Path(text).suffix) and Path(text).is_file()
    except OSError:  # too long in bytes for a file's name
        return False


def _without_pads(texts: Any, attention_mask: Any) -> list[Tensor]:
    """Take the tokens that the mask keeps out of a tensor of ids."""
    try:
        mask = torch.as_tensor(attention_mask)
    except Exception:  # whatever PyTorch raises about what is no tensor
        raise SinkscopeError(
            f"attention_mask is a {type(attention_mask).__name__}: give a tensor [batch, position]"
        ) from None
    if not isinstance(texts, Tensor) or mask.shape != texts.shape or not 1 <= mask.ndim <= 2:
        given = (
            f"the ids {tuple(texts.shape)}" if isinstance(texts, Tensor) else f"a tensor of ids, not a {type(texts).__name__}"
        )
        raise SinkscopeError(f"attention_mask {tuple(mask.shape)} must be shaped like {given}")
    return rows_of({"input_ids": texts}, "what was given", mask)
