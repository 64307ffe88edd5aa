"""Texts -> token sequences, and the BOS decision on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.batches import TextTokens, Tokens
from sinkscope.tokens.encodings import ids_of
from sinkscope.tokens.items import Chat, items_of
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
        texts: a string, a `Path`, ids (a tensor `[position]` or `[batch, position]`, or lists of ints), a chat (a list of
            messages `{"role": ..., "content": ...}`), a list of any of these, a mapping from label to one of these, or what a
            Hugging Face tokenizer gives: `input_ids` and `attention_mask`; what else comes with them is refused by name
            where it would change the result.
        bos: put the BOS token first (an encoder: add its special tokens)? None takes the model's own convention; of a
            chat, what its template writes. Ids are always taken as they are.
        bos_by_default: the model's convention.
        causal: False for an encoder, whose [CLS] and [SEP] take the place of BOS.
        max_tokens: keep at most this many tokens of each text, BOS included; no more of a long text is tokenised than
            they need.
        attention_mask: `[batch, position]`, for a tensor of ids: 0 marks pads, on either side.
        first: number of the first text, in labels and errors: these may be a part of a stream.

    Raises:
        SinkscopeError: empty text, fewer than two tokens, no tokenizer for a text, no BOS token to put first, no chat
            template for a chat; half of a surrogate pair, or anything else that the tokenizer refuses.

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
        ids = decide.encode(item, where, most) if isinstance(item, str | Chat) else ids_of(item, where)
        ids = ids[:most]
        if len(ids) < 2:
            raise SinkscopeError(f"{where} has {len(ids)} token(s); attention needs at least 2. Give a longer text.")
        strings = tuple(strings_of(tokenizer, ids))
        sequences.append(TextTokens(label, ids, strings))
    wrong = [label for label, n in Counter(s.label for s in sequences).items() if n > 1 or label == "all"]
    if wrong:
        raise SinkscopeError(f"text labels must be distinct and not 'all'; got {wrong[0]!r}")
    return Tokens(tuple(sequences), decide.sentence([item for _, item in items]))


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

    def encode(self, given: str | Chat, where: str, max_tokens: int | None) -> Int[Tensor, " position"]:
        if self.tokenizer is None:
            raise SinkscopeError(f"{where} is a string, but the model has no tokenizer: pass token ids")
        text = given if isinstance(given, str) else _written(self.tokenizer, given, where)
        if not text or text.isspace():
            raise SinkscopeError(f"{where} is empty: give it at least two tokens of text, or leave it out")
        # An encoder's text is cut inside its special tokens, so that [SEP] stays last; a template writes its own.
        special: dict[str, Any] = {"add_special_tokens": self.add and not self.causal and isinstance(given, str)}
        if special["add_special_tokens"] and max_tokens is not None:
            special |= {"truncation": True, "max_length": max(max_tokens, 3)}
        add = self.add if isinstance(given, str) else bool(self.asked)

        def encoded(part: str) -> list[int]:
            ids: list[int] = self.tokenizer(part, verbose=False, **special)["input_ids"]
            return [int(self.id or 0), *ids] if add and self.causal and ids[:1] != [self.id] else ids

        try:
            return torch.tensor(_beginning(encoded, text, max_tokens), dtype=torch.long)
        except Exception as error:  # whatever tokenizers raise, of which there is no list
            raise _refused(text, where, error) from error

    def sentence(self, items: list[Any]) -> str:
        if not any(isinstance(item, str | Chat) for item in items):
            return "token ids were given and taken as they are"
        if not any(isinstance(item, str) for item in items) and not self.asked:
            return "chats begin as their template says; no BOS is added"
        who = "the model's convention" if self.asked is None else "as asked"
        if not self.causal:
            return f"{'special tokens added' if self.add else 'no special tokens'} ({who})"
        if self.add:
            return f"BOS {self.tokenizer.bos_token!r} (id {self.id}) stands first ({who})"
        return f"no BOS ({who})"


def _written(tokenizer: Any, chat: Chat, where: str) -> str:
    """Write a chat as the tokenizer's template does."""
    if not getattr(tokenizer, "chat_template", None):
        raise SinkscopeError(
            f"{where} is a chat, and this tokenizer has no chat template for apply_chat_template: set "
            "tokenizer.chat_template, or give text, or ids"
        )
    try:
        return str(tokenizer.apply_chat_template(chat.messages, tokenize=False))
    except Exception as error:  # whatever a template raises
        first = str(error).partition("\n")[0]
        raise SinkscopeError(f"apply_chat_template fails on {where}: {type(error).__name__}: {first}") from error


def _beginning(encoded: Callable[[str], list[int]], text: str, max_tokens: int | None) -> list[int]:
    """Encode a text, of a long one no more than its first tokens need.

    A part of the text is enough when parts of three lengths begin with the same tokens, as many as are wanted: where a
    tokenizer splits depends on what follows, not on what follows much later. (One more than twice the length: digits may be
    grouped in threes from the right.)
    """
    size = len(text) if max_tokens is None else 4096 + 16 * max_tokens
    while 3 * size < len(text):
        one = encoded(text[:size])[:max_tokens]
        if len(one) == max_tokens and all(encoded(text[:n])[:max_tokens] == one for n in (2 * size, 2 * size + 1)):
            return one
        size *= 3
    return encoded(text)[:max_tokens]


def _refused(text: str, where: str, error: Exception) -> SinkscopeError:
    """Say why a tokenizer takes a text not."""
    try:
        text.encode()
    except UnicodeEncodeError as lone:
        return SinkscopeError(
            f"{where} holds half of a surrogate pair ({text[lone.start]!r} at character {lone.start}), which is no text; "
            "text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace') mends it"
        )
    first = str(error).partition("\n")[0]
    return SinkscopeError(f"the tokenizer refuses {where}: {type(error).__name__}: {first}. Give token ids, or mend the text")


def strings_of(tokenizer: Any, ids: Int[Tensor, " position"]) -> list[str]:
    """Decode ids one by one."""
    return [_string(tokenizer, int(i)) for i in ids]


def _string(tokenizer: Any, i: int) -> str:
    """Decode one token; its number where there is no tokenizer, or it has no such token."""
    try:
        return str(i) if tokenizer is None else str(tokenizer.decode([i]))
    except Exception:  # whatever tokenizers raise about ids that they don't know
        return str(i)
