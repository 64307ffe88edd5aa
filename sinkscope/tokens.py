"""Texts or token ids -> batches with a validity mask, and the BOS decision on record.

Sequences are kept ragged and without pads; a batch is right-padded only for the forward pass, and its mask comes
from the lengths, never from the ids, since ids do not tell a pad from BOS or EOS.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic, SupportsIndex, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError

T = TypeVar("T")
#: What a Hugging Face tokenizer gives, by name.
ENCODED = frozenset({"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "offset_mapping", "length"})


@dataclass(frozen=True, eq=False)
class TextTokens:
    """One text: its label, its ids `[position]`, and its tokens as strings."""

    label: str
    ids: Int[Tensor, " position"]
    strings: tuple[str, ...]

    def __len__(self) -> int:
        """Count its tokens, BOS included."""
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded ids of a few sequences and which of them are real."""

    sequences: tuple[TextTokens, ...]
    ids: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each sequence."""
        return self.valid.sum(-1)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts and how BOS was decided.

    Attributes:
        sequences: one per text, in the caller's order.
        bos: one sentence: whether a BOS token stands first, which, and who decided.
    """

    sequences: tuple[TextTokens, ...]
    bos: str

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.sequences)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Group texts of similar length, at most `size` in a batch, shortest first.

        A batch also ends where padding to its longest text would more than double the shortest.
        """
        order = sorted(self.sequences, key=len)
        group: list[TextTokens] = []
        for sequence in order:
            if group and (len(group) == size or len(sequence) > 2 * len(group[0])):
                yield _pad(group, device)
                group = []
            group.append(sequence)
        if group:
            yield _pad(group, device)


def _pad(group: Sequence[TextTokens], device: torch.device | str) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in group], batch_first=True, padding_value=0)
    lengths = torch.tensor([len(s) for s in group])
    valid = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    return Batch(tuple(group), ids.to(device), valid.to(device))


def whole_number(given: Any, name: str, wanted: str = "a whole number") -> int:
    """Take a whole number of any type, NumPy's and PyTorch's included.

    Raises:
        SinkscopeError: it is none; True and False are none.
    """
    try:
        if not isinstance(given, bool):
            return operator.index(given)
    except TypeError:
        pass
    raise SinkscopeError(f"{name}={given!r}: give {wanted}")


def at_most(max_tokens: SupportsIndex | None) -> int | None:
    """Take how many tokens of each text are kept, or None for all.

    Raises:
        SinkscopeError: no whole number, or less than two.
    """
    most = None if max_tokens is None else whole_number(max_tokens, "max_tokens")
    if most is not None and most < 2:
        raise SinkscopeError(f"max_tokens={most}: at least 2 tokens are needed to look at attention")
    return most


def read_text(path: str | Path) -> str:
    """Read a UTF-8 text file; the error names the file and the byte where decoding failed."""
    path = Path(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SinkscopeError(f"no such file: {str(path)!r}") from None
    except UnicodeDecodeError as error:
        raise SinkscopeError(
            f"{str(path)!r} is not UTF-8 text: byte {error.start} can't be decoded. Convert it first."
        ) from None
    except OSError as error:
        raise SinkscopeError(f"can't read {str(path)!r}: {error.strerror}") from None


def tokenize(
    tokenizer: Any,
    texts: Any,
    *,
    bos: bool | None = None,
    bos_by_default: bool = True,
    causal: bool = True,
    max_tokens: SupportsIndex | None = None,
    attention_mask: Tensor | None = None,
    first: int = 0,
) -> Tokens:
    """Turn whatever the caller has into token sequences.

    Args:
        tokenizer: a Hugging Face tokenizer, or None when `texts` are ids.
        texts: a string, a `Path`, ids (a tensor `[position]` or `[batch, position]`, or lists of ints), a list of any
            of these, a mapping from label to one of these, or what a Hugging Face tokenizer gives.
        bos: put the BOS token first (an encoder: add its special tokens)? None takes the model's own convention.
            Ids are always taken as they are.
        bos_by_default: the model's convention.
        causal: False for an encoder, whose [CLS] and [SEP] take the place of BOS.
        max_tokens: keep at most this many tokens of each text, BOS included.
        attention_mask: `[batch, position]`, for a tensor of ids: 0 marks pads, on either side.
        first: number of the first text, in labels and errors: these may be a part of a stream.

    Raises:
        SinkscopeError: empty text, fewer than two tokens, no tokenizer for a text, no BOS token to put first.

    >>> tokenize(None, [[5, 6, 7], [8, 9]]).sequences[1].label
    'text 1'
    """
    if isinstance(texts, Tokens):
        if bos is not None or max_tokens is not None or attention_mask is not None:
            raise SinkscopeError(
                "these texts are tokenised already: give bos=, max_tokens= or attention_mask= to ss.tokenize"
            )
        return texts
    most = at_most(max_tokens)
    items = _items(texts, attention_mask, first)
    if not items:
        raise SinkscopeError("no texts given: pass at least one string, file or list of token ids")
    decide = _Specials(tokenizer, bos, bos_by_default, causal)
    sequences = []
    for index, (label, item) in enumerate(items, first):
        where = f"text {index}" + (f" ({label!r})" if label != f"text {index}" else "")
        ids = decide.encode(item, where, most) if isinstance(item, str) else _ids(item, where)
        ids = ids[:most]
        if len(ids) < 2:
            raise SinkscopeError(f"{where} has {len(ids)} token(s); attention needs at least 2. Give a longer text.")
        strings = tuple(_strings(tokenizer, ids))
        sequences.append(TextTokens(label, ids, strings))
    labels = [s.label for s in sequences]
    if len(set(labels)) < len(labels) or "all" in labels:
        raise SinkscopeError(f"text labels must be distinct and not 'all'; got {labels}")
    return Tokens(tuple(sequences), decide.sentence(any(isinstance(item, str) for _, item in items)))


class _Specials:
    """The decision about BOS (or an encoder's special tokens): made once, applied to every text, put in words."""

    def __init__(self, tokenizer: Any, bos: bool | None, by_default: bool, causal: bool) -> None:
        self.tokenizer = tokenizer
        self.causal = causal
        self.asked = bos
        self.id: int | None = getattr(tokenizer, "bos_token_id", None)
        if bos and causal and tokenizer is not None and self.id is None:
            raise SinkscopeError("bos=True, but this tokenizer has no BOS token: pass bos=False (--no-bos)")
        self.add = bos if bos is not None else (by_default and (self.id is not None or not causal))

    def encode(self, text: str, where: str, max_tokens: int | None) -> Int[Tensor, " position"]:
        if self.tokenizer is None:
            raise SinkscopeError(f"{where} is a string, but the model has no tokenizer: pass token ids")
        if not text.strip():
            raise SinkscopeError(f"{where} is empty: give it at least two tokens of text, or leave it out")
        # An encoder's text is cut inside its special tokens, so that [SEP] stays last.
        special: dict[str, Any] = {"add_special_tokens": self.add and not self.causal}
        if special["add_special_tokens"] and max_tokens is not None:
            special |= {"truncation": True, "max_length": max(max_tokens, 3)}
        ids: list[int] = self.tokenizer(text, verbose=False, **special)["input_ids"]
        if self.add and self.causal and ids[:1] != [self.id]:
            ids = [int(self.id or 0), *ids]
        return torch.tensor(ids, dtype=torch.long)

    def sentence(self, texts_were_strings: bool) -> str:
        if not texts_were_strings:
            return "token ids were given and taken as they are"
        who = "the model's convention" if self.asked is None else "as asked"
        if not self.causal:
            return f"{'special tokens added' if self.add else 'no special tokens'} ({who})"
        if self.add:
            return f"BOS {self.tokenizer.bos_token!r} (id {self.id}) stands first ({who})"
        return f"no BOS ({who})"


def portions(texts: Any, size: int) -> Iterator[tuple[int, Any]]:
    """Give texts with the number of the first of them: all at once, or, of a stream, `size` at a time.

    A stream is an iterator, a generator, a dataset of `datasets`, a directory (its `.txt` files by name) or a `.jsonl` file
    (the field `text` of its lines): it is never whole in memory.
    """
    stream = as_stream(texts)
    if stream is None:
        yield 0, texts
        return
    first, waiting = 0, iter(stream)
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
        self.total = len(head[0]) if as_stream(texts) is None else getattr(texts, "__len__", lambda: None)()
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
    there = isinstance(texts, str | bytes | Mapping | Sequence | Tensor | np.ndarray | Tokens)
    return None if there or not isinstance(texts, Iterable) else texts


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


def _field(row: Mapping[str, Any], where: str) -> Any:
    """Take the text out of a row of a dataset: its field `text`, or its only string."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row or len(strings) == 1:
        return row["text" if "text" in row else strings[0]]
    raise SinkscopeError(f"{where} has no field 'text', and not one string alone; its fields: {', '.join(map(str, row))}")


def _items(texts: Any, attention_mask: Tensor | None, first: int = 0) -> list[tuple[str, Any]]:
    """Normalise the input to (label, str | ids) pairs."""
    if isinstance(texts, np.ndarray):
        texts = torch.as_tensor(texts)
    if isinstance(texts, Mapping) and "input_ids" in texts and set(texts) <= ENCODED:
        texts, attention_mask = _encoded(texts, attention_mask), None
    if attention_mask is not None:
        return [(f"text {i}", row) for i, row in enumerate(_without_pads(texts, attention_mask))]
    if isinstance(texts, Mapping):
        return [(_label(label), read_text(t) if isinstance(t, Path) else t) for label, t in texts.items()]
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
            items.append((_label(text.name), read_text(text)))
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


def _label(name: object) -> str:
    """Make a label that every file format can hold: bytes of a file name that are not text become escapes."""
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def _ids(item: Any, where: str) -> Int[Tensor, " position"]:
    try:
        ids = torch.as_tensor(item)
    except (TypeError, ValueError, RuntimeError):
        raise SinkscopeError(f"{where} is a {type(item).__name__}: expected a string, a path or token ids") from None
    if ids.numel() == 0:
        return torch.zeros(0, dtype=torch.long)
    if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or int(ids.min()) < 0:
        raise SinkscopeError(
            f"{where}: token ids must be one row of non-negative integers, got {tuple(ids.shape)} {ids.dtype}"
        )
    return ids.long().cpu()


def _strings(tokenizer: Any, ids: Int[Tensor, " position"]) -> list[str]:
    if tokenizer is None:
        return [str(int(i)) for i in ids]
    return [tokenizer.decode([int(i)]) for i in ids]


def key_positions(key: int | str, sequences: Sequence[TextTokens]) -> Int[Tensor, " batch"]:
    """Find the position that `key` names in each sequence.

    Args:
        key: a 0-based position; negative counts from the end (-1 is the last token); or a token's text, such as
            `"[SEP]"`, whose first occurrence counts.
        sequences: the sequences to look in.

    Raises:
        SinkscopeError: a position outside a sequence, or a token that does not occur in it.
    """
    found = []
    for s in sequences:
        if isinstance(key, str):
            if key not in s.strings:
                raise SinkscopeError(f"key={key!r} does not occur in {s.label!r}; its first tokens are {s.strings[:8]}")
            found.append(s.strings.index(key))
        else:
            position = key + len(s) if key < 0 else key
            if not 0 <= position < len(s):
                raise SinkscopeError(f"key={key} lies outside {s.label!r}, whose positions are 0 to {len(s) - 1}")
            found.append(position)
    return torch.tensor(found)
