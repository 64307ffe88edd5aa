"""What comes with token ids: every key of an encoding is used, or can't change a result, or is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.features import features_of, is_features, is_mixed, not_alone
from sinkscope.tokens.numbers import tensor_of

#: What holds the ids: a Hugging Face tokenizer's name for it, and that of TransformerLens's `tokenize_and_concatenate`.
IDS, COLUMN = "input_ids", "tokens"
#: What an encoder-decoder's decoder is given.
DECODER, DECODER_MASK = "decoder_input_ids", "decoder_attention_mask"
#: Keys that are looked at.
USED = frozenset({"attention_mask", "token_type_ids", "position_ids"})
#: Keys that can't change what a model computes on these ids: targets, marks and numbers of rows.
IGNORED = frozenset({"labels", "label", "label_ids", "return_loss", "special_tokens_mask", "offset_mapping", "length"})
IGNORED |= {"overflow_to_sample_mapping", "overflowing_tokens", "num_truncated_tokens", "word_ids", "idx", "id", "index"}
IGNORED |= {"assistant_masks", "assistant_mask", "completion_mask"}


def is_encoding(given: Any) -> bool:
    """Tell what holds ids: a mapping with `input_ids`, whatever else it holds, or the column `tokens` of ids."""
    if not isinstance(given, Mapping):
        return False
    beside = set(given) - {COLUMN}
    return IDS in given or (len(beside) < len(given) and beside <= USED | IGNORED and _whole(given[COLUMN]))


def rows_of(encoding: Mapping[str, Any], where: str, attention_mask: Any = None) -> list[Int[Tensor, " position"]]:
    """Give the texts of an encoding, without pads.

    Args:
        encoding: ids `[position]` or `[batch, position]`, as tensors, arrays or lists, and what comes with them.
        where: which text this is, for errors.
        attention_mask: takes the place of the encoding's own.

    Raises:
        SinkscopeError: no rows of ids; a mask with other values than 0 and 1, or with holes; a key that would change the
            result and is not passed on to the model: segments, positions, images.
    """
    if is_mixed(encoding):
        raise not_alone(encoding, where)
    given = {name: value for name, value in encoding.items() if value is not None}
    ids = given.pop(IDS) if IDS in given else given.pop(COLUMN, None)
    mask = given.pop("attention_mask", None) if attention_mask is None else attention_mask
    types, positions = given.pop("token_type_ids", None), given.pop("position_ids", None)
    strange = [n for n, value in given.items() if n not in IGNORED | USED and not _is_text(value)]
    if strange:
        raise SinkscopeError(
            f"{where} has {strange[0]!r} beside its ids, which is not passed on to the model: if nothing depends on it, give "
            "{'input_ids': ..., 'attention_mask': ...}; of a data set, rows.select_columns(['input_ids', 'attention_mask'])"
        )
    rows = _rows(ids)
    beside = [_beside(x, rows, name) for name, x in zip(sorted(USED), (mask, positions, types), strict=True)]
    found = []
    for n, (row, keep, place, kind) in enumerate(zip(rows, *beside, strict=True)):
        name = where if len(rows) == 1 else f"row {n} of {where}"
        kept = torch.ones(len(row), dtype=torch.bool) if keep is None else _kept(keep, name)
        if kind is not None and bool(kind[kept].any()):
            raise SinkscopeError(
                f"{name} has token_type_ids that are not all 0 (a pair of sentences?), which are not passed on to the model: "
                "give each sentence by itself, or {'input_ids': ...} alone to have every token of type 0"
            )
        if place is not None and place[kept].tolist() != list(range(int(kept.sum()))):
            raise SinkscopeError(
                f"{name} has position_ids other than 0, 1, 2, ...: every text is measured at positions from 0 on. Give texts "
                "that are packed into one row as rows of their own, or leave position_ids out"
            )
        found.append(row[kept])
    return found


def columns_of(given: Any, attention_mask: Any, count: int) -> list[int]:
    """Give the column in which each of some texts begins: behind the pads of its row, where a mask tells of any."""
    mask = given.get("attention_mask") if attention_mask is None and is_encoding(given) else attention_mask
    if mask is None:
        return [0] * count
    return [int(row.bool().int().argmax()) for row in _rows(mask)]


def separate(entries: Iterable[Any], first: int = 0) -> Iterator[Any]:
    """Take batches apart, as a DataLoader gives them: encodings, features, tensors of rows; the rest is passed on.

    So is text with images in it, of which there is one.

    Args:
        entries: texts, ids, encodings, features (of images or sound), batches of them.
        first: number of the first text, for errors.
    """
    number = first
    for entry in entries:
        rows: list[Any] = [entry]
        if (is_encoding(entry) or is_features(entry)) and entry.get(DECODER) is not None:
            rows = _pairs(entry, f"text {number}")
        elif is_encoding(entry) and not is_mixed(entry):
            rows = rows_of(entry, f"text {number}")
        elif is_features(entry):
            rows = features_of(entry, f"input {number}")
        elif isinstance(entry, Tensor | np.ndarray) and entry.ndim == 2:
            rows = list(entry)
        number += len(rows)
        yield from rows


def _pairs(encoding: Mapping[str, Any], where: str) -> list[tuple[Any, Any]]:
    """Give the (source, target) pairs of an encoding, or of features, with `decoder_input_ids`."""
    read: Callable[..., list[Any]] = features_of if is_features(encoding) else rows_of
    sources = read({k: v for k, v in encoding.items() if k not in (DECODER, DECODER_MASK)}, where)
    targets = rows_of({IDS: encoding[DECODER], "attention_mask": encoding.get(DECODER_MASK)}, f"the target of {where}")
    if len(sources) != len(targets):
        raise SinkscopeError(f"{where} has {len(sources)} sources and {len(targets)} targets")
    return list(zip(sources, targets, strict=True))


def ids_of(item: Any, where: str) -> Int[Tensor, " position"]:
    """Take one row of ids, of any kind of integers.

    Raises:
        SinkscopeError: it is none.
    """
    try:
        ids = tensor_of(item)
        fine = ids.ndim == 1 and not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
        if ids.numel() == 0:
            return torch.zeros(0, dtype=torch.long)
        if fine:
            ids = ids.detach().long().cpu()
            fine = int(ids.min()) >= 0
    except Exception:  # whatever NumPy and PyTorch raise about what is no row of numbers
        raise SinkscopeError(f"{where} is a {type(item).__name__}: expected a string, a path or token ids") from None
    if not fine:
        raise SinkscopeError(
            f"{where}: token ids must be one row of non-negative integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    return ids


def _rows(value: Any, beside: str = "attention_mask") -> list[Tensor]:
    """Take `[position]` or `[batch, position]`, ragged or not, as rows."""
    try:
        rows = [tensor_of(row) for row in (value if len(value) and np.ndim(value[0]) else [value])]
    except Exception:  # whatever NumPy and PyTorch raise about what is no row of numbers
        rows = []
    if not rows or any(row.ndim != 1 for row in rows):
        raise SinkscopeError(f"input_ids must be rows of ids, and {beside} rows of the same lengths")
    return [row.long() if row.dtype in UNSIGNED else row for row in rows]


def _beside(value: Any, rows: list[Tensor], name: str) -> list[Tensor] | list[None]:
    """Take what goes with the ids, number by number; one row of positions may stand for all."""
    if value is None:
        return [None] * len(rows)
    beside = _rows(value, name)
    beside = beside * len(rows) if len(beside) == 1 and name == "position_ids" else beside
    if [len(b) for b in beside] != [len(row) for row in rows]:
        raise SinkscopeError(f"input_ids must be rows of ids, and {name} rows of the same lengths")
    return beside


def _kept(mask: Tensor, where: str) -> Tensor:
    """Read a row of an attention mask: pads stand at its ends only."""
    kept = mask.bool()
    at = kept.nonzero().flatten()
    if not bool((mask == kept).all()) or (len(at) and int(at[-1] - at[0]) + 1 != len(at)):
        raise SinkscopeError(
            f"the attention_mask of {where} must be 1 at tokens and 0 at pads before or after them: a mask with holes, or "
            "one that numbers packed texts, is not passed on to the model. Give packed texts as rows of their own"
        )
    return kept


def _whole(value: Any) -> bool:
    """Tell whole numbers in one row or several."""
    while isinstance(value, list | tuple):
        if not value:
            return False
        value = value[0]
    return isinstance(value, int) or np.asarray(value).dtype.kind in "iu"


def _is_text(value: Any) -> bool:
    """Tell columns of text, which no model takes."""
    return isinstance(value, str) or (isinstance(value, list | tuple) and bool(value) and all(map(_is_text, value)))


UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
