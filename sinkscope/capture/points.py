"""Edits at TransformerLens's own hook points, for models whose attention Hugging Face's interface can't replace.

That is HookedTransformer, which computes attention itself, and a few bridges (Bloom). Slower and heavier than edits inside
the op, since whole patterns are formed. Some bridges discard what a hook returns, with a warning or without: so a point is
used only after a proof, on a few tokens, that an edit there changes what the model computes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.capture.attend import ROWS
from sinkscope.capture.hooks import dropping_patterns, hooked
from sinkscope.capture.neurons import editing_neurons, neurons_of
from sinkscope.capture.residuals import editing_residuals
from sinkscope.capture.routes import Route
from sinkscope.edit import NOTHING, Edit
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, surely
from sinkscope.tokens import Batch, TextTokens, Tokens

#: What an intervention touches -> the hook point that carries it.
POINTS = {
    "scores": "attn.hook_attn_scores",
    "pattern": "attn.hook_pattern",
    "values": "attn.hook_v",
    "keys": "attn.hook_k",
    "rotated keys": "attn.hook_rot_k",
    "output": "attn.hook_z",
}
#: What touches attention: at these points, or inside the op alone.
ATTENTION = POINTS.keys() | {"held"}
#: What works where a point is live, and what works on every model.
WORKS = {
    "pattern": "zero_attention",
    "scores": "mask_keys, windows, scale_attention, bias_scores and self_only",
    "values": "zero_value (the same as zero_attention), mean_value and replace_value",
    "keys": "quantize_kv(rotated=False)",
    "rotated keys": "quantize_kv",
    "output": "zero_head, mean_head, scale_output and amplify_variance",
}
ALWAYS = (
    "drop_tokens, replace_token and recompute_window (the input), edit_activation (the residual stream), zero_neuron (an MLP)"
)


@dataclass(frozen=True)
class _Probe(Edit):
    """Takes key 1 away wherever it is asked, for the proof that a point is live: `before` rotary positions, or after."""

    before: bool = False

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        return (keys == 1).expand(len(queries), -1)

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor:
        return (keys == 1).expand(heads, 1, -1)

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        return values.masked_fill((keys == 1).to(values.device)[:, None], 0)

    def held(self, layer: int, what: str, states: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        return None if what == "values" else (self.values(layer, states, keys, 0, 0), keys)

    def unrotated(self, layer: int) -> bool:
        return self.before

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        return self.values(layer, outputs, queries, 0, 0)


@dataclass
class PointsCapture:
    """The engine for `evaluate`."""

    adapter: Adapter
    touches: frozenset[str]
    why: str
    #: Layers whose neurons are edited.
    neurons: tuple[int, ...] = ()
    name: str = "hooks"
    received: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _edit: Edit = field(default=NOTHING, repr=False)
    _tick: Callable[[], None] = field(default=lambda: None, repr=False)
    _undo: ExitStack = field(default_factory=Undo, repr=False)

    def __enter__(self) -> PointsCapture:
        """Hook the model."""
        with Undo() as undo:
            undo.enter_context(self.adapter.quiet())
            undo.enter_context(dropping_patterns(self.adapter))
            undo.enter_context(
                editing_points(self.adapter, self.touches | {"pattern"}, lambda: self._edit, self._length, self._seen)
            )
            undo.enter_context(editing_residuals(self.adapter, self._residual))
            undo.enter_context(editing_neurons(self.adapter, self.neurons, lambda: self._edit))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        """Unhook it."""
        self.close()

    def close(self) -> None:
        """Unhook it, if it is hooked."""
        self._undo.close()

    def pieces(self, batch: Batch, route: Route, tick: Callable[[], None]) -> Iterator[Float[Tensor, "position d_model"]]:
        """Run the body over one text under an edit; yields its last hidden states.

        Raises:
            SinkscopeError: NaN or infinity.
        """
        self._edit, self._tick, ids = route.edit, tick, batch.ids
        self.received = torch.zeros(ids.shape[1], dtype=torch.float64)
        if route.how == "whole":
            passes = [ids]
        else:
            self._tick, size = lambda: None, route.edit.rerun() or 1
            passes = [ids[:, :size], *ids[0].unfold(0, size, 1)[1:, None]]
        for done, one in enumerate(passes):
            hidden = self._body(one, batch)[0]
            yield hidden if done == 0 else hidden[-1:]
        if len(passes) > 1:
            for _ in self.adapter.layers:
                tick()
            self.received = torch.full((ids.shape[1],), torch.nan, dtype=torch.float64)

    def copies(
        self, batch: Batch, edit: Edit, tick: Callable[[], None], first: int
    ) -> Float[Tensor, "copy position d_model"]:
        """Run the body over copies of one text, at once; what layers before the first hand out is the caller's matter.

        Raises:
            SinkscopeError: NaN or infinity.
        """
        self._edit, self._tick = edit, tick
        self.received = torch.zeros(batch.ids.shape[1], dtype=torch.float64)
        return self._body(batch.ids, batch)

    def _body(self, ids: Tensor, batch: Batch) -> Tensor:
        hidden = self.adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))
        if not bool(torch.isfinite(hidden).all()):
            raise SinkscopeError(
                f"NaN or infinity in {self.adapter.name} under {self._edit} (text {batch.sequences[0].label!r})"
            )
        return hidden

    def _length(self) -> int:
        return len(self.received)

    def _seen(self, layer: int, pattern: Tensor) -> None:
        self.received[: pattern.shape[-1]] += pattern.detach().float().sum((0, 1, 2)).double().cpu()
        self._tick()

    def _residual(self, layer: int, residual: Tensor) -> Tensor:
        if not self._edit.edits(layer):
            return residual
        return self._edit.residual(layer, residual, torch.arange(residual.shape[1]))


@contextmanager
def editing_points(
    adapter: Adapter,
    touches: frozenset[str],
    edit: Callable[[], Edit],
    length: Callable[[], int],
    seen: Callable[[int, Tensor], None] | None = None,
    where: Callable[[int], Tensor] = torch.arange,
) -> Iterator[None]:
    """Hook the points that some edits touch.

    `seen` is shown the pattern of each layer as it is used; `where` gives the positions of a pass's tokens.
    """

    def change(value: Tensor, hook: Any, *, layer: int, what: str) -> Tensor | None:
        now = edit()
        new = None
        if now.edits(layer):
            if what in ("scores", "pattern"):
                new = (_scores if what == "scores" else _pattern)(now, layer, value, length())
            else:  # of the new tokens alone as a rule, whatever a cache holds
                everything = what == "rotated keys" and adapter.kind == "hooked_transformer"  # which rotates behind its cache
                at = torch.arange(value.shape[1]) if everything and "rot" in hook.name else where(value.shape[1])
                sizes = adapter.heads[layer], length()
                new = _of_tokens(now, layer, what, value.transpose(1, 2), at, sizes).transpose(1, 2)
        if what == "pattern" and seen is not None:
            seen(layer, value if new is None else new)
        return new

    names = {what: POINTS[what] for what in sorted(touches & POINTS.keys())}
    with hooked(adapter, names, lambda layer, what: partial(change, layer=layer, what=what)):
        yield


def _scores(edit: Edit, layer: int, scores: Float[Tensor, "batch head query key"], length: int) -> Tensor:
    """Hide keys before softmax; what the model hides itself is hidden already."""
    n, held = scores.shape[2:]
    keys, scores = torch.arange(held), scores.clone()
    for start in range(0, n, ROWS):
        rows = keys[held - n + start : held - n + min(start + ROWS, n)]
        hidden = ~torch.isin(keys, edit.reach(layer, int(rows[0]), int(rows[-1]) + 1))[None]
        also = edit.hides(layer, rows[:, None], keys[None], scores.shape[1], length)
        hidden = (hidden if also is None else hidden | also) & (rows[:, None] != keys)
        scores[:, :, start : start + len(rows)].masked_fill_(hidden.to(scores.device), float("-inf"))
    bias = edit.biases(layer, keys, scores.shape[1], length)
    return scores if bias is None else scores + bias.to(scores)


def _pattern(edit: Edit, layer: int, pattern: Float[Tensor, "batch head query key"], length: int) -> Tensor | None:
    zeroed = edit.zeroes(layer, torch.arange(pattern.shape[3]), pattern.shape[1], length)
    return None if zeroed is None else pattern.masked_fill(zeroed.to(pattern.device), 0)


def _of_tokens(
    edit: Edit, layer: int, what: str, states: Float[Tensor, "batch head position d"], at: Tensor, sizes: tuple[int, int]
) -> Tensor:
    """Edit keys, values or outputs of some tokens; `sizes` are the heads that query, and the text's length.

    Raises:
        SinkscopeError: heads that share values are told apart.
    """
    if what == "output":
        return edit.outputs(layer, states, at)
    if what == "values":
        edited = edit.values(layer, states, at, *sizes)
        if edited.shape != states.shape:
            raise SinkscopeError(
                f"{edit}: {sizes[0] // states.shape[1]} heads share values at {POINTS[what]}, which can't be told apart "
                "there: name all that share, or load the model as a TransformerBridge"
            )
        states = edited
    elif edit.unrotated(layer) == (what == "rotated keys"):  # without rotary positions the two are one point
        return states
    found = edit.held(layer, "values" if what == "values" else "keys", states, at)
    return states if found is None else torch.where((found[1] == at).to(states.device)[:, None], found[0], states)


def plan(adapter: Adapter, edits: Sequence[Edit], why_not: str) -> PointsCapture:
    """Prove every point that the edits touch, and give the engine; `why_not` is why edits can't be made inside the op.

    Raises:
        InertHookError: TransformerLens discards what a hook on such a point returns; says what works instead.
    """
    touches: frozenset[str] = frozenset()
    for edit in edits:
        if any(edit.cache(layer) for layer in adapter.layers):
            raise SinkscopeError(
                f"{edit} turns queries inside the attention op, which can't be done on {adapter.name}: {why_not}. Take "
                f"sink_window{', or load the model as a TransformerBridge' if adapter.kind != 'bridge' else ''}"
            )
        if "held" in edit.touches:
            raise SinkscopeError(
                f"{edit}: what is seen of a cache depends on the query, as it can inside the attention op alone, and not on "
                f"{adapter.name}: {why_not}. Take scheme='per_token' without residual_length"
                f"{', or load the model as a TransformerBridge' if adapter.kind != 'bridge' else ''}"
            )
        for what in sorted(edit.touches & POINTS.keys()):
            if not is_live(adapter, what):
                live = [probe for probe in sorted(POINTS) if is_live(adapter, probe)]
                works = ", ".join(WORKS[w] for w in live)
                raise InertHookError(
                    f"{edit} would do nothing on {adapter.name}: TransformerLens discards edits at {POINTS[what]}, and "
                    f"{why_not}. What works there: {works + '; ' if works else ''}{ALWAYS}"
                )
        touches |= edit.touches & POINTS.keys()
    why = f"edits at TransformerLens's hook points, proved live; {why_not}"
    return PointsCapture(adapter, touches, why, neurons_of(adapter, edits))


def is_live(adapter: Adapter, what: str) -> bool:
    """Try an edit on a few tokens: does the model compute something else, and is the pattern as it should be?"""
    ids = torch.arange(1, 9)
    (batch,) = Tokens((TextTokens("proof", ids, ("",) * len(ids)),), "").batches(1, adapter.device)
    there = {p.removeprefix(f"blocks.{adapter.layers[0]}.") for p in adapter.points}
    if POINTS[what] not in there and not (what == "rotated keys" and POINTS["keys"] in there and not adapter.rotations):
        return False
    with warnings.catch_warnings(), surely(PointsCapture(adapter, frozenset({what}), "proof")) as capture:
        warnings.simplefilter("ignore")  # what TransformerLens says of a discarded edit, where it says so
        routes = (Route("", edit, "whole") for edit in (NOTHING, _Probe(before=what == "keys")))
        (before,), whole = list(capture.pieces(batch, next(routes), lambda: None)), capture.received
        (after,), edited = list(capture.pieces(batch, next(routes), lambda: None)), capture.received
    moved = float((after - before).abs().max()) > 1e-4 * float(before.abs().max())
    if what not in ("scores", "pattern") or not moved:
        return moved
    own = sum(adapter.heads.values()) if what == "scores" else 0  # a query always sees itself
    return bool(edited[1] <= own) and float(edited[1]) < float(whole[1])
