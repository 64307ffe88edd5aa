"""Engine `flash`: fused attention that keeps each row's log-sum-exp, so that no pattern is ever formed.

For models whose attention Hugging Face's attention interface can replace, inside a TransformerBridge or plain. The bridge
rebuilds attention itself and does not ask the interface; so, for the time of a run, its attention modules make place for
those of Hugging Face that they wrap, and the interface has a function of ours. Hooks on queries, keys, values and the
residual stream sit in modules inside and still fire; `hook_pattern` does not. All of it is undone at exit.

A metric's rows are then recomputed from queries, keys and log-sum-exps, as few of them as it asks for: see `rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import uuid4

import torch
from torch import Tensor, nn

from sinkscope.capture.hooks import ATTENTION, HooksCapture, _hooked
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.rows import Scores, Scratch
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Batch

if TYPE_CHECKING:
    from sinkscope.capture import OnBlock

#: What Hugging Face's modules pass to their attention function besides, and that changes no number here.
HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "token_type_ids"}
    | {"output_attentions", "output_hidden_states", "return_dict"}
)

#: What the attention op is given or gives, `[batch, position, head, d_head]` to metrics: no hook is needed for it.
SUPPLIED = frozenset({"rotated_query", "rotated_key", "value", "output"})

#: TransformerLens's method that computes `hook_scale` and `hook_normalized` beside what Hugging Face's norm gives.
NORM = "_hf_autograd_forward_with_hooks"

#: Said of a mask.
NEITHER = "its attention mask is neither causal, nor a sliding window, nor the padding of an encoder"


class OtherwiseError(SinkscopeError):
    """A model attends otherwise than its configuration says: no engine would know which keys a query sees."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the model does not attend as its configuration says: {how}")


@dataclass
class FlashCapture(HooksCapture):
    """The engine, for one call of `measure`; what differs from `hooks` is where the rows come from."""

    name: str = "flash"
    #: Whether there may be more keys than queries, from a cache.
    cached: ClassVar[bool] = False
    _calls: int = field(default=0, repr=False)
    _scratch: Scratch = field(default_factory=Scratch, repr=False)

    def __enter__(self) -> FlashCapture:
        """Swap attention, and hook what else was asked for."""
        others = frozenset().union(*self.groups) - ATTENTION - SUPPLIED
        with Undo() as undo:
            undo.enter_context(self.adapter.quiet())
            if others:
                undo.enter_context(_hooked(self.adapter, others, self._on_activation))
            undo.enter_context(swapped(self.adapter, self._attend, Masks(self.adapter.causal)))
            self._undo = undo.pop_all()
        return self

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None]) -> Tensor:
        """Run the body over one batch; see `HooksCapture.run`."""
        self._calls = 0
        return super().run(batch, on_block, tick)

    def _attend(
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
        """Attend, as Hugging Face's modules ask for it: `[batch, head, position, d]` in, `[batch, position, head, d]` out."""
        layer = self._layer(module)
        window, softcap, sinks = (extra.pop(name, None) for name in ("sliding_window", "softcap", "s_aux"))
        causal = extra.pop("is_causal", None)
        causal = getattr(module, "is_causal", None) if causal is None else causal
        for name, given in extra.items():
            if name not in HARMLESS and given is not None and given is not False:
                raise SinkscopeError(f"its attention takes {name!r}, which engine 'flash' does not know")
        if dropout:
            raise SinkscopeError(f"its attention drops out ({dropout}) in eval mode")
        if causal is not None and bool(causal) != self.adapter.causal:
            raise OtherwiseError(f"layer {layer} is {'causal' if causal else 'not causal'}, the model is not so")
        if window != self.adapter.windows.get(layer):
            ours = self.adapter.windows.get(layer)
            raise OtherwiseError(f"layer {layer} has a sliding window of {window}, its configuration says {ours}")
        if query.shape[2] != key.shape[2] and not self.cached:
            raise SinkscopeError(f"layer {layer} has {query.shape[2]} queries and {key.shape[2]} keys")
        given = {
            "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
            "causal": self.adapter.causal,
            "window": window,
            "softcap": softcap,
            "sinks": sinks,
            "key_mask": self._key_mask(attention_mask),
        }
        return self._compute(layer, query, key, value, given).transpose(1, 2).contiguous(), None

    def _compute(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        """Attend, and hand the layer's rows over."""
        out, lse = attention_with_lse(query, key, value, **given)
        if self._pass is not None:
            supplied = {"rotated_query": query, "rotated_key": key, "value": value, "output": out}
            for name in sorted(SUPPLIED & frozenset().union(*self.groups)):
                self._pass.take(layer, name, supplied[name].transpose(1, 2))
            self._pass.take(layer, "pattern", Scores(query, key, lse, scratch=self._scratch, **given))
        return out

    def _layer(self, module: nn.Module) -> int:
        """Tell the layer by the order of calls, and ask the module where it knows."""
        layers = self.adapter.layers
        layer = layers[self._calls % len(layers)]
        if self._calls >= len(layers) and self._pass is not None:
            raise SinkscopeError(f"attention was asked for more than {len(layers)} times, once per layer")
        self._calls += 1
        if getattr(module, "layer_idx", layer) not in (layer, None):
            raise SinkscopeError(f"layer {module.layer_idx} came where layer {layer} was expected")
        return layer

    def _key_mask(self, mask: Tensor | None) -> Tensor | None:
        """Read which keys are real off the mask that `Masks` gave; a mask of the model's own is refused."""
        if mask is None:
            return None
        if self.adapter.causal or mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1:3] != (1, 1):
            raise SinkscopeError("its attention mask is its own, not causal or key padding")
        return mask[:, 0, 0]

    def _inert(self, layer: int) -> InertHookError:
        if self._calls == 0:
            return InertHookError("its attention does not ask Hugging Face's attention interface")
        others = sorted(frozenset().union(*self.groups) - ATTENTION)
        what = " or ".join(others) if others and self._calls == len(self.adapter.layers) else "its attention"
        return InertHookError(f"{what} never came from layer {layer} once Hugging Face's own attention was in place")

    def _first_bad(self, batch: Batch) -> str:
        self._calls = 0
        return super()._first_bad(batch) if self.adapter.points else _first_bad_module(self.adapter, batch)


@dataclass(frozen=True)
class Masks:
    """Stands for Hugging Face's mask function: causal masks need no tensor, an encoder's needs one row of keys."""

    causal: bool
    #: Told (keys before the first, keys, the layers' window) at every call.
    told: Callable[[int, int, int | None], None] | None = None

    def __call__(
        self,
        *args: Any,
        q_length: int = 0,
        kv_length: int = -1,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        use_vmap: bool = False,
        **extra: Any,
    ) -> Tensor | None:
        """Give the mask that the model's attention modules will be handed.

        Raises:
            OtherwiseError: the mask asked for is not causal, a sliding window, or the padding of an encoder.
            SinkscopeError: it can't be told.
        """
        whole = q_length == kv_length if self.told is None else q_offset + q_length == kv_offset + kv_length
        if not args and not use_vmap and mask_function is not None and whole:
            rows = torch.tensor(sorted({0, q_length // 2, q_length - 1}))[:, None] + int(q_offset)
            keys = torch.arange(kv_length) + kv_offset
            nothing = torch.zeros((), dtype=torch.long)
            seen = torch.as_tensor(mask_function(nothing, nothing, rows, keys)).expand(len(rows), kv_length)
            expected = (keys <= rows) if self.causal else torch.ones_like(seen)
            if local_size is not None:
                expected = expected & (rows - keys < local_size)
            if not torch.equal(seen, expected) or not (self.causal or local_size is None):
                raise OtherwiseError(NEITHER)
            if self.told is not None:
                self.told(kv_offset, kv_length, local_size)
                if attention_mask is not None and bool((attention_mask.int().diff(dim=-1) > 0).any()):
                    raise SinkscopeError("texts padded on the left can't be edited: pad on the right, or run one by one")
            if self.causal or attention_mask is None or bool(attention_mask.all()):
                return None
            return attention_mask[:, None, None, :].bool()
        raise SinkscopeError(NEITHER)


# --- the swap -----------------------------------------------------------------------------------------------------


@contextmanager
def swapped(adapter: Adapter, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Have a model call `attend` for attention, and `mask` for its masks; put everything back, whatever happens."""
    name = f"sinkscope-{uuid4().hex}"
    with _registered(name, attend, mask), chosen(adapter.network, name), _unwrapped(adapter), _lean_norms(adapter):
        yield


@contextmanager
def _registered(name: str, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    with Undo() as undo:
        for interface, function in ((AttentionInterface, attend), (AttentionMaskInterface, mask)):
            undo.callback(interface._global_mapping.pop, name, None)  # there is no public way to take a name back
            interface.register(name, function)
        yield


@contextmanager
def chosen(network: nn.Module, name: str) -> Iterator[None]:
    """Choose the attention of every part of a model: as `set_attn_implementation`, without its warnings, and undone."""
    configs: dict[int, Any] = {}
    waiting = [vars(module).get("config") for module in network.modules()]
    while waiting:
        config = waiting.pop()
        if config is not None and hasattr(config, "_attn_implementation_internal") and id(config) not in configs:
            configs[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    with Undo() as undo:
        for config, kept in before:
            undo.callback(setattr, config, "_attn_implementation_internal", kept)
            config._attn_implementation_internal = name
        yield


@contextmanager
def _unwrapped(adapter: Adapter) -> Iterator[None]:
    """Let the attention modules of Hugging Face stand where the bridge has put its own around them."""
    bridges = attention_bridges(adapter)
    places = [
        (parent, name, child)
        for parent in adapter.model.modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) in bridges
    ]
    with Undo() as undo:
        for parent, name, child in places:
            undo.callback(parent._modules.__setitem__, name, child)
            parent._modules[name] = child.original_component
        yield


@contextmanager
def _lean_norms(adapter: Adapter) -> Iterator[None]:
    """Have the bridge's norms give what Hugging Face's give, as they do, without norming once more for idle hooks."""
    norms = [
        module
        for module in adapter.model.modules()
        if vars(module).get("use_native_layernorm_autograd")
        and hasattr(type(module), NORM)
        and not any(p._forward_hooks or p._forward_pre_hooks for p in (module.hook_scale, module.hook_normalized))
    ]
    with Undo() as undo:
        for module in norms:
            undo.callback(vars(module).pop, NORM, None)
            vars(module)[NORM] = partial(_norm, module.original_component)
        yield


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    result: Tensor = norm(x)
    return result.to(x.dtype)


def attention_bridges(adapter: Adapter) -> dict[int, tuple[int, Any]]:
    """Give the modules that a bridge has put around attention, by their `id`, with their layers; none in a plain model."""
    if adapter.kind != "bridge":
        return {}
    layers = {id(adapter.hook_point(layer, "attn.hook_pattern")): layer for layer in adapter.layers}
    return {
        id(module): (layers[id(child)], module)
        for module in adapter.model.modules()
        for child in module._modules.values()
        if id(child) in layers
    }


def _first_bad_module(adapter: Adapter, batch: Batch) -> str:
    """Run once more, looking at what every module gives: the first to give NaN or infinity is named."""
    bad: list[str] = []

    def look(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not bad and isinstance(first, Tensor) and first.is_floating_point() and not bool(torch.isfinite(first).all()):
            bad.append(f"in {name}")

    modules = [(name, module) for name, module in adapter.network.named_modules() if name]
    with Undo() as undo:
        with uninterrupted():
            for name, m in modules:
                undo.callback(m.register_forward_hook(lambda _, __, output, name=name: look(name, output)).remove)
        adapter.body(batch.ids, batch.valid)
    return bad[0] if bad else "after the last layer"
