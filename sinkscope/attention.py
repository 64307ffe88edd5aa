"""The attention of one short text, averaged over layers and heads: the one place where a pattern is kept, and small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from sinkscope.block import Block
from sinkscope.capture import choose
from sinkscope.errors import SinkscopeError
from sinkscope.models import adapt
from sinkscope.runs.undo import surely

#: Longest text that is drawn whole.
LONGEST = 64


def attention_map(
    model: Any,
    text: Any,
    *,
    layer: int | None = None,
    head: int | None = None,
    bos: bool | None = None,
    max_tokens: int = LONGEST,
) -> pd.DataFrame:
    """Average attention of every query to every key of one short text.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one text, path or row of ids.
        layer: one layer; None averages over all.
        head: one head; None averages over all.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: the text is cut to this many tokens.

    Returns:
        One row per (query, key): `query, key, query_token, key_token, value`; `attrs` says of which model, layer and head.

    Raises:
        SinkscopeError: no such layer or head, or more than one text.
    """
    adapter = adapt(model)
    tokens = adapter.tokenize(text, bos=bos, max_tokens=max_tokens)
    if len(tokens) != 1:
        raise SinkscopeError(f"one text at a time; got {len(tokens)}")
    if layer is not None and layer not in adapter.layers:
        raise SinkscopeError(f"layer={layer}: the layers with attention are {adapter.layers[0]} to {adapter.layers[-1]}")
    if head is not None and not 0 <= head < adapter.n_heads:
        raise SinkscopeError(f"head={head}: the heads are 0 to {adapter.n_heads - 1}")
    sequence = tokens.sequences[0]
    t = len(sequence)
    total = np.zeros((t, t))
    count = 0

    def add(block: Block, group: frozenset[str]) -> None:
        nonlocal count
        if layer is None or block.layer == layer:
            pattern = block.pattern[0] if head is None else block.pattern[0, head : head + 1]
            total[block.start : block.start + block.n_queries, : pattern.shape[-1]] += pattern.mean(0).double().cpu().numpy()
            count += block.start == 0

    with surely(choose("auto", adapter, frozenset({frozenset({"pattern"})}), None, tokens)) as capture:
        capture.run(next(tokens.batches(1, adapter.device)), add, lambda: None)
    query, key = (axis.reshape(-1) for axis in np.indices((t, t)))
    words = np.array(sequence.strings, dtype=object)
    shown = pd.DataFrame(
        {
            "query": query,
            "key": key,
            "query_token": words[query],
            "key_token": words[key],
            "value": (total / max(count, 1)).reshape(-1),
        }
    )
    shown.attrs = {"model": adapter.name, "layer": layer, "head": head}
    return shown
