"""Output gates: what a layer's heads have to say is let through by so much (Qwen3-Next, Qwen3.5).

There the projection of queries is twice as wide: of each head's numbers, the second half, through a sigmoid, is what the
head's output is multiplied by before the output projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from sinkscope.capture.engine import Take
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted


@contextmanager
def gated(adapter: Adapter, take: Take) -> Iterator[None]:
    """Hand over every layer's gates, `[batch, position, head, d_head]`, each from 0 (closed) to 1."""
    with Undo() as undo:
        with uninterrupted():
            for layer, projection in adapter.gates.items():
                undo.callback(projection.register_forward_hook(partial(_hand, adapter.n_heads, layer, take)).remove)
        yield


def _hand(heads: int, layer: int, take: Take, projection: Any, args: Any, output: Tensor) -> None:
    halves = output.detach().view(*output.shape[:-1], heads, 2, -1)
    take(layer, "gate", halves[..., 1, :].float().sigmoid())
