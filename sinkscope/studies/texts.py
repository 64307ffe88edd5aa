"""What studies run on: pieces of one long text, and a long text for those who bring none."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import TextTokens, Tokens, read_text

#: Characters of a text that are sure to hold a token's worth: pieces are cut a little long, then to size.
PER_TOKEN = 12
#: Pieces that an interval needs at least.
FEWEST = 3
#: And that two halves need, of which one judges what the other has chosen.
HALVES = 4


def long_text() -> dict[str, str]:
    """Give about 460 kB of English technical prose that every Python has: its own language reference."""
    from pydoc_data import topics

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {f"Python {version} reference (pydoc_data)": "\n".join(topics.topics.values())}


def one_text(adapter: Adapter, text: Any, max_tokens: int | None) -> Tokens:
    """Tokenise one text; without any, the long one.

    Raises:
        SinkscopeError: several texts.
    """
    if text is None:
        text = {label: long[: (max_tokens or len(long)) * PER_TOKEN] for label, long in long_text().items()}
    tokens = adapter.tokenize(text, max_tokens=None if isinstance(text, Tokens) else max_tokens)
    if len(tokens) != 1:
        raise SinkscopeError(f"one long text; got {len(tokens)}")
    return tokens


def pieces(adapter: Adapter, text: Any, *, count: int, size: int, bos: bool | None = None, halves: str = "") -> Tokens:
    """Cut one long text into pieces, so that a study has several texts of one length and every number an interval.

    Args:
        adapter: the model; its tokenizer and convention of BOS are used.
        text: one long string, path or row of ids; None for :func:`long_text`. Several texts are taken as they are, each cut
            to `size` tokens; so is what is tokenised already.
        count: pieces wanted, spread evenly over the text.
        size: tokens of each, special ones included; at most the model's context.
        bos: as for :func:`sinkscope.measure`; rows of ids never get one.
        halves: what the halves of the pieces are for, where some choose what the others judge: both need two.

    Returns:
        The pieces; a text too short for three of them as one text, cut to `size` tokens, which leaves no interval.

    Raises:
        SinkscopeError: fewer than four pieces for `halves`; no piece at all is asked for.
    """
    found = _pieces(adapter, text, count, size, bos)
    if halves and len(found) < HALVES:
        raise SinkscopeError(f"{len(found)} pieces: at least four are needed, {halves}")
    return found


def _pieces(adapter: Adapter, text: Any, count: int, size: int, bos: bool | None) -> Tokens:
    if isinstance(text, Tokens):
        return text
    if size < 2 or count < 1:
        raise SinkscopeError(f"{count} pieces of {size} tokens: at least one piece of two tokens is needed")
    size = min(size, adapter.n_ctx or size)
    text = long_text() if text is None else text
    if isinstance(text, Mapping) and len(text) == 1:
        ((label, text),) = text.items()
    else:
        label = text.name if isinstance(text, Path) else "text"
    if isinstance(text, Path):
        text = read_text(text)
    if isinstance(text, Tensor) and text.ndim == 1:
        cut: list[Any] = [row for row in torch.split(text, size) if len(row) == size]
    elif isinstance(text, str):
        length = size * PER_TOKEN
        starts = [text.rfind(" ", 0, at) + 1 for at in range(0, max(1, len(text) - length + 1), length)]
        cut = [text[start : start + length] for start in starts]
    else:
        return adapter.tokenize(text, bos=bos, max_tokens=size)
    kept = [cut[i * len(cut) // count] for i in range(count)] if len(cut) > count else cut
    tokens = adapter.tokenize({f"{label} {i}": piece for i, piece in enumerate(kept)}, bos=bos, max_tokens=size)
    whole = tuple(s for s in tokens.sequences if len(s) == size)
    return Tokens(whole, tokens.bos) if len(whole) >= FEWEST else adapter.tokenize({label: text}, bos=bos, max_tokens=size)


def setting(tokens: Tokens, what: str = "pieces") -> str:
    """Say how many texts there are, and how long.

    >>> from sinkscope.tokens import tokenize
    >>> setting(tokenize(None, [[1, 2, 3], [4, 5, 6]])), setting(tokenize(None, [[1, 2, 3], [4, 5]]), "texts")
    ('T = 3, 2 pieces', 'T = 2 to 3, 2 texts')
    """
    lengths = sorted({len(s) for s in tokens.sequences})
    size = f"{lengths[0]} to {lengths[-1]}" if len(lengths) > 1 else f"{lengths[0]}"
    return f"T = {size}, {len(tokens)} {what}"


def same(tokens: Tokens, ids: list[Tensor], decode: Any = None) -> Tokens:
    """Give other ids under the labels of some texts."""
    strings = [tuple(decode([int(i)]) if decode else str(int(i)) for i in row) for row in ids]
    made = (TextTokens(s.label, row, words) for s, row, words in zip(tokens.sequences, ids, strings, strict=True))
    return Tokens(tuple(made), tokens.bos)
