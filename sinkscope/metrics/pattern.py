"""The same numbers, by the same code, of attention that somebody already has: no model is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.block import Block, PatternRows
from sinkscope.errors import SinkscopeError
from sinkscope.metrics.base import AcrossTexts, AnyMetric
from sinkscope.metrics.catalogue import base_of, resolve
from sinkscope.metrics.observer import Finish, Observer, keys_of
from sinkscope.metrics.values import Rows
from sinkscope.tokens import TextTokens, key_positions

#: Query rows that metrics see at a time.
ROWS = 256
#: What a row may sum to besides 1, and what a later key may get: half precision rounds.
ROUNDING = 0.02


def of_pattern(
    pattern: Any,
    metrics: Iterable[str | AnyMetric | Callable[[Block], Tensor]] | None = None,
    *,
    key: SupportsIndex | str | Iterable[SupportsIndex | str] = 0,
    lengths: Iterable[SupportsIndex] | None = None,
    attention_mask: Any = None,
    causal: bool = True,
    windows: Mapping[int, int] | None = None,
) -> pd.DataFrame:
    """Reduce attention weights that are there already, as :func:`sinkscope.measure` reduces a model's.

    For the output of `output_attentions=True`, of nnsight, or what BertViz is given.

    Args:
        pattern: attention after the softmax, `[batch, head, query, key]`, NumPy or PyTorch; or a list or tuple of these, one
            per layer (None for a layer without attention), or all layers in one array `[layer, batch, head, query, key]`.
        metrics: as for :func:`sinkscope.measure`, of those that need attention alone; None for all of these.
        key: the sink position looked at, negative from the end; or several.
        lengths: real tokens of each text, padded on the right; None for all.
        attention_mask: `[batch, position]`, in place of `lengths`: 0 marks pads, on either side.
        causal: False for an encoder's.
        windows: layer -> its sliding window, for metrics that respect it.

    Returns:
        A tidy frame, one row per (text, metric, layer, head, key) as far as these apply: columns
        `text, metric, layer, head, key, value, null, tokens`, and `query` where a metric is reported per query.

    Raises:
        SinkscopeError: a metric that needs more than attention (named); another shape; weights that are none.

    >>> import torch
    >>> frame = of_pattern(torch.tensor([[[[1.0, 0.0], [0.75, 0.25]]]]), ["sink_mass"])
    >>> frame[["metric", "layer", "head", "value", "null"]].values.tolist()
    [['sink_mass', 0, 0, 0.875, 0.75]]
    """
    asked = _attention_alone(resolve(metrics), metrics is not None)
    layers = _layers(pattern)
    real = _real(next(iter(layers.values())).shape, lengths, attention_mask)
    keys = keys_of(key)
    if any(isinstance(k, str) for k in keys):
        raise SinkscopeError(f"key={key!r}: a pattern has positions and no tokens, so give positions")
    base = base_of(asked)
    finish = Finish(asked, base, keys, causal, list(layers), windows or {})
    rows = Rows(list(layers))
    for row, here in enumerate(real):
        text = TextTokens(f"text {row}", here.nonzero()[:, 0], ())
        observer = Observer(base, [key_positions(k, [text]) for k in keys], list(layers))
        for layer, whole in layers.items():
            one = _one(whole[row], here, layer, row, causal)
            for block in _blocks(one, layer, causal, (windows or {}).get(layer)):
                for group in {m.group for m in base}:
                    observer(block, group)
        for value in finish(observer, 0, text):
            rows.add(value, text.label, len(text))
    return rows.frame().drop(columns="std_error")


def _attention_alone(asked: Sequence[AnyMetric], by_name: bool) -> list[AnyMetric]:
    """Take the metrics that need attention and nothing else, and are about one text."""
    for m in asked:
        if by_name and isinstance(m, AcrossTexts):
            raise SinkscopeError(f"{m.name!r} is about how texts differ: take it from the frame, or from ss.measure")
        for of in base_of([m]):
            if not set(of.needs) <= {"mass", "pattern"}:
                more = next(need for need in of.needs if need not in ("mass", "pattern"))
                raise SinkscopeError(
                    f"{m.name!r} needs {more!r}, and a pattern holds attention alone: ss.measure(model, texts, [{m.name!r}])"
                )
    return [m for m in asked if not isinstance(m, AcrossTexts)]


def _layers(pattern: Any) -> dict[int, Float[Tensor, "batch head query key"]]:
    """Take one layer or several, each `[batch, head, query, key]`."""
    several = isinstance(pattern, list | tuple) or getattr(pattern, "ndim", 0) == 5
    found: dict[int, Tensor] = {}
    for layer, given in enumerate(pattern if several else [pattern]):
        if given is None:
            continue
        held = torch.as_tensor(given).detach() if isinstance(given, Tensor | np.ndarray) else None
        if held is None or held.ndim != 4 or held.shape[2] != held.shape[3] or not held.is_floating_point():
            got = type(given).__name__ if held is None else f"{tuple(held.shape)} {held.dtype}"
            raise SinkscopeError(
                f"the pattern of layer {layer} is {got}: expected attention weights [batch, head, query, key], with as many "
                "queries as keys (of one text, pattern[None])"
            )
        found[layer] = held
    if not found:
        raise SinkscopeError("no pattern was given: output_attentions=True needs a model with attn_implementation='eager'")
    shapes = {(held.shape[0], held.shape[2]) for held in found.values()}
    if len(shapes) != 1:
        raise SinkscopeError(f"layers must have the same texts; got (batch, position) {sorted(shapes)}")
    return found


def _real(shape: torch.Size, lengths: Any, attention_mask: Any) -> Bool[Tensor, "batch position"]:
    """Tell the real tokens of each text."""
    batch, longest = shape[0], shape[2]
    if lengths is not None and attention_mask is not None:
        raise SinkscopeError("give lengths= or attention_mask=, not both")
    if attention_mask is not None:
        real = torch.as_tensor(attention_mask).bool().cpu()
    else:
        given = torch.as_tensor([longest] * batch if lengths is None else [int(n) for n in lengths])
        real = torch.arange(longest) < given[:, None]
        if int(given.max()) > longest:
            raise SinkscopeError(f"lengths={given.tolist()}: the pattern has {longest} positions")
    if real.shape != (batch, longest) or int(real.sum(-1).min()) < 2:
        raise SinkscopeError(f"{batch} texts of 2 to {longest} tokens are in the pattern; got {real.sum(-1).tolist()}")
    return real


def _one(whole: Tensor, here: Tensor, layer: int, row: int, causal: bool) -> Float[Tensor, "1 head query key"]:
    """Take one text's rows and keys without pads; refuse what is no attention."""
    at = here.to(whole.device)
    one = whole if bool(here.all()) else whole[:, at][:, :, at]
    sums = one.sum(-1, dtype=torch.promote_types(one.dtype, torch.float32))
    what = f"the pattern of layer {layer}, text {row},"
    if not bool(torch.isfinite(sums).all()):
        raise SinkscopeError(f"{what} has NaN or infinity")
    if float(one.min()) < 0 or float(sums.max()) > 1 + ROUNDING:
        raise SinkscopeError(
            f"{what} has rows that are no shares (sum up to {float(sums.max()):.3g}): give it after the softmax"
        )
    if causal and float(one.triu(1).amax()) > ROUNDING:
        raise SinkscopeError(f"{what} attends to later keys: pass causal=False")
    return one[None]


def _blocks(one: Tensor, layer: int, causal: bool, window: int | None) -> Iterable[Block]:
    """Cut a text's rows."""
    n = one.shape[2]
    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        yield Block(
            layer=layer,
            start=start,
            rows=PatternRows(one[:, :, start:stop, : stop if causal else n]),
            n_queries=stop - start,
            lengths=torch.tensor([n], device=one.device),
            keys=torch.zeros(1, dtype=torch.long, device=one.device),
            causal=causal,
            window=window,
        )
