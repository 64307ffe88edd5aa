"""Output gates of a run: hooks on what `sinkscope.models.gates` has found hand over how much is let through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from typing import Any

from torch import Tensor

from sinkscope.capture.engine import Take
from sinkscope.models import Adapter
from sinkscope.models.gates import Gate
from sinkscope.runs.undo import Undo, uninterrupted


@contextmanager
def gated(adapter: Adapter, take: Take) -> Iterator[None]:
    """Hand over every layer's gates, `[batch, position, head, d_head or 1]`, each from 0 (closed) up."""
    with Undo() as undo:
        with uninterrupted():
            for gate in adapter.gates:
                hook = partial(_hand, gate, cycle(gate.layers), take)
                undo.callback(gate.projection.register_forward_hook(hook).remove)
        yield


def _hand(gate: Gate, layers: Iterator[int], take: Take, projection: Any, args: Any, output: Tensor) -> None:
    take(next(layers), "gate", gate.read(output))
