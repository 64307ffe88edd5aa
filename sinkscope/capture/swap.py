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

from torch import Tensor, nn

from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo

#: TransformerLens's method that computes `hook_scale` and `hook_normalized` beside what Hugging Face's norm gives.
NORM = "_hf_autograd_forward_with_hooks"


@contextmanager
def swapped(adapter: Adapter, attend: Callable[..., Any], mask: Callable[..., Any]) -> Iterator[None]:
    """Have a model call `attend` for attention, and `mask` for its masks; put everything back, whatever happens."""
    name = f"sinkscope-{uuid4().hex}"
    with _registered(name, attend, mask), chosen(adapter, name), _unwrapped(adapter), _lean_norms(adapter):
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
    spared, waiting = adapter.spared, [vars(module).get("config") for module in adapter.network.modules()]
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
    """Give the modules that a bridge has put around attention, by their `id`, with their layers; none without patterns."""
    if adapter.kind != "bridge" or not (adapter.shows_patterns or adapter.per_stack):
        return {}
    layers = {id(point): layer for layer, point in adapter.attention_points}
    return {
        id(module): (layers[id(child)], module)
        for module in adapter.model.modules()
        for child in module._modules.values()
        if id(child) in layers
    }
