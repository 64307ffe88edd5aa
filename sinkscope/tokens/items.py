"""Whatever the caller has -> (label, string or ids) pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.corpora import read_text

#: What a Hugging Face tokenizer gives, by name.
ENCODED = frozenset({"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"})


def _field(row: Mapping[str, Any], where: str) -> Any:
    """Take the text out of a row of a dataset: its field `text`, or its only string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1:
        return row["text" if "text" in row else strings[0]]
    raise SinkscopeError(f"{where} has no field 'text', and not one string alone; its fields: {', '.join(map(str, row))}")


def items_of(texts: Any, attention_mask: Tensor | None, first: int = 0) -> list[tuple[str, Any]]:
    """Normalise the input to (label, str | ids) pairs."""
    if isinstance(texts, np.ndarray):
        texts = torch.as_tensor(texts)
    if isinstance(texts, Mapping) and "input_ids" in texts and set(texts) <= ENCODED:
        texts, attention_mask = _encoded(texts, attention_mask), None
    if attention_mask is not None:
        return [(f"text {i}", row) for i, row in enumerate(_without_pads(texts, attention_mask))]
    if isinstance(texts, Mapping):
        return [(label_of(label), read_text(t) if isinstance(t, Path) else t) for label, t in texts.items()]
    if isinstance(texts, Tensor):
        texts = list(texts) if texts.ndim == 2 else [texts]
    elif isinstance(texts, str | Path) or (isinstance(texts, Sequence) and texts and isinstance(texts[0], int)):
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise SinkscopeError(f"texts is a {type(texts).__name__}: expected a string, a path, token ids, or several of these")
    items = []
    for i, text in enumerate(texts, first):
        if isinstance(text, str) and _is_file(text):
            raise SinkscopeError(f"text {i} names a file: give Path({text!r}) to have it read")
        if isinstance(text, Path):
            items.append((label_of(text.name), read_text(text)))
        else:
            items.append((f"text {i}", _field(text, f"text {i}") if isinstance(text, Mapping) else text))
    return items


def _encoded(given: Mapping[str, Any], attention_mask: Any) -> list[Tensor]:
    """Take what a Hugging Face tokenizer gives, without its pads."""
    ids, mask = given["input_ids"], given.get("attention_mask") if attention_mask is None else attention_mask
    try:
        if len(ids) and not np.ndim(ids[0]):
            ids, mask = [ids], None if mask is None else [mask]
        rows = [torch.as_tensor(row) for row in ids]
        return rows if mask is None else [row[torch.as_tensor(keep).bool()] for row, keep in zip(rows, mask, strict=True)]
    except (TypeError, ValueError, RuntimeError, IndexError):
        raise SinkscopeError("input_ids must be rows of ids, and attention_mask rows of the same lengths") from None


def _is_file(text: str) -> bool:
    """Tell a path that was given as text: one short line that names a file which is there."""
    try:
        return len(text) < 256 and text.isprintable() and bool(Path(text).suffix) and Path(text).is_file()
    except OSError:  # too long in bytes for a file's name
        return False


def _without_pads(texts: Any, attention_mask: Tensor) -> list[Tensor]:
    """Take the tokens that the mask keeps out of a tensor of ids."""
    if not isinstance(texts, Tensor) or attention_mask.shape != texts.shape:
        given = (
            f"the ids {tuple(texts.shape)}" if isinstance(texts, Tensor) else f"a tensor of ids, not a {type(texts).__name__}"
        )
        raise SinkscopeError(f"attention_mask {tuple(attention_mask.shape)} must be shaped like {given}")
    rows = zip(texts.reshape(-1, texts.shape[-1]), attention_mask.reshape(-1, texts.shape[-1]), strict=True)
    return [row[mask.bool()] for row, mask in rows]


def label_of(name: object) -> str:
    """Make a label that every file format can hold: bytes of a file name that are not text become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")
