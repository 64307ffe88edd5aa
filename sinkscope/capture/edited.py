"""Attention under an intervention: blocks of query rows over the keys in reach, whole rows at hand, nothing T x T.

It stands where engine `flash` stands, inside Hugging Face's attention interface, and so is live on every family that asks
the interface, also where TransformerLens would discard an edit. A window costs tokens x window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture import proof
from sinkscope.capture.flash import FlashCapture
from sinkscope.capture.op import scores_of
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.models import Adapter
from sinkscope.tokens import Batch, Tokens

#: Query rows at a time.
ROWS = 128
#: Tokens per forward pass, where a model is run anew for every token.
TOKENS = 4096
NONE = Intervention()


@dataclass
class EditedCapture(FlashCapture):
    """One edited forward pass after another, one text each, with the attention that every key received."""

    edit: Intervention = NONE
    #: Sum over layers, heads and queries of the attention to each key, float64.
    received: Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)
    _turn: Tensor | None = field(default=None, repr=False)
    _tick: Callable[[], None] = field(default=lambda: None, repr=False)

    def hidden(self, batch: Batch, edit: Intervention, tick: Callable[[], None]) -> Float[Tensor, "position d_model"]:
        """Run the body over one text under an edit.

        Raises:
            SinkscopeError: NaN or infinity; names the first module or layer where it appears.
            InertHookError: attention was not asked for.
        """
        self.edit, self._tick = edit, tick
        self.received = torch.zeros(batch.ids.shape[1], dtype=torch.float64)
        if self._turn is None and any(edit.cache(layer) is not None for layer in self.adapter.layers):
            self._turn = turning(self.adapter)
        size = edit.rerun()
        again = size is not None and size < batch.ids.shape[1]
        hidden = self._rerun(batch.ids[0], int(size or 0)) if again else self._body(batch.ids)[0]
        if not bool(torch.isfinite(hidden).all()):
            where = self._first_bad(batch)
            raise SinkscopeError(
                f"NaN or infinity {where} of {self.adapter.name} under {edit} (text {batch.sequences[0].label!r})"
            )
        return hidden

    def _body(self, ids: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position d_model"]:
        self._calls = 0
        hidden = self.adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))
        if self._calls != len(self.adapter.layers):
            raise self._inert(self.adapter.layers[min(self._calls, len(self.adapter.layers) - 1)])
        return hidden

    def _rerun(self, ids: Int[Tensor, " position"], size: int) -> Float[Tensor, "position d_model"]:
        """Run on every window of `size` tokens, as many at a time as make `TOKENS`; of each, the last row counts."""
        tick, self._tick, ticks = self._tick, lambda: None, 0
        windows = ids.unfold(0, size, 1)
        rows, pieces = [self._body(windows[:1])[0]], torch.split(windows[1:], max(1, TOKENS // size))
        for done, piece in enumerate(pieces, 1):
            rows.append(self._body(piece)[:, -1])
            while ticks < len(self.adapter.layers) * done // len(pieces):
                tick()
                ticks += 1
        self.received.fill_(torch.nan)  # each window has a first token of its own
        return torch.cat(rows)

    def _compute(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        edit, t = self.edit if self.edit.on(layer) else NONE, query.shape[2]
        scale, softcap, sinks, window = (given[name] for name in ("scale", "softcap", "sinks", "window"))
        cache, value = edit.cache(layer), edit.values(layer, value)
        if cache is not None and window is not None and window < t:
            raise SinkscopeError(f"layer {layer} has a sliding window of its own: {edit} is not defined there")
        out = query.new_empty(query.shape[0], t, query.shape[1], value.shape[3]).transpose(1, 2)
        for start in range(0, t, ROWS):
            stop = min(start + ROWS, t)
            queries = torch.arange(start, stop, device=query.device)[:, None]
            reach = edit.reach(layer, start, stop).to(query.device)
            if window is not None:
                reach = reach[reach > start - window]
            whole = int(reach[-1] - reach[0]) + 1 == len(reach)
            at: Any = slice(int(reach[0]), stop) if whole else reach
            k, v = key[:, :, at], value[:, :, at]
            rows = query[:, :, start:stop]
            scores = scores_of(rows, k, scale, softcap)
            if cache is not None and self._turn is not None and stop > cache[0]:
                kept = int((reach < cache[1]).sum())
                turned = turn(rows, (queries[:, 0].clamp(max=cache[0] - 1) - queries[:, 0]), self._turn)
                scores[..., :kept] = scores_of(turned, k[:, :, :kept], scale, softcap)
            gap = queries - reach
            hidden = gap < 0 if window is None else (gap < 0) | (gap >= window)
            also = edit.hides(layer, queries, reach[None], query.shape[1], t)
            if also is not None:
                hidden = hidden | (also & (gap != 0))
            scores.masked_fill_(hidden, float("-inf"))
            lse = scores.logsumexp(-1, keepdim=True)
            if sinks is not None:
                lse = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None, None])
            weights = scores.sub_(lse).exp_()
            zeroed = edit.zeroes(layer, reach, query.shape[1], t)
            if zeroed is not None:
                weights.masked_fill_(zeroed, 0)
            self.received[reach.cpu()] += weights.sum((0, 1, 2)).double().cpu()
            b, h, n, m = weights.shape
            grouped = weights.view(b, k.shape[1], -1, m) @ v.to(weights.dtype)
            out[:, :, start:stop] = grouped.view(b, h, n, -1).to(out.dtype)
        self._tick()
        return out


def plan(adapter: Adapter, tokens: Tokens) -> EditedCapture:
    """Prove the engine on a few tokens and give it.

    Raises:
        InertHookError: edits can't be made inside this model's attention; says why, and what works.
    """
    groups = frozenset({frozenset({"mass"})})
    capture = "it is an encoder, which predicts no next token" if not adapter.causal else proof.plan(adapter, groups, tokens)
    if isinstance(capture, str):
        raise InertHookError(
            f"interventions can't run inside the attention of {adapter.name}: {capture}. They are made inside Hugging Face's "
            "attention interface: use a TransformerBridge (ss.load_model(name)) or a plain Hugging Face decoder that asks "
            "it, such as GPT-2, OPT, Llama, Mistral, Qwen, Gemma, GPT-NeoX, Phi or gpt-oss"
        )
    return EditedCapture(adapter, groups, None, "edits made inside the attention op (flash engine proved exact)")


# --- positions inside a cache -------------------------------------------------------------------------------------


def turn(q: Float[Tensor, "batch head query d"], by: Int[Tensor, " query"], frequencies: Tensor) -> Tensor:
    """Turn rotary queries by some positions: the pairs are (j, j + d/2) of the first 2 x `frequencies` numbers."""
    angles = by[:, None].double() * frequencies.double()
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(q.dtype) for f in (torch.cos, torch.sin))
    d = cos.shape[-1]
    rotary, rest = q[..., :d], q[..., d:]
    first, second = rotary.chunk(2, -1)
    return torch.cat([rotary * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def turning(adapter: Adapter) -> Tensor:
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

    with Look(adapter, frozenset(), None, "positions"):
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
        adapter.network.base_model(input_ids=ids, position_ids=positions, use_cache=False)  # type: ignore[operator]
    return seen
