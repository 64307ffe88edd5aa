"""The engine of `measure`: runs a model's body over batches while something feeds it what happens inside.

What differs from engine to engine is the feed alone: forward hooks (`hooks.py`), or the attention op itself (`flash.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sinkscope.capture.blocks import NotFiniteError, OnBlock, Pass
from sinkscope.capture.source import Source
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Batch

#: Takes (layer, name of the activation, the activation).
Take = Callable[[int, str, Any], None]


@runtime_checkable
class Feed(Protocol):
    """Where an engine's activations come from."""

    name: str

    def attached(self, take: Take) -> AbstractContextManager[None]:
        """Hand over what happens inside the model until exit; it is then as it was."""
        ...

    def begin(self) -> None:
        """Get ready for another forward pass."""
        ...

    def inert(self, layer: int) -> InertHookError:
        """Say why nothing came from a layer, and what works."""
        ...

    def first_bad(self, batch: Batch) -> str:
        """Run once more, and say where NaN or infinity first appears."""
        ...


@dataclass
class Capture:
    """The engine, for one call of `measure`.

    Attributes:
        adapter: the model.
        groups: what blocks must carry, one set per group of metrics; a block is made as soon as a set is complete.
        feed: where it comes from.
        why: what ran, in words, for the report.
        chunk: query rows per step of a chunked prefill, or None for one shot.
    """

    adapter: Adapter
    groups: frozenset[frozenset[str]]
    feed: Feed
    why: str
    chunk: int | None = None
    _undo: ExitStack = field(default_factory=Undo, repr=False)
    _pass: Pass | None = field(default=None, repr=False)
    _thread: int = field(default_factory=threading.get_ident, repr=False)

    @property
    def name(self) -> str:
        """The engine's name, for the report."""
        return self.feed.name

    def __enter__(self) -> Capture:
        """Attach the feed."""
        with Undo() as undo:
            undo.enter_context(self.adapter.quiet())
            undo.enter_context(self.feed.attached(self._take))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        """Detach it."""
        self.close()

    def close(self) -> None:
        """Detach it, if it is attached."""
        self._pass = None
        self._undo.close()

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None], formed: bool = True) -> Tensor:
        """Run the body over one batch, in one shot or chunk by chunk, calling `tick` after each layer.

        `formed` is False where no metric looks at a pattern itself.

        Returns:
            The last hidden state, `[batch, position, d_model]`; of the last chunk alone, where there are several.

        Raises:
            SinkscopeError: NaN or infinity in the activations; names the first layer.
            InertHookError: nothing came from a layer.
        """
        length = batch.ids.shape[1]
        step = self.chunk or length
        cache = self.adapter.new_cache(len(batch.sequences)) if self.chunk else None
        ticks = _Ticks(tick, len(self.adapter.layers), -(-length // step))
        try:
            for start in range(0, length, step):
                stop = min(start + step, length)
                self.feed.begin()
                self._pass = Pass(self.adapter, self.groups, batch, start, on_block, ticks, formed)
                hidden = self.adapter.body(batch.ids[:, start:stop], batch.valid[:, start:stop], cache, **batch.beside)
                if self._pass.unseen:
                    raise self.feed.inert(self._pass.unseen[0])
                if not bool(torch.isfinite(hidden[batch.valid[:, start:stop]]).all()):
                    raise NotFiniteError
            return hidden
        except NotFiniteError:
            self._pass = None
            self.feed.begin()
            where = self.feed.first_bad(batch)
            labels = ", ".join(repr(s.label) for s in batch.sequences)
            raise SinkscopeError(
                f"NaN or infinity {where} of {self.adapter.name} (text {labels}). Nothing was reported. Check the weights; "
                "in float16, try bfloat16 or float32"
            ) from None
        finally:
            self._pass = None

    def _take(self, layer: int, need: str, value: Tensor | Source) -> None:
        if self._pass is not None and threading.get_ident() == self._thread:  # another thread's pass is not ours
            self._pass.take(layer, need, value)


@dataclass
class _Ticks:
    """Turns `parts` reports per layer into one tick per layer."""

    tick: Callable[[], None]
    layers: int
    parts: int
    seen: int = 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen > (self.parts - 1) * self.layers:
            self.tick()
