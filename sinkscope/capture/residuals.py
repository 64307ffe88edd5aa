"""The residual stream after every layer: edited while a model runs, or looked at to locate an edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkscope.capture.hooks import dropping_patterns
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted

T = TypeVar("T")


@contextmanager
def editing_residuals(adapter: Adapter, edit: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Hand the residual stream after every layer to a function, and go on with what it gives."""

    def after(module: nn.Module, args: Any, output: Any, layer: int) -> Any:
        several = isinstance(output, tuple | list)
        first = output[0] if several else output
        edited = edit(layer, first)
        return output if edited is first else type(output)([edited, *output[1:]]) if several else edited

    with Undo() as undo:
        with uninterrupted():
            for layer, block in enumerate(adapter.blocks):
                undo.callback(block.register_forward_hook(partial(after, layer=layer)).remove)
        yield


def one_stream(layer: int, residual: Tensor) -> None:
    """Refuse residual streams of another shape, such as several beside each other.

    Raises:
        SinkscopeError: names the shape.
    """
    if residual.ndim != 3:
        raise SinkscopeError(
            f"the residual stream after layer {layer} is {list(residual.shape)}, not [batch, position, d_model]: it has "
            "several streams, and single activations are not defined there"
        )


def residuals(
    adapter: Adapter, ids: Int[Tensor, " position"], look: Callable[[int, Float[Tensor, "position d_model"]], T]
) -> list[T]:
    """Run the body once, look at the residual stream after each layer, and give what was seen."""
    seen: list[T] = []

    def keep(layer: int, residual: Tensor) -> Tensor:
        one_stream(layer, residual)
        seen.append(look(layer, residual[0].detach()))
        return residual

    batch = ids[None].to(adapter.device)
    with adapter.quiet(), dropping_patterns(adapter), editing_residuals(adapter, keep):
        adapter.body(batch, torch.ones_like(batch, dtype=torch.bool))
    return seen
