"""The neurons of an MLP: edited on their way into its last matrix, while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.capture.hooks import dropping_patterns, hooked
from sinkscope.edit import Edit
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted

#: The hook point of what an MLP's last matrix takes, on a HookedTransformer.
POINT = "mlp.hook_post"


class _Silence(Edit):
    """Takes every neuron away, for the proof."""

    def mlp(self, layer: int, activations: Tensor) -> Tensor:
        return torch.zeros_like(activations)


def neurons_of(adapter: Adapter, edits: Sequence[Edit]) -> tuple[int, ...]:
    """Give the layers whose neurons some edits touch, each proved on a few tokens to be heard of.

    Raises:
        SinkscopeError: a layer's MLP is not one whose neurons can be told (experts), or has not these neurons.
        InertHookError: what its neurons do changes nothing.
    """
    touching = [part for edit in edits for part in edit.parts() if "neurons" in part.touches]
    layers = tuple(layer for layer in adapter.layers if any(part.edits(layer) for part in touching))
    if layers:
        plain = _body(adapter, (), Edit())
        for layer in layers:
            if torch.equal(_body(adapter, (layer,), _Silence()), plain):
                raise InertHookError(f"zero_neuron would do nothing in layer {layer} of {adapter.name}")
        for part in touching:
            _body(adapter, layers, part)
    return layers


def _body(adapter: Adapter, layers: Sequence[int], edit: Edit) -> Tensor:
    """Run a few tokens."""
    ids = torch.arange(1, 9, device=adapter.device)[None]
    with adapter.quiet(), dropping_patterns(adapter), editing_neurons(adapter, layers, lambda: edit):
        return adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))


@contextmanager
def editing_neurons(adapter: Adapter, layers: Sequence[int], edit: Callable[[], Edit]) -> Iterator[None]:
    """Hand the neurons of some layers to an edit, and go on with what it gives."""

    def at_point(value: Tensor, hook: Any, *, layer: int) -> Tensor | None:
        return edit().mlp(layer, value) if edit().edits(layer) else None

    def before(module: nn.Module, args: tuple[Any, ...], layer: int) -> tuple[Any, ...] | None:
        return (edit().mlp(layer, args[0]), *args[1:]) if edit().edits(layer) else None

    if adapter.kind == "hooked_transformer":
        with hooked(adapter, {"neurons": POINT}, lambda layer, _: partial(at_point, layer=layer), layers):
            yield
        return
    matrices = [(layer, last_matrix(adapter, layer)) for layer in layers]
    with Undo() as undo:
        with uninterrupted():
            for layer, matrix in matrices:
                undo.callback(matrix.register_forward_pre_hook(partial(before, layer=layer)).remove)
        yield


def last_matrix(adapter: Adapter, layer: int) -> nn.Module:
    """Find the matrix that an MLP ends with: the one outside attention that gives the stream's width and takes another.

    Raises:
        SinkscopeError: there is none, or there are several.
    """
    inside = [(name.lower(), m) for name, m in adapter.blocks[layer].named_modules()]
    names = [(name, m) for name, m in inside if "attn" not in name and "attention" not in name]
    experts = any(p.ndim > 2 for _, module in names for p in module.parameters(recurse=False))
    found: list[nn.Module] = [m for _, m in names if _sizes(m)[1] == adapter.width != _sizes(m)[0]]
    if len(found) != 1 or experts:
        raise SinkscopeError(
            f"layer {layer} of {adapter.name} has no MLP of one matrix up and one down (experts?), so its neurons can't be "
            "told: edit_activation edits the residual stream after it"
        )
    return found[0]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Give how many numbers a matrix takes, and gives (of the matrix itself, not of what a bridge puts around it)."""
    own = vars(module)
    if "in_features" in own:
        return int(own["in_features"]), int(own["out_features"])
    if "nf" in own and "nx" in own:  # GPT-2's, which lies on its side
        return int(own["nx"]), int(own["nf"])
    return 0, 0
