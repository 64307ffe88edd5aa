"""Attention as Hugging Face's modules ask for it: which layer asks, and with what; checked against the configuration."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.block import Chunk
from sinkscope.capture.masks import OtherwiseError, check_seen
from sinkscope.capture.op import attention_with_lse
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter

#: What Hugging Face's modules pass to their attention function besides, and that changes no number here.
HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "token_type_ids"}
    | {"output_attentions", "output_hidden_states", "return_dict"}
)

#: Attends: (layer, query, key, value, what :func:`sinkscope.capture.op.attention_with_lse` is given by name) -> output.
Compute = Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


def plainly(layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
    """Attend where nobody looks."""
    return attention_with_lse(query, key, value, **given)[0]


@dataclass
class Calls:
    """The function that stands in Hugging Face's attention interface: reads a call, and has `compute` attend.

    Attributes:
        adapter: the model.
        compute: attends.
        plainly: attends where nobody looks: on the other sides of an encoder-decoder.
        live: whether others run the model: layers then say themselves who they are, in any order, and a cache may hold more
            keys than there are queries. Otherwise layers are told apart by the order of their calls.
        made: calls since `made` was last set to 0.
    """

    adapter: Adapter
    compute: Compute
    plainly: Compute = plainly
    live: bool = False
    made: int = 0
    _thread: int = field(default_factory=threading.get_ident, repr=False)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **extra: Any,
    ) -> tuple[Tensor, None]:
        """Attend: `[batch, head, position, d]` in, `[batch, position, head, d]` out.

        Raises:
            OtherwiseError: the layer does not attend as the configuration says.
            SinkscopeError: the call holds what is not known here.
        """
        if not self.live and threading.get_ident() != self._thread:
            raise SinkscopeError("this model is being measured in another thread: wait until that is done, or run a copy")
        side = self.adapter.side_of(module)
        looked = side == self.adapter.side  # of an encoder-decoder, the other sides just attend
        must = self.adapter.causal if looked else side == "decoder"
        layer = self._layer(module) if looked else -1
        window, softcap, sinks, bias = (
            extra.pop(name, None) for name in ("sliding_window", "softcap", "s_aux", "position_bias")
        )
        chosen = extra.pop("indices", None)
        if chosen is not None and chosen.shape[-1] < key.shape[2]:
            raise SinkscopeError(
                f"each query attends to the {chosen.shape[-1]} of {key.shape[2]} keys that an indexer chooses"
            )
        causal = extra.pop("is_causal", None)
        causal = getattr(module, "is_causal", None) if causal is None else causal
        for name, given in extra.items():
            if name not in HARMLESS and given is not None and given is not False:
                raise SinkscopeError(f"its attention takes {name!r}, which engine 'flash' does not know")
        if dropout and not self.live:
            raise SinkscopeError(f"its attention drops out ({dropout}) in eval mode")
        if dropout:
            raise SinkscopeError(f"its attention drops out ({dropout}), which an edit does not: model.eval() first")
        if causal is not None and bool(causal) != must:
            raise OtherwiseError(f"layer {layer} is {'causal' if causal else 'not causal'}, the model is not so")
        ours = self.adapter.windows.get(layer)
        if window is not None and not must and (window + 1 == ours or not looked):
            window += 1  # on both sides, T5Gemma's counts the keys before the query's own
        ours = None if isinstance(ours, Chunk) and key.shape[2] <= ours else ours  # within the first one, all keys are seen
        if looked and window != ours:
            raise OtherwiseError(f"layer {layer} has a sliding window of {window}, its configuration says {ours}")
        key, value, attention_mask, entries = _apart(self.adapter.compressed, query, key, value, attention_mask)
        if query.shape[2] != key.shape[2] and not self.live and side != "cross":
            raise SinkscopeError(f"layer {layer} has {query.shape[2]} queries and {key.shape[2]} keys")
        given = {
            "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "causal": must,
            "window": window,
            "softcap": softcap,
            "sinks": sinks,
            "key_mask": _key_mask(attention_mask if chosen is None and self.adapter.mixed is None else None, must),
            "bias": bias if bias is not None and bool(bias.any()) else None,  # of layers that have none, T5 passes zeros
        } | entries
        if looked and self.adapter.mixed is not None:
            given |= _as_seen(attention_mask, self.adapter.mixed.within(window), window, layer, query)
        compute = self.compute if looked else self.plainly
        with torch.autocast(query.device.type, enabled=False):  # it would lower the products of any statistic
            out = compute(layer, query, key.to(query.dtype), value.to(query.dtype), given)
        return out.transpose(1, 2).contiguous(), None

    def _layer(self, module: nn.Module) -> int:
        """Tell the layer by the order of calls, and ask the module where it knows."""
        says = self.adapter.layer_of(module)
        if self.live:
            if says is None:
                raise SinkscopeError(f"{type(module).__name__} does not say which layer it is")
            return says
        layers = self.adapter.layers
        if self.made >= len(layers):
            raise SinkscopeError(f"attention was asked for more than {len(layers)} times, once per layer")
        layer, stack = layers[self.made], self.adapter.per_stack
        self.made += 1
        if says not in (layer % stack if stack else layer, None):
            raise SinkscopeError(f"layer {says} came where layer {layer} was expected")
        return layer


def _apart(compressed: bool, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Any, ...]:
    """Tell keys of tokens from those behind them, which go with who sees which; a row may see none."""
    n, dtype = query.shape[2], query.dtype
    if not compressed:
        return key, value, mask, {}
    tokens = key[:, :, :n], value[:, :, :n], None
    if mask is None or key.shape[2] == n:
        return *tokens, {}
    hidden = mask.to(dtype).clamp(min=torch.finfo(dtype).min)
    return *tokens, {"entries": (key[:, :, n:].to(dtype), value[:, :, n:].to(dtype), hidden)}


def _key_mask(mask: Tensor | None, causal: bool) -> Tensor | None:
    """Read which keys are real off the mask that `Masks` gave, or an encoder made itself; any other is refused."""
    if mask is None:
        return None
    own = SinkscopeError("its attention mask is its own, not causal or key padding")
    if causal or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise own
    keys = mask[:, 0, 0]
    if keys.dtype == torch.bool:
        return keys
    real = keys == 0
    if not bool((real | (keys == torch.finfo(keys.dtype).min)).all()):
        raise own
    return None if bool(real.all()) else real


def _as_seen(mask: Tensor | None, ends: Tensor, window: int | None, layer: int, query: Tensor) -> dict[str, Any]:
    """Take the mask of text with images in it: causal, or in which images see themselves both ways."""
    seen = check_seen(None if mask is None else mask[0, 0], ends.to(query.device), window, layer)
    if torch.equal(ends, torch.arange(1, len(ends) + 1, device=ends.device)):
        return {}
    hidden = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -torch.inf)
    return {"causal": False, "window": None, "bias": hidden.expand(1, query.shape[1], -1, -1)}
