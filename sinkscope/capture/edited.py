"""Engine for interventions: one edited forward pass after another, edits made inside Hugging Face's attention interface.

It stands where engine `flash` stands, and so is live on every family that asks the interface, also where TransformerLens
would discard an edit. A pass gives its last hidden states piece by piece: one piece as a rule; a streaming window runs the
text a piece at a time, with the keys and values that its cache still holds, and so has no bound on the text's length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture import points, proof
from sinkscope.capture.attend import NONE, Rotation, attend, turn
from sinkscope.capture.flash import FlashCapture
from sinkscope.capture.residuals import editing_residuals
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.models import Adapter
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, Tokens

#: Tokens per forward pass: where a model is run anew for every token, and of a streaming window.
TOKENS, PIECE = 4096, 256
GROUPS = frozenset({frozenset({"mass"})})

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

    def pieces(self, batch: Batch, edit: Intervention, tick: Tick) -> Iterator[Float[Tensor, "position d_model"]]:
        """Run the body over one text under an edit; yields its last hidden states, piece by piece, in order."""
        ...


@dataclass
class EditedCapture(FlashCapture):
    """The engine that edits inside the attention op."""

    received: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    #: Of rotary positions, where an edit turns queries to their positions in a cache.
    frequencies: Tensor | None = field(default=None, repr=False)
    _edit: Intervention = field(default=NONE, repr=False)
    _at: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _length: int = field(default=0, repr=False)
    _tick: Tick = field(default=lambda: None, repr=False)
    _stream: _Stream | None = field(default=None, repr=False)

    def __enter__(self) -> EditedCapture:
        """Swap attention, and stand by the residual stream."""
        super().__enter__()
        self._undo.enter_context(editing_residuals(self.adapter, self._residual))
        return self

    def pieces(self, batch: Batch, edit: Intervention, tick: Tick) -> Iterator[Float[Tensor, "position d_model"]]:
        """Run the body over one text under an edit; yields its last hidden states, piece by piece.

        Raises:
            SinkscopeError: NaN or infinity; names the first module or layer where it appears.
            InertHookError: attention was not asked for.
        """
        self._edit, self._tick, self._stream, self._length = edit, tick, None, batch.ids.shape[1]
        self.received = torch.zeros(self._length, dtype=torch.float64)
        size = edit.rerun()
        if streams(self.adapter, edit, self._length):
            passes = self._streamed(batch.ids, tick)
        elif size is not None and size < self._length:
            passes = self._rerun(batch.ids[0], size, tick)
        else:
            passes = iter([self._body(batch.ids)[0]])
        for hidden in passes:
            if not bool(torch.isfinite(hidden).all()):
                where = self._first_bad(batch) if self._length <= (self.adapter.n_ctx or self._length) else "in a layer"
                raise SinkscopeError(
                    f"NaN or infinity {where} of {self.adapter.name} under {edit} (text {batch.sequences[0].label!r})"
                )
            yield hidden

    def _body(self, ids: Int[Tensor, "batch position"], start: int = 0) -> Float[Tensor, "batch position d_model"]:
        """Run the body; the text's positions begin at `start`, the model's where the stream says."""
        self._calls = 0
        self._at = torch.arange(start, start + ids.shape[1])
        first = start if self._stream is None else self._stream.base
        hidden = self.adapter.body(ids, torch.ones_like(ids, dtype=torch.bool), first=first)
        if self._calls != len(self.adapter.layers):
            raise self._inert(self.adapter.layers[min(self._calls, len(self.adapter.layers) - 1)])
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
        self._stream = _Stream(max(size for size, _ in map(self._cache, self.adapter.layers)))
        starts = range(0, ids.shape[1], PIECE)
        for start in self._ticked(starts, tick):
            self._stream.base = min(start, self._stream.size)
            yield self._body(ids[:, start : start + PIECE], start)[0]

    def _cache(self, layer: int) -> tuple[int, int]:
        """Give the size of the cache of a layer that streams, and its sinks; a plain window has none."""
        return self._edit.cache(layer) or (max(getattr(part, "size", 0) for part in self._edit.parts()), 0)

    def _ticked(self, pieces: Any, tick: Tick) -> Iterator[Any]:
        """Give pieces one by one, and spread one tick per layer over them."""
        ticks, layers = 0, len(self.adapter.layers)
        for done, piece in enumerate(pieces, 1):
            yield piece
            while ticks < layers * done // len(pieces):
                tick()
                ticks += 1

    def _compute(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        at, rotation = self._at, None
        if self.frequencies is not None:
            shift = 0 if self._stream is None else int(at[0]) - self._stream.base
            rotation = Rotation(self.frequencies, shift)
            if self._stream is not None:
                at, key, value = self._stream.join(layer, at, key, value, rotation, self._cache(layer)[1])
        out, received = attend(self._edit, layer, query, key, value, at, self._length, given, rotation)
        self.received[at] += received
        if self._stream is not None:
            end = int(at[-1]) + 1
            kept = torch.isin(at, self._edit.reach(layer, end, end + 1))
            self._stream.keep(layer, at[kept], key[:, :, kept], value[:, :, kept], rotation)
        self._tick()
        return out

    def _residual(self, layer: int, residual: Tensor) -> Tensor:
        return self._edit.residual(layer, residual, self._at) if self._edit.edits(layer) else residual


@dataclass
class _Stream:
    """What the caches hold between pieces; `base` is the model's position of the piece's first token."""

    size: int
    base: int = 0
    held: dict[int, tuple[Tensor, Tensor, Tensor, int]] = field(default_factory=dict)

    def join(
        self, layer: int, at: Tensor, key: Tensor, value: Tensor, rotation: Rotation, sinks: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the keys and values that are held before those of a piece, the recent keys turned to their new positions."""
        if layer not in self.held:
            return at, key, value
        old_at, old_key, old_value, shift = self.held[layer]
        if shift != rotation.shift:
            by = torch.where(old_at < sinks, 0, shift - rotation.shift)
            old_key = turn(old_key, by.to(key.device), rotation.frequencies)
        return torch.cat([old_at, at]), torch.cat([old_key, key], 2), torch.cat([old_value, value], 2)

    def keep(self, layer: int, at: Tensor, key: Tensor, value: Tensor, rotation: Rotation | None) -> None:
        """Hold what the next query may see."""
        self.held[layer] = (at, key, value, 0 if rotation is None else rotation.shift)


def streams(adapter: Adapter, edit: Intervention, length: int) -> bool:
    """Tell whether an edit runs a text of this length a piece at a time.

    That is a streaming window in every layer; and a plain window on a text past the context of a rotary model, where it is
    a streaming window without sinks.
    """
    parts = edit.parts()
    if any(part.touches not in ({"scores"}, {"pattern"}) for part in parts):
        return False
    if all(edit.cache(layer) is not None for layer in adapter.layers):
        return True
    beyond = adapter.n_ctx is not None and length > adapter.n_ctx
    plain = [p for p in parts if p.is_window and p.layers is None and not getattr(p, "sinks", 0)]
    return beyond and len(plain) == 1 and bool(adapter.rotations)


def plan(adapter: Adapter, tokens: Tokens, edits: Sequence[Intervention]) -> Edited:
    """Give the engine that can make these edits, proved on a few tokens: inside the attention op, else at hook points.

    Raises:
        InertHookError: no edit can be made inside this model's attention, or this one would be discarded; says what works.
    """
    capture = proof.plan(adapter, GROUPS, tokens) if adapter.causal else "it is an encoder, which predicts no next token"
    if not isinstance(capture, str):
        longest = max(len(s) for s in tokens.sequences)
        turns = any(streams(adapter, e, longest) or any(map(e.cache, adapter.layers)) for e in edits)
        why = "edits made inside the attention op (flash engine proved exact)"
        return EditedCapture(adapter, GROUPS, None, why, frequencies=frequencies(adapter) if turns else None)
    if adapter.causal and adapter.points:
        return points.plan(adapter, edits, capture)
    raise InertHookError(
        f"interventions can't run inside the attention of {adapter.name}: {capture}. They are made inside Hugging Face's "
        "attention interface: use a TransformerBridge (ss.load_model(name)) or a plain Hugging Face decoder that asks "
        "it, such as GPT-2, OPT, Llama, Mistral, Qwen, Gemma, GPT-NeoX, Phi or gpt-oss"
    )


# --- positions inside a cache -------------------------------------------------------------------------------------


def frequencies(adapter: Adapter) -> Tensor:
    """Find a model's rotary frequencies, and prove by a shift of all positions that turning queries is what they do.

    Raises:
        SinkscopeError: positions are not rotary (or not of one plain kind); says what works.
    """
    found = adapter.rotations
    refusal = SinkscopeError(
        f"a streaming window needs rotary positions of one plain kind, which {adapter.name} has not: a query can't be turned "
        "to its position inside the cache. Take sink_window, which keeps the original positions"
    )
    why = adapter.why_no_cache(0)
    if len(found) != 1 or why is not None:
        raise refusal
    ids = torch.arange(2, 8, device=adapter.device)[None]
    try:
        first, moved = _queries(adapter, ids, 0), _queries(adapter, ids, 5)
    except TypeError:  # it takes no positions
        raise refusal from None
    for before, after in zip(first, moved, strict=True):
        expected = turn(before, torch.full((ids.shape[1],), 5, device=ids.device), found[0])
        if not float((expected - after).abs().max()) < 1e-3 * max(1.0, float(after.abs().max())):
            raise refusal
    return found[0]


def _queries(adapter: Adapter, ids: Tensor, start: int) -> list[Tensor]:
    """Give every layer's queries for some ids whose first position is `start`."""
    seen: list[Tensor] = []

    class Look(FlashCapture):
        def _compute(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
            seen.append(query.float())
            return super()._compute(layer, query, key, value, given)

    with surely(Look(adapter, frozenset(), None, "positions")):
        adapter.body(ids, torch.ones_like(ids, dtype=torch.bool), first=start)
    return seen
