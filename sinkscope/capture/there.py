"""Which edits are live in the encoder and in cross-attention; the decoder's own attention is that of any decoder."""

from __future__ import annotations

from collections.abc import Sequence

from sinkscope.edit import Edit
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter

#: What works on both sides, for those who are refused.
WORKS = (
    "take mask_keys, scale_attention, bias_scores, zero_attention, zero_value, mean_value, replace_value, zero_head or "
    "mean_head"
)
#: What an edit of a cache touches.
CACHE = frozenset({"held", "keys", "rotated keys"})


def check_there(adapter: Adapter, edits: Sequence[Edit]) -> None:
    """Refuse edits that have no meaning on the side of an encoder-decoder that is edited.

    Raises:
        SinkscopeError: says why, and what works.
    """
    if adapter.side not in ("encoder", "cross"):
        return
    for part in (part for edit in edits for part in edit.parts()):
        why = _anywhere(part) or (_crossed(part) if adapter.side == "cross" else _encoder(part, adapter))
        if why is not None:
            raise SinkscopeError(f"{part} on side={adapter.side!r} of {adapter.name}: {why}")


def _anywhere(edit: Edit) -> str | None:
    """Say what neither side has."""
    if edit.is_window:
        return (
            "a window is of causal self-attention, where a cache holds the latest keys; here every query sees every key. "
            f"Windows are edits of side='decoder'; here, {WORKS}"
        )
    if edit.borrows:
        return f"values of another text are not looked at in an encoder-decoder: {WORKS}"
    if edit.touches & CACHE:
        return f"it rounds what a cache holds as tokens come, and here all keys come at once: edit side='decoder', or {WORKS}"
    return None


def _crossed(edit: Edit) -> str | None:
    """Say what cross-attention has not."""
    if "input" in edit.touches:
        return "it edits the input, and there are two: side='encoder' edits the source, side='decoder' the target"
    if edit.touches & {"residual", "neurons"}:
        return "it edits what is behind attention, in the decoder's layers: that is side='decoder'"
    if edit.at_queries and "scores" in edit.touches:
        return f"a query is a token of the target, and no key is the query itself: {WORKS}"
    return None


def _encoder(edit: Edit, adapter: Adapter) -> str | None:
    """Say what an encoder of sound has not, whose positions are no tokens."""
    if not adapter.hears:
        return None
    if "input" in edit.touches:
        return f"the source is a sound, whose frames can't be left out or swapped like tokens: {WORKS}"
    if "residual" in edit.touches and edit.why_not_live() is not None:
        return "nothing is located in a sound: give layers, positions, dims and a number"
    return None
