"""The swap: for a time, a model asks a function of ours for its attention, and another for its masks.

A TransformerBridge rebuilds attention itself and does not ask Hugging Face's attention interface; so its attention modules
make place for those of Hugging Face that they wrap, and the interface has our function. Hooks on queries, keys, values and
the residual stream sit in modules inside and still fire; `hook_pattern` does not. All of it is undone at exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo

#: Bridges that give what they wrap gives, with hook points before and behind it.
WRAPPERS = {"LinearBridge", "Conv1DBridge", "MLPBridge", "GatedMLPBridge"}
#: Those whose norm is Hugging Face's own, where they say so, in the dtype of what comes in.
NORMS = {"NormalizationBridge", "RMSNormalizationBridge"}


@contextmanager
def swapped(adapter: Adapter, attend: Callable[..., Any], mask: Callable[..., Any], *, lean: bool = True) -> Iterator[None]:
    """Have a model call `attend` for attention, and `mask` for its masks; put everything back, whatever happens.

    `lean` is for runs of our own: parts of a bridge whose hook points nobody hooks pass them by.
    """
    name = f"sinkscope-{uuid4().hex}"
    with Undo() as undo:
        for part in (_registered(name, attend, mask), chosen(adapter, name), _unwrapped(adapter)):
            undo.enter_context(part)
        if lean:
            undo.enter_context(_lean(adapter))
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
def chosen(adapter: Adapter, name: str) -> Iterator[None]:
    """Choose the attention of all parts that are not spared: as `set_attn_implementation`, without warnings, and undone."""
    configs: dict[int, Any] = {}
    spared, waiting = adapter.spared, [vars(module).get("config") for module in adapter.modules]
    while waiting:
        config = waiting.pop()
        if config is None or id(config) in spared or id(config) in configs:
            continue
        if hasattr(config, "_attn_implementation_internal"):
            configs[id(config)] = config
            waiting += [getattr(config, key, None) for key in config.sub_configs]
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    with Undo() as undo:
        for config, kept in before:
            undo.callback(setattr, config, "_attn_implementation_internal", kept)
            config._attn_implementation_internal = name
        yield


def registered_by_others(network: nn.Module) -> str | None:
    """Give the name of the attention that a model asks for, where its function is not one of transformers' own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for module in network.modules():
        name = getattr(vars(module).get("config"), "_attn_implementation", None)
        function = None if name in (None, "eager") else ALL_ATTENTION_FUNCTIONS.get(name)
        if function is not None and not str(getattr(function, "__module__", "")).startswith("transformers."):
            return str(name)
    return None


@contextmanager
def _unwrapped(adapter: Adapter) -> Iterator[None]:
    """Let the attention modules of Hugging Face stand where the bridge has put its own around them."""
    bridges = attention_bridges(adapter)
    places = [
        (parent, name, child)
        for parent in adapter.modules
        for name, child in parent._modules.items()
        if child is not None and id(child) in bridges
    ]
    with Undo() as undo:
        for parent, name, child in places:
            undo.callback(parent._modules.__setitem__, name, child)
            parent._modules[name] = bridges[id(child)][1].original_component
        yield


@contextmanager
def _lean(adapter: Adapter) -> Iterator[None]:
    """Have parts of a bridge whose points nobody hooks call what they wrap, no more: it costs short texts a tenth."""
    own = torch.nn.modules.module
    heard = own._global_forward_hooks or own._global_forward_pre_hooks  # at hook points, too
    ways = [] if heard else [(vars(module), way) for module in adapter.modules if (way := _way_past(module)) is not None]
    with Undo() as undo:
        for attributes, way in ways:
            undo.callback(attributes.pop, "forward", None)
            attributes["forward"] = way
        yield


def _way_past(module: nn.Module) -> Callable[..., Any] | None:
    """Give what a part of a bridge does while nobody hooks its points, where that is to call what it wraps."""
    kind, own = type(module), vars(module)
    if kind.__name__ not in WRAPPERS | NORMS or "forward" in own or spliced(module):
        return None
    if not all(name.startswith("transformer_lens.") for name in (kind.__module__, kind.forward.__module__)):
        return None
    wrapped: Any = module._modules.get("_original_component")
    if wrapped is None:
        return None
    if kind.__name__ in NORMS and own.get("use_native_layernorm_autograd"):
        past = partial(_norm, wrapped)
    elif kind.__name__ in WRAPPERS and own.get("name") is not None and not own.get("_use_processed_weights"):
        past = wrapped
    else:
        return None
    points: list[Any] = _points(module)

    def forward(*args: Any, **given: Any) -> Any:
        idle = not any(point._forward_hooks or point._forward_pre_hooks for point in points)  # now: a hook may hook others
        return past(*args, **given) if idle else kind.forward(module, *args, **given)

    return forward


def spliced(module: nn.Module) -> bool:
    """Tell whether somebody has put a module or a function of his own in a hook point's place, as autoencoders are."""
    return any(type(point).__name__ != "HookPoint" or "forward" in vars(point) for point in _points(module))


def _points(module: nn.Module) -> list[nn.Module | None]:
    return [child for name, child in module._modules.items() if name.startswith("hook_")]


def _norm(norm: nn.Module, hidden_states: Tensor, **_: Any) -> Tensor:
    result: Tensor = norm(hidden_states)
    return result.to(hidden_states.dtype)


def attention_bridges(adapter: Adapter) -> dict[int, tuple[int, Any]]:
    """Give the modules that a bridge has put around attention, by their `id`, with their layers; none without patterns."""
    if adapter.kind != "bridge" or not (adapter.shows_patterns or adapter.per_stack):
        return {}
    layers = {id(point): layer for layer, point in adapter.attention_points}
    return {
        id(module): (layers[id(child)], module)
        for module in adapter.modules
        for child in module._modules.values()
        if id(child) in layers
    }
