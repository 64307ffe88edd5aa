"""The attention of one short text, whole: the one place where patterns are kept, and small."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from sinkscope.block import Block
from sinkscope.capture import choose
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter, adapt_side
from sinkscope.runs.undo import surely
from sinkscope.tokens import TextTokens, Tokens, at_most

#: Longest text that is drawn whole.
LONGEST = 64
#: Numbers that all heads' patterns may have; many heads leave room for fewer tokens.
MOST_NUMBERS = 1_100_000


def attention_map(
    model: Any,
    text: Any,
    *,
    layer: int | None = None,
    head: int | None = None,
    side: str | None = None,
    bos: bool | None = None,
    max_tokens: int = LONGEST,
) -> pd.DataFrame:
    """Average attention of every query to every key of one short text.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one text, path or row of ids; or one image or sound, or text with these in it, as :func:`sinkscope.measure`
            takes it, which is not cut.
        layer: one layer; None averages over all heads of all.
        head: one head; None averages over all. Layers that have it not are left out.
        side: as for :func:`sinkscope.measure`.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: the text is cut to this many tokens.

    Returns:
        One row per (query, key): `query, key, query_token, key_token, value`; `attrs` says of which model, layer and head.

    Raises:
        SinkscopeError: no such layer or head, or more than one text.
    """
    adapter = adapt_side(model, side, features=True)
    tokens = adapter.tokenize(text, bos=bos, max_tokens=max_tokens)
    sequence = _only(tokens)
    if layer is not None and layer not in adapter.layers:
        raise SinkscopeError(f"layer={layer}: the layers with attention are {adapter.layers[0]} to {adapter.layers[-1]}")
    most = adapter.n_heads if layer is None else adapter.heads[layer]
    if head is not None and not 0 <= head < most:
        raise SinkscopeError(f"head={head}: the heads are 0 to {most - 1}")
    shape = (len(sequence), len(sequence.keyed))
    total = np.zeros(shape)
    count = 0

    def add(block: Block, group: frozenset[str]) -> None:
        nonlocal count
        if layer is None or block.layer == layer:
            pattern = block.pattern[0] if head is None else block.pattern[0, head : head + 1]
            total[block.start : block.start + block.n_queries, : pattern.shape[-1]] += pattern.sum(0).double().cpu().numpy()
            count += len(pattern) * (block.start == 0)

    _run(adapter, tokens, add)
    query, key = (axis.reshape(-1) for axis in np.indices(shape))
    words, key_words = (np.array(s.strings, dtype=object) for s in (sequence, sequence.keyed))
    shown = pd.DataFrame(
        {
            "query": query,
            "key": key,
            "query_token": words[query],
            "key_token": key_words[key],
            "value": (total / max(count, 1)).reshape(-1),
        }
    )
    shown.attrs = {"model": adapter.name, "layer": layer, "head": head}
    return shown


def attention_patterns(
    model: Any, text: Any, *, side: str | None = None, bos: bool | None = None, max_tokens: int | None = None
) -> pd.DataFrame:
    """Every head's whole attention pattern of one short text.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one text, path or row of ids; or one image or sound, or text with these in it, as :func:`sinkscope.measure`
            takes it, which is not cut.
        side: as for :func:`sinkscope.measure`, but not `"cross"`.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: the text is cut to this many tokens; None: 64, or fewer where that is over a million numbers in all heads.

    Returns:
        One row per (layer, head, query, key): `layer, head, query, key, query_token, value`, float32; of a causal model the
        keys up to the query (all, where images see themselves both ways). A :class:`SinkReport` that has it as `patterns`
        shows it on its page.

    Raises:
        SinkscopeError: more than one text, or cross-attention.
    """
    adapter = adapt_side(model, side, features=True)
    if adapter.side == "cross":
        raise SinkscopeError("side='cross': the explorer shows a text's attention to itself: take ss.attention_map")
    most = at_most(max_tokens) or _longest(adapter)
    tokens = adapter.tokenize(text, bos=bos, max_tokens=most)
    sequence = _only(tokens)
    t = len(sequence)
    held = {layer: np.zeros((n, t, t), dtype=np.float32) for layer, n in adapter.heads.items()}

    def add(block: Block, group: frozenset[str]) -> None:
        pattern = block.pattern[0]
        rows = slice(block.start, block.start + block.n_queries)
        held[block.layer][:, rows, : pattern.shape[-1]] = pattern.float().cpu().numpy()

    _run(adapter, tokens, add)
    earlier = adapter.causal and sequence.ends is None
    query, key = np.tril_indices(t) if earlier else (axis.reshape(-1) for axis in np.indices((t, t)))
    values = np.concatenate([held[layer][:, query, key] for layer in adapter.layers])
    layer, head = (np.array(axis).repeat(len(query)) for axis in zip(*_every_head(adapter), strict=True))
    pair = np.tile(np.arange(len(query)), len(values))
    words = pd.Categorical(list(sequence.strings))
    return pd.DataFrame(
        {
            "layer": layer.astype(np.int16),
            "head": head.astype(np.int16),
            "query": query[pair].astype(np.int16),
            "key": key[pair].astype(np.int16),
            "query_token": words[query[pair]],
            "value": values.reshape(-1),
        }
    )


def _longest(adapter: Adapter) -> int:
    """How many tokens there is room for in all heads."""
    heads = sum(adapter.heads.values())
    return max(2, min(LONGEST, int(math.sqrt((2 if adapter.causal else 1) * MOST_NUMBERS / heads))))


def _every_head(adapter: Adapter) -> list[tuple[int, int]]:
    return [(layer, head) for layer, n in adapter.heads.items() for head in range(n)]


def _only(tokens: Tokens) -> TextTokens:
    if len(tokens) != 1:
        raise SinkscopeError(f"one text at a time; got {len(tokens)}")
    return tokens.sequences[0]


def _run(adapter: Adapter, tokens: Tokens, add: Callable[[Block, frozenset[str]], None]) -> None:
    with surely(choose("auto", adapter, frozenset({frozenset({"pattern"})}), None, tokens)) as capture:
        capture.run(next(tokens.batches(1, adapter.device)), add, lambda: None)
