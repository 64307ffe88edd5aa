"""Texts -> token sequences, and the BOS decision on record."""

from __future__ import annotations

from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.batches import TextTokens, Tokens
from sinkscope.tokens.items import items_of
from sinkscope.tokens.numbers import at_most


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
    items = items_of(texts, attention_mask, first)
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
