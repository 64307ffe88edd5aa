"""Whether to run the `flash` engine: only after a proof, on a few tokens of the text, that it gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sinkscope.block import Block, Chunk, sum_of
from sinkscope.capture.blocks import ATTENTION
from sinkscope.capture.engine import Capture
from sinkscope.capture.flash import SUPPLIED, flash
from sinkscope.capture.hooks import hooks
from sinkscope.capture.masks import OtherwiseError
from sinkscope.capture.swap import attention_bridges, registered_by_others, spliced
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.models.adapter import hooks_on
from sinkscope.runs.owner import alone
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, Tokens

#: Tokens of the proof: enough to pass a short sliding window, where a model has one.
TOKENS, PAST_A_WINDOW = 16, 48
#: A wrong swap misses by 0.1 and more; rounding by 1e-5 in float32, by 1e-2 in half precision (hidden: relative).
WRONG = {"float32": 1e-3, "float64": 1e-3}
WRONG_IN_HALF = 5e-2
#: What somebody else's code raises where it is not made for what is asked.
FOREIGN = (TypeError, RuntimeError, AttributeError, IndexError, KeyError, ValueError)
WHOLE = frozenset({"pattern"})
WHY = "fused attention and its log-sum-exps, no pattern formed (proved equal on this model's first tokens)"


def plan(adapter: Adapter, groups: frozenset[frozenset[str]], tokens: Tokens) -> Capture | str:
    """Give the engine, or say why this model or these metrics can't have it.

    It is proved anew for every call: whatever has changed since the last one (weights, hooks, switches, patched code,
    autocast) is in the proof, and it costs a few tokens.
    """
    with alone(adapter.network):
        why = _refused(adapter, groups, max(map(len, tokens.sequences)))
    why = why or _prove(adapter, groups, tokens)
    return why if why is not None else flash(adapter, groups, WHY)


def check_patterns(adapter: Adapter, tokens: Tokens) -> None:
    """See to it that a bridge's hook points give attention: those of some encoder-decoders give something else (Switch).

    Raises:
        SinkscopeError: they do not; says what works.
    """
    way = (
        "leave engine out"
        if adapter.asks_interface
        else "its sliding attention can't be measured; side='decoder' and 'cross' can"
    )
    batch = _first_tokens(adapter, tokens)
    one = next(Tokens(batch.sequences[-1:], "").batches(1, adapter.device))
    try:
        with surely(hooks(adapter, frozenset({WHOLE}), "patterns")) as capture:
            off = _look(capture, one).off
    except (SinkscopeError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        raise SinkscopeError(f"the hook points of {adapter.name} give no whole rows of attention: {way}") from error
    if not off < tolerance(adapter):
        raise SinkscopeError(
            f"the hook points of {adapter.name} give no attention (rows miss a sum of 1 by {off:.2g}): {way}"
        )


def _prove(adapter: Adapter, groups: frozenset[frozenset[str]], tokens: Tokens) -> str | None:
    """Run both ways on a few tokens; a string says how they differ.

    Raises:
        OtherwiseError: the model does not attend as its configuration says, whatever runs it.
        SinkscopeError: it does not run at all.
    """
    batch = _first_tokens(adapter, tokens)
    try:
        expected = _reference(adapter, batch)
    except SinkscopeError as error:
        return str(error)[:200]
    except FOREIGN as error:
        raise SinkscopeError(
            f"{adapter.name} does not run as it is, on the first {batch.ids.shape[1]} tokens of a text "
            f"({type(error).__name__}: {str(error)[:200]}). If a bridge was made by other means than ss.load_model(name), "
            "try that"
        ) from error
    try:
        with surely(flash(adapter, groups | {WHOLE}, "proof")) as capture:
            found = _look(capture, batch, sums=True)
    except OtherwiseError:
        raise
    except SinkscopeError as error:
        return str(error)[:200]
    except FOREIGN as error:
        return f"its code does not run once its attention has been replaced ({type(error).__name__}: {str(error)[:200]})"
    wrong = tolerance(adapter)
    for layer, ours, theirs in zip(adapter.layers, found.mass, expected.mass or found.mass, strict=True):
        gap = float((ours - theirs).abs().max())
        if not gap < wrong:
            return f"attention to the first token differs by {gap:.2g} in layer {layer}"
    if not found.gap < wrong:
        return f"rows miss their sums by {found.gap:.2g}"
    gap = float((found.hidden - expected.hidden).abs().mean() / expected.hidden.abs().mean())
    return None if gap < wrong else f"the last hidden state differs by {gap:.2g}"


def tolerance(adapter: Adapter) -> float:
    """Give the gap from which two ways of computing are not the same."""
    device = adapter.device.type
    half = torch.is_autocast_enabled(device) or (device == "cuda" and in_tf32())
    return WRONG_IN_HALF if half else WRONG.get(adapter.dtype, WRONG_IN_HALF)


def in_tf32() -> bool:
    """Tell whether the user has float32 products rounded; the old switch raises where the new one (torch 2.9) was used."""
    products = torch.backends.cuda.matmul
    precision = getattr(products, "fp32_precision", None)
    return bool(products.allow_tf32) if precision is None else bool(precision == "tf32")


def _refused(adapter: Adapter, groups: frozenset[frozenset[str]], longest: int) -> str | None:
    """Say what is known to rule the engine out before anything is run."""
    if adapter.kind not in ("bridge", "hugging_face"):
        return f"a {type(adapter.model).__name__} computes attention itself"
    if adapter.side is not None and not adapter.asks_interface:
        return "its attention does not ask Hugging Face's attention interface"
    others = sorted(frozenset().union(*groups) - ATTENTION - SUPPLIED)
    if adapter.kind == "hugging_face" and others:
        return f"a metric needs {others[0]!r}, and a plain Hugging Face model has no hook points"
    own = registered_by_others(adapter.network) if adapter.kind == "hugging_face" else None
    if own is not None:
        return f"its attention is {own!r}, a function that somebody registered, whose place engine 'flash' would take"
    if adapter.windows and not adapter.causal and getattr(adapter.config, "use_bidirectional_attention", False):
        return "it is a decoder that looks both ways, with sliding windows"
    chunk = min((size for size in adapter.windows.values() if isinstance(size, Chunk)), default=longest)
    if chunk < longest:
        return f"its layers attend in chunks of {chunk} tokens"
    for layer, bridge in attention_bridges(adapter).values():
        inside = set(bridge.original_component.modules())
        for module in bridge.modules():
            if module not in inside and (hooks_on(module) or spliced(module)):
                return f"there are hooks on the attention of layer {layer} that it would leave out"
    return None


def _first_tokens(adapter: Adapter, tokens: Tokens) -> Batch:
    """Take the start of the longest text; where pads are masked (an encoder's), half of it too, so that there are some.

    An image or a sound is taken whole, and so is text with one in it, where there is any.
    """
    longest = max(tokens.sequences, key=lambda s: (s.mixed is not None, len(s)))
    short_window = min(adapter.windows.values(), default=PAST_A_WINDOW) < PAST_A_WINDOW
    n = min(len(longest), PAST_A_WINDOW if short_window else TOKENS)
    padded = longest.inputs is None and not (adapter.causal and longest.source is None)
    sizes = [n, (n + 1) // 2] if padded else [n]
    return next(Tokens(tuple(map(longest.first, sizes)), tokens.bos).batches(2, adapter.device))


@dataclass
class _Look:
    """What an engine says of real rows: last hidden state, mass on key 0 by layer, and by how much rows are off.

    `gap` is from what they sum up to, or by how much other sums of theirs are off, `off` from 1.
    """

    hidden: Tensor
    mass: list[Tensor]
    gap: float = 0.0
    off: float = 0.0


def _look(capture: Capture, batch: Batch, sums: bool = False) -> _Look:
    mass: dict[int, Tensor] = {}
    gaps, off = [], []

    def keep(block: Block, group: frozenset[str]) -> None:
        if group == WHOLE:
            rows = slice(block.start, block.start + block.n_queries)
            real, found = batch.valid[:, rows].to(block.lengths.device), block.mass.transpose(1, 2)
            whole = mass.setdefault(block.layer, found.new_full((len(found), batch.ids.shape[1], found.shape[2]), torch.nan))
            whole[:, rows] = found
            gaps.append(float((block.pattern.sum(-1) - block.row_sum).transpose(1, 2)[real].abs().max()))
            off.append(float((block.pattern.sum(-1) - 1).transpose(1, 2)[real].abs().max()))
            if not sums:
                return
            received, entropy = sum_of(block.pattern, real), torch.special.entr(block.pattern).sum(-1)  # of formed rows
            gaps.append(float((block.received(real) - received).abs().max()))
            gaps.append(float((block.entropy - entropy).transpose(1, 2)[real].abs().max()))

    hidden = capture.run(batch, keep, lambda: None)
    found = [m[batch.valid.to(m.device)] for m in mass.values()]
    if any(bool(m.isnan().any()) for m in found):
        raise SinkscopeError("there are not as many rows as tokens")
    return _Look(hidden[batch.valid].float(), found, max(gaps), max(off))


def _reference(adapter: Adapter, batch: Batch) -> _Look:
    """Give the same by the `hooks` engine, text by text; of a model without patterns, only the last hidden state, as it is.

    (Asked for attentions, Hugging Face would put hooks of its own on the model, and leave them there.)
    """
    alone = [next(Tokens((s,), "").batches(1, adapter.device)) for s in batch.sequences]
    if adapter.shows_patterns:
        with surely(hooks(adapter, frozenset({WHOLE}), "reference")) as capture:
            looks = [_look(capture, one) for one in alone]
        if adapter.side is not None and any(look.off > tolerance(adapter) for look in looks):
            return _Look(torch.cat([look.hidden for look in looks]), [])  # no attention comes from there
        mass = [torch.cat(layer) for layer in zip(*(look.mass for look in looks), strict=True)]
        return _Look(torch.cat([look.hidden for look in looks]), mass)
    with adapter.quiet():
        return _Look(torch.cat([adapter.body(one.ids, one.valid, **one.beside)[0] for one in alone]).float(), [])
