"""adapt_side: look at any model, at the attention that is asked for."""

from __future__ import annotations

from typing import Any

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.models.adapter import Adapter
from sinkscope.models.adapting import adapt, is_encoder_decoder, reads
from sinkscope.models.heard import Heard
from sinkscope.models.hooked_sides import hooked_sided, is_hooked
from sinkscope.models.identity import Side
from sinkscope.models.seeing import seeing
from sinkscope.models.senses import sensing
from sinkscope.models.sides import Sided, sided
from sinkscope.tokens.features import READS

SIDES: tuple[Side, ...] = ("decoder", "encoder", "cross")


def adapt_side(model: Any, side: str | None = None, *, features: bool = False, whole: bool = False) -> Adapter:
    """Look at any model; of an encoder-decoder, at one of its attentions: the decoder's own if nothing is said.

    Args:
        model: the model.
        side: one of `SIDES`.
        features: take also encoders of images or sound, and text with images in it: for those who only look.
        whole: run the decoder too where the encoder is looked at: for those who take losses.

    Raises:
        SinkscopeError: no such side, or none of this model; see :func:`sinkscope.models.adapt`.
    """
    if side is not None and side not in SIDES:
        raise unknown("side", side, SIDES)
    senses = reads(model) in READS
    half: Side = next((known for known in SIDES if known == side), "decoder")
    if is_hooked(model) and not whole:
        return hooked_sided(model, half)
    if is_encoder_decoder(model):
        return sided(model, half, Heard if senses else Sided, whole=whole)
    adapter = sensing(model) if senses and features else adapt(model)
    own = "decoder" if adapter.causal else "encoder"
    if side not in (None, own):
        raise SinkscopeError(
            f"side={side!r}, but {adapter.name} is {'a decoder' if adapter.causal else 'an encoder'} alone, with one "
            "attention: leave side out, or take an encoder-decoder such as T5, BART or Marian"
        )
    return seeing(adapter) if features else adapter
