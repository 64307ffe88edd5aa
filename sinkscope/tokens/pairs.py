"""What an encoder-decoder is given: a source, which the encoder reads, and a target, which the decoder does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.batches import TextTokens, Tokens
from sinkscope.tokens.corpora import read_text
from sinkscope.tokens.encodings import ids_of, is_encoding, separate
from sinkscope.tokens.features import is_features
from sinkscope.tokens.items import is_row, label_of
from sinkscope.tokens.numbers import at_most
from sinkscope.tokens.texts import strings_of

#: How an encoder-decoder's texts may look.
PAIRS = "a (source, target) pair of strings or ids, an encoding with 'decoder_input_ids', or a row with 'source' and 'target'"
#: The same, by what a source is called.
FORMS = {
    "text": PAIRS,
    "sound": "a sound as its processor gives it, with 'decoder_input_ids' beside it or in a (sound, target) pair",
}


@dataclass(frozen=True)
class Targets:
    """How targets become what a decoder is given.

    Attributes:
        tokenizer: a Hugging Face tokenizer, or None where all are ids.
        shifted: labels -> the decoder's input: behind its start token, as in training.
        generated: a source, most tokens -> a target that the model makes.
    """

    tokenizer: Any
    shifted: Callable[[list[int]], list[int]]
    generated: Callable[[TextTokens, int | None], Tensor]

    def ids(self, given: Any, source: TextTokens, most: int | None) -> tuple[Tensor, str]:
        """Give a target's ids, and how they came about.

        Raises:
            SinkscopeError: fewer than two tokens, or a string and no tokenizer.
        """
        where = f"the target of {source.label!r}"
        if given is None:
            ids, how = self.generated(source, most), "generated greedily from their sources"
        elif isinstance(given, str | Path):
            text = read_text(given) if isinstance(given, Path) else given
            ids, how = torch.tensor(self.shifted(self._labels(text, where))), "behind the decoder's start token"
        else:
            ids, how = ids_of(given, where), "token ids, taken as they are"
        if len(ids) < 2:
            raise SinkscopeError(f"{where} has {len(ids)} token(s); attention needs at least 2. Give {PAIRS}")
        return ids[:most], how

    def _labels(self, text: str, where: str) -> list[int]:
        if self.tokenizer is None:
            raise SinkscopeError(f"{where} is a string, but the model has no tokenizer: pass token ids")
        try:
            found: list[int] = self.tokenizer(text_target=text, verbose=False)["input_ids"]
        except Exception as error:  # whatever tokenizers raise, of which there is no list
            first = str(error).partition("\n")[0]
            raise SinkscopeError(f"the tokenizer refuses {where}: {type(error).__name__}: {first}. Give token ids") from error
        return found


def tokenize_pairs(
    texts: Any,
    targets: Targets | None,
    read: Callable[..., Tokens],
    *,
    crossed: bool = False,
    noun: str = "text",
    **how: Any,
) -> Tokens:
    """Turn sources and targets into token sequences.

    Args:
        texts: one or several of: a pair (a tuple of two: strings, paths or ids), a source alone, an encoding with
            `decoder_input_ids`, a row with `source` and `target`; or a mapping from label to one of these.
        targets: makes targets; None where the sources alone are looked at.
        read: makes tokens of sources, given by their labels, with what is in `how` but the mask.
        crossed: whether keys will be the source's positions.
        noun: what a source that has no label is called, with its number.
        how: as for :func:`sinkscope.tokenize`: `bos, max_tokens, attention_mask, first`.

    Raises:
        SinkscopeError: as there; of a target, fewer than two tokens.
    """
    first, mask = how.get("first", 0), how.pop("attention_mask", None)
    entries = _entries(texts, mask, first, noun)
    if not entries:
        raise SinkscopeError(f"no {noun}s given: give at least one, {FORMS[noun]}")
    sources = read({label: source for label, source, _ in entries}, **how)
    if targets is None:
        return sources
    most = at_most(how.get("max_tokens"))
    made, ways = [], []
    for source, (_, _, target) in zip(sources.sequences, entries, strict=True):
        ids, way = targets.ids(target, source, most)
        made.append(TextTokens(source.label, ids, tuple(strings_of(targets.tokenizer, ids)), source, crossed))
        ways.append(way)
    return Tokens(tuple(made), f"sources: {sources.bos}; targets: {', '.join(dict.fromkeys(ways))}")


def resided(tokens: Tokens, side: str, *, alone: bool = True) -> Tokens:
    """Look at the tokens of an encoder-decoder from another side; of the encoder, `alone` or with their targets.

    Raises:
        SinkscopeError: they have no sources.
    """
    if side == "encoder" and alone:
        return replace(tokens, sequences=tuple(s.source or s for s in tokens.sequences))
    without = next((s for s in tokens.sequences if s.source is None), None)
    if without is not None:
        raise SinkscopeError(f"{without.label!r} has no source, which side={side!r} needs: give {PAIRS}")
    return replace(tokens, sequences=tuple(replace(s, crossed=side != "decoder") for s in tokens.sequences))


def _entries(texts: Any, attention_mask: Any, first: int, noun: str) -> list[tuple[str, Any, Any]]:
    """Give (label, source, target or None)."""
    if attention_mask is not None:
        texts = {"input_ids": texts, "attention_mask": attention_mask}
    if isinstance(texts, Mapping) and not (is_encoding(texts) or is_features(texts) or _is_named(texts)):
        found = []
        for label, one in texts.items():
            rows = list(separate([one]))
            found += [(label_of(label if len(rows) == 1 else f"{label} {n}"), *_pair(row)) for n, row in enumerate(rows)]
        return found
    if isinstance(texts, str | Path | Mapping) or _is_pair(texts) or is_row(texts):
        texts = [texts]
    if isinstance(texts, Tensor) and texts.ndim == 1:
        texts = [texts]
    if not isinstance(texts, Iterable):
        raise SinkscopeError(f"texts is a {type(texts).__name__}: expected one or several {noun}s: {FORMS[noun]}")
    found = []
    for i, entry in enumerate(separate(texts, first), first):
        source, target = _pair(entry)
        found.append((label_of(source.name) if isinstance(source, Path) else f"{noun} {i}", source, target))
    return found


def _is_pair(given: Any) -> bool:
    """Tell a pair: a tuple of two that is no row of ids."""
    return isinstance(given, tuple) and len(given) == 2 and not is_row(given)


def _is_named(given: Mapping[Any, Any]) -> bool:
    return "source" in given and set(given) <= {"source", "target"}


def _pair(entry: Any) -> tuple[Any, Any]:
    """Take one text apart."""
    if isinstance(entry, Mapping) and "source" in entry:
        return entry["source"], entry.get("target")
    if not _is_pair(entry):
        return entry, None
    source, target = entry
    if isinstance(source, Sequence | Tensor) and not isinstance(source, str) and len(source) == 0:
        raise SinkscopeError(f"a pair has an empty source: give {PAIRS}")
    return source, target
