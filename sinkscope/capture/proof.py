"""Whether to run the `flash` engine: only after a proof, on a few tokens of the text, that it gives the same numbers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sinkscope.block import Block
from sinkscope.capture.flash import SUPPLIED, FlashCapture, OtherwiseError, attention_bridges, chosen
from sinkscope.capture.hooks import ATTENTION, HooksCapture
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.models.adapter import hooks_on
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, TextTokens, Tokens

#: Tokens of the proof: enough to pass a short sliding window, where a model has one.
TOKENS, PAST_A_WINDOW = 16, 48
#: A wrong swap misses by 0.1 and more; rounding by 1e-5 in float32, by 1e-2 in half precision (hidden: relative).
WRONG = {"float32": 1e-3, "float64": 1e-3}
WRONG_IN_HALF = 5e-2
WHOLE = frozenset({"pattern"})
#: What has been proved, by model: nothing is kept of a model that is gone.
PROVED: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()
WHY = "fused attention and its log-sum-exps, no pattern formed (proved equal on this model's first tokens)"


def plan(adapter: Adapter, groups: frozenset[frozenset[str]], tokens: Tokens) -> FlashCapture | str:
    """Give the engine, or say why this model or these metrics can't have it.

    A model that was proved is not proved again until its configuration, dtype or device changes.
    """
    why = _refused(adapter, groups)
    if why is not None:
        return why
    proved = PROVED.setdefault(adapter.network, set())
    config = getattr(adapter.network, "config", None)
    now = (groups, adapter.dtype, str(adapter.device), adapter.causal, "" if config is None else config.to_json_string())
    if now not in proved:
        why = _prove(adapter, groups, tokens)
        if why is not None:
            return why
        proved.add(now)
    return FlashCapture(adapter, groups, None, WHY)


def _prove(adapter: Adapter, groups: frozenset[frozenset[str]], tokens: Tokens) -> str | None:
    """Run both ways on a few tokens; a string says how they differ.

    Raises:
        OtherwiseError: the model does not attend as its configuration says, whatever runs it.
    """
    batch = _first_tokens(adapter, tokens)
    try:
        expected = _reference(adapter, batch)
        with surely(FlashCapture(adapter, groups | {WHOLE}, None, "proof")) as capture:
            found = _look(capture, batch)
    except OtherwiseError:
        raise
    except (SinkscopeError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        kind = "" if isinstance(error, SinkscopeError) else f"{type(error).__name__}: "
        return f"{kind}{str(error)[:200]}"
    wrong = WRONG.get(adapter.dtype, WRONG_IN_HALF)
    for layer, ours, theirs in zip(adapter.layers, found.mass, expected.mass or found.mass, strict=True):
        gap = float((ours - theirs).abs().max())
        if not gap < wrong:
            return f"attention to the first token differs by {gap:.2g} in layer {layer}"
    if not found.gap < wrong:
        return f"rows miss their sums by {found.gap:.2g}"
    gap = float((found.hidden - expected.hidden).abs().mean() / expected.hidden.abs().mean())
    return None if gap < wrong else f"the last hidden state differs by {gap:.2g}"


def _refused(adapter: Adapter, groups: frozenset[frozenset[str]]) -> str | None:
    """Say what is known to rule the engine out before anything is run."""
    if adapter.kind not in ("bridge", "hugging_face"):
        return f"a {type(adapter.model).__name__} computes attention itself"
    others = sorted(frozenset().union(*groups) - ATTENTION - SUPPLIED)
    if adapter.kind == "hugging_face" and others:
        return f"a metric needs {others[0]!r}, and a plain Hugging Face model has no hook points"
    if adapter.windows and not adapter.causal:
        return "it is an encoder with sliding windows"
    for layer, bridge in attention_bridges(adapter).values():
        inside = set(bridge.original_component.modules())
        for module in bridge.modules():
            if module not in inside and hooks_on(module):
                return f"there are hooks on the attention of layer {layer} that it would leave out"
    return None


def _first_tokens(adapter: Adapter, tokens: Tokens) -> Batch:
    """Take the start of the longest text; for an encoder, half of it too, so that there are pads."""
    longest = max(tokens.sequences, key=len)
    short_window = min(adapter.windows.values(), default=PAST_A_WINDOW) < PAST_A_WINDOW
    n = min(len(longest), PAST_A_WINDOW if short_window else TOKENS)
    sizes = [n] if adapter.causal else [n, (n + 1) // 2]
    parts = (TextTokens(longest.label, longest.ids[:m], longest.strings[:m]) for m in sizes)
    return next(Tokens(tuple(parts), tokens.bos).batches(2, adapter.device))


@dataclass
class _Look:
    """What an engine says of the real rows: last hidden state, mass on key 0 by layer, how far rows miss their sums."""

    hidden: Tensor
    mass: list[Tensor]
    gap: float = 0.0


def _look(capture: HooksCapture, batch: Batch) -> _Look:
    mass, gaps = [], []

    def keep(block: Block, group: frozenset[str]) -> None:
        if group == WHOLE:
            real = batch.valid.to(block.lengths.device)
            mass.append(block.mass.transpose(1, 2)[real])
            gaps.append(float((block.pattern.sum(-1) - block.row_sum).transpose(1, 2)[real].abs().max()))

    hidden = capture.run(batch, keep, lambda: None)
    return _Look(hidden[batch.valid].float(), mass, max(gaps))


def _reference(adapter: Adapter, batch: Batch) -> _Look:
    """Give the same by the `hooks` engine, text by text; of a plain model, only the last hidden state, by eager attention.

    (Asked for attentions, Hugging Face would put hooks of its own on the model, and leave them there.)
    """
    alone = [next(Tokens((s,), "").batches(1, adapter.device)) for s in batch.sequences]
    if adapter.kind == "bridge":
        with surely(HooksCapture(adapter, frozenset({WHOLE}), None, "reference")) as capture:
            looks = [_look(capture, one) for one in alone]
        mass = [torch.cat(layer) for layer in zip(*(look.mass for look in looks), strict=True)]
        return _Look(torch.cat([look.hidden for look in looks]), mass)
    with adapter.quiet(), chosen(adapter.network, "eager"):
        return _Look(torch.cat([adapter.body(one.ids, one.valid)[0] for one in alone]).float(), [])
