"""Which engine makes an edit: inside the attention op where that is proved exact, else at hook points, proved live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sinkscope.capture import points, proof
from sinkscope.capture.edited import Edited, InsideCapture
from sinkscope.capture.neurons import neurons_of
from sinkscope.capture.routes import way
from sinkscope.capture.stream import frequencies
from sinkscope.capture.there import check_there
from sinkscope.edit import Edit
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import Tokens

GROUPS = frozenset({frozenset({"mass"})})
#: What turns queries or keys, and what to take where they can't be turned.
STREAMS = "a streaming window", "sink_window, which keeps the original positions"
BEFORE = "a cache of keys without their positions", "rotated=True"


def plan(adapter: Adapter, tokens: Tokens, edits: Sequence[Edit]) -> Edited:
    """Give the engine that can make these edits, proved on a few tokens.

    Raises:
        InertHookError: no edit can be made inside this model's attention, or this one would be discarded; says what works.
        SinkscopeError: positions that can't be moved into a cache.
    """
    check_there(adapter, edits)
    why_not = _proved(adapter, tokens) if adapter.predicts else "it is an encoder, which predicts no next token"
    if not isinstance(why_not, str):
        longest = max(len(s) for s in tokens.sequences)
        turns = any(way(adapter, e, longest) == "streamed" or any(map(e.cache, adapter.layers)) for e in edits)
        before = adapter.rotary and any(e.unrotated(layer) for e in edits for layer in adapter.layers)
        if adapter.side is not None and (turns or before or any(e.borrows for e in edits)):
            raise SinkscopeError(
                f"{adapter.name} is an encoder-decoder, whose decoder takes no positions inside a cache and no values of "
                "another text: take sink_window, mask_keys, scale_attention, zero_head, or values replaced by 'zero'"
            )
        found = frequencies(adapter, STREAMS if turns else BEFORE) if turns or before else None
        return InsideCapture(adapter, found, neurons_of(adapter.beside(tokens.sequences[0]), edits))
    if adapter.causal and adapter.shows_patterns and adapter.side is None:
        return points.plan(adapter, edits, why_not)
    raise InertHookError(
        f"interventions can't run inside the attention of {adapter.name}: {why_not}. They are made inside Hugging Face's "
        "attention interface: use a TransformerBridge (ss.load_model(name)) or a plain Hugging Face decoder that asks "
        "it, such as GPT-2, OPT, Llama, Mistral, Qwen, Gemma, GPT-NeoX, Phi or gpt-oss"
    )


def _proved(adapter: Adapter, tokens: Tokens) -> Any:
    """Give an engine that is proved, or say why there is none."""
    found: Any = ""
    for part, its in adapter.proofs(tokens):
        found = proof.plan(part, GROUPS, its)
        if isinstance(found, str):
            return found
    return found
