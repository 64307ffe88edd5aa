"""Engine for interventions: one edited forward pass after another, edits made inside Hugging Face's attention interface.

It stands where engine `flash` stands, and so is live on every family that asks the interface, also where TransformerLens
would discard an edit. A pass gives its last hidden states piece by piece: one piece as a rule; a streaming window runs the
text a piece at a time, with the keys and values that its cache still holds, and so has no bound on the text's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.attend import attend
from sinkscope.capture.call import Calls
from sinkscope.capture.flash import first_bad_module
from sinkscope.capture.hooks import first_bad_layer
from sinkscope.capture.masks import Masks
from sinkscope.capture.neurons import editing_neurons
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.residuals import editing_residuals
from sinkscope.capture.routes import Route
from sinkscope.capture.stream import Rotation, Stream
from sinkscope.capture.swap import swapped
from sinkscope.edit import NOTHING, Edit
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo
from sinkscope.tokens import Batch

#: Tokens per forward pass: where a model is run anew for every token, and of a streaming window.
TOKENS, PIECE = 4096, 256

Tick = Callable[[], None]


@runtime_checkable
class Edited(Protocol):
    """What `evaluate` asks of an engine: entered once, then one pass after another."""

    name: str
    why: str
    #: Sum over layers, heads and queries of the attention to each key of the latest pass, float64.
    received: Tensor

    def __enter__(self) -> Any:
        """Prepare the model."""
        ...

    def __exit__(self, *how: Any) -> None:
        """Restore the model."""
        ...

    def close(self) -> None:
        """Restore the model, if it is not."""
        ...

    def pieces(self, batch: Batch, route: Route, tick: Tick) -> Iterator[Float[Tensor, "position d_model"]]:
        """Run the body over one text under an edit; yields its last hidden states, piece by piece, in order."""
        ...

    def copies(self, batch: Batch, edit: Edit, tick: Tick, first: int) -> Float[Tensor, "copy position d_model"]:
        """Run the body over copies of one text, at once; layers before the first are not run, and attention not counted."""
        ...


@dataclass
class InsideCapture:
    """The engine that edits inside the attention op; `frequencies` are there where an edit turns queries into a cache."""

    adapter: Adapter
    frequencies: Tensor | None = field(default=None, repr=False)
    #: Layers whose neurons are edited.
    neurons: tuple[int, ...] = ()
    name: str = "flash"
    why: str = "edits made inside the attention op (flash engine proved exact)"
    received: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _calls: Calls = field(init=False, repr=False)
    _undo: ExitStack = field(default_factory=Undo, repr=False)
    _edit: Edit = field(default=NOTHING, repr=False)
    #: The model, beside the source of the text that it runs.
    _beside: Adapter = field(init=False, repr=False)
    _at: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _length: int = field(default=0, repr=False)
    _tick: Tick = field(default=lambda: None, repr=False)
    #: The first layer that runs, and whether attention is counted.
    _first: int = field(default=0, repr=False)
    _counts: bool = field(default=True, repr=False)
    _stream: Stream | None = field(default=None, repr=False)

    def __enter__(self) -> InsideCapture:
        """Swap attention, and stand by the residual stream."""
        self._calls = Calls(self.adapter, self._attend)
        with Undo() as undo:
            undo.enter_context(self.adapter.quiet())
            undo.enter_context(swapped(self.adapter, self._calls, Masks.of(self.adapter)))
            undo.enter_context(editing_residuals(self.adapter, self._residual))
            undo.enter_context(editing_neurons(self.adapter, self.neurons, lambda: self._edit))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        """Put everything back."""
        self.close()

    def close(self) -> None:
        """Put everything back, if it is not."""
        self._undo.close()

    def pieces(self, batch: Batch, route: Route, tick: Tick) -> Iterator[Float[Tensor, "position d_model"]]:
        """Run the body over one text under an edit; yields its last hidden states, piece by piece.

        Raises:
            SinkscopeError: NaN or infinity; names the first module or layer where it appears.
            InertHookError: attention was not asked for.
        """
        self._begin(route.edit, batch, tick)
        if route.how == "streamed":
            passes = self._streamed(batch.ids, tick)
        elif route.how == "rerun":
            passes = self._rerun(batch.ids[0], route.edit.rerun() or 1, tick)
        else:
            passes = iter([self._body(batch.ids)[0]])
        for hidden in passes:
            yield self._finite(hidden, batch)

    def copies(self, batch: Batch, edit: Edit, tick: Tick, first: int) -> Float[Tensor, "copy position d_model"]:
        """Run the body over copies of one text, at once; layers before the first are not run, and attention not counted.

        Raises:
            SinkscopeError: NaN or infinity.
            InertHookError: attention was not asked for.
        """
        self._begin(edit, batch, tick, first, counts=False)
        return self._finite(self._body(batch.ids), batch)

    def _begin(self, edit: Edit, batch: Batch, tick: Tick, first: int = 0, counts: bool = True) -> None:
        self._edit, self._tick, self._stream = edit, tick, None
        self._length = len(batch.sequences[0].keyed)
        self._first, self._counts, self._beside = first, counts, self.adapter.beside(batch.sequences[0])
        self.received = torch.zeros(self._length, dtype=torch.float64)

    def _finite(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Give what was found, if it is a number everywhere."""
        if bool(torch.isfinite(hidden).all()):
            return hidden
        length = batch.ids.shape[1]
        whole = self._first == 0 and length <= (self.adapter.n_ctx or length)
        where = self._first_bad(batch) if whole else "in a layer"
        raise SinkscopeError(
            f"NaN or infinity {where} of {self.adapter.name} under {self._edit} (text {batch.sequences[0].label!r})"
        )

    def _body(self, ids: Int[Tensor, "batch position"], start: int = 0) -> Float[Tensor, "batch position d_model"]:
        """Run the body; the text's positions begin at `start`, the model's where the stream says."""
        self._calls.made = sum(layer < self._first for layer in self.adapter.layers)
        self._at = torch.arange(self._length) if self.adapter.side == "encoder" else torch.arange(start, start + ids.shape[1])
        first = start if self._stream is None else self._stream.base
        hidden = self._beside.body(ids, torch.ones_like(ids, dtype=torch.bool), first=first)
        if self._calls.made != len(self.adapter.layers):
            layer = self.adapter.layers[self._calls.made]
            raise InertHookError(f"layer {layer} of {self.adapter.name} asked for no attention, so nothing was edited")
        return hidden

    def _rerun(self, ids: Int[Tensor, " position"], size: int, tick: Tick) -> Iterator[Tensor]:
        """Run on every window of `size` tokens, as many at a time as make `TOKENS`; of each, the last row counts."""
        self._tick = lambda: None
        windows = ids.unfold(0, size, 1)
        pieces = torch.split(windows[1:], max(1, TOKENS // size))
        yield self._body(windows[:1])[0]
        for piece in self._ticked(pieces, tick):
            yield self._body(piece)[:, -1]
        self.received.fill_(torch.nan)  # each window has a first token of its own

    def _streamed(self, ids: Int[Tensor, "1 position"], tick: Tick) -> Iterator[Tensor]:
        """Run a piece at a time; keys and values that are still in reach are carried over."""
        self._tick = lambda: None
        self._stream = Stream(max(size for size, _ in map(self._cache, self.adapter.layers)))
        starts = range(0, ids.shape[1], PIECE)
        for start in self._ticked(starts, tick):
            self._stream.base = min(start, self._stream.size)
            yield self._body(ids[:, start : start + PIECE], start)[0]

    def _cache(self, layer: int) -> tuple[int, int]:
        """Give the size of the cache of a layer that streams, and its sinks; a plain window has none."""
        return self._edit.cache(layer) or (self._edit.evicts() or 0, 0)

    def _ticked(self, pieces: Any, tick: Tick) -> Iterator[Any]:
        """Give pieces one by one, and spread one tick per layer over them."""
        ticks, layers = 0, len(self.adapter.layers)
        for done, piece in enumerate(pieces, 1):
            yield piece
            while ticks < layers * done // len(pieces):
                tick()
                ticks += 1

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        if not (self._counts or self._edit.edits(layer)):
            self._tick()
            return attention_with_lse(query, key, value, **given)[0]
        at, rotation = self._at, None
        if self.frequencies is not None:
            shift = 0 if self._stream is None else int(at[0]) - self._stream.base
            rotation = Rotation(self.frequencies, shift)
            if self._stream is not None:
                at, key, value = self._stream.join(layer, at, key, value, rotation, self._cache(layer)[1])
        crossing = None
        if self.adapter.side == "cross":
            at, crossing = torch.arange(self._length), at
        what = (self._edit, layer, query, key, value, at, self._length, given, rotation)
        out, received = attend(*what, crossing=crossing)
        self.received[at] += received
        if self._stream is not None:
            end = int(at[-1]) + 1
            kept = torch.isin(at, self._edit.reach(layer, end, end + 1))
            self._stream.keep(layer, at[kept], key[:, :, kept], value[:, :, kept], rotation)
        self._tick()
        return out

    def _residual(self, layer: int, residual: Tensor) -> Tensor:
        return self._edit.residual(layer, residual, self._at) if self._edit.edits(layer) else residual

    def _first_bad(self, batch: Batch) -> str:
        self._calls.made = 0
        layers = self.adapter.shows_patterns and self.adapter.side != "encoder"  # whose positions are not the batch's
        return (first_bad_layer if layers else first_bad_module)(self.adapter, batch)
