"""Models that are not covered, each refused with what works instead."""

from __future__ import annotations

from typing import Any

from sinkscope.errors import SinkscopeError


def no_attention(name: str, architecture: str) -> SinkscopeError:
    """Say that there is nothing to measure."""
    return SinkscopeError(
        f"{name} ({architecture}) has no attention sink to measure here: there is no attention pattern in any layer. "
        "State-space models are not covered; decoders such as gpt2 or smollm2-135m, BERT-type encoders and encoder-decoders "
        "such as T5 are."
    )


def check_input(network: Any, name: str) -> None:
    """Refuse a model that reads no text.

    Raises:
        SinkscopeError: names what it reads.
    """
    if hasattr(network, "logit_scale") and hasattr(network, "text_model") and hasattr(network, "vision_model"):
        raise SinkscopeError(f"{name} ({type(network).__name__}) has two towers: pass model.text_model or model.vision_model")
    reads = getattr(network, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise SinkscopeError(
            f"{name} ({type(network).__name__}) reads {reads}, which ss.measure, ss.attention_map and ss.attention_patterns "
            "take as its processor gives it; edits, losses, sweeps, masks, studies and watch take models that read text"
        )


def check_two_sided(points: Any) -> None:
    """Refuse a HookedEncoderDecoder where more is asked than to look at one side.

    Raises:
        SinkscopeError: names what works.
    """
    if "decoder.0.cross_attn.hook_pattern" in points:
        raise SinkscopeError(
            "a HookedEncoderDecoder is looked at by ss.measure, ss.attention_map and ss.attention_patterns (side='decoder', "
            "'encoder' or 'cross'), and nothing else is covered. Of Hugging Face's own model losses and edits are: give "
            "T5ForConditionalGeneration.from_pretrained(name), or a TransformerBridge (ss.load_model(name))"
        )


def check_merged(network: Any) -> None:
    """Refuse a decoder that attends to target and source at once (T5Gemma 2's, whose encoder's windows are uneven besides).

    Raises:
        SinkscopeError: names what works.
    """
    if any("MergedAttention" in type(module).__name__ for module in network.modules()):
        raise SinkscopeError(
            f"{type(network).__name__} has one softmax over target and source, which is not covered: reduce Hugging Face's "
            "own, ss.metrics.of_pattern(attentions), from output_attentions=True, or take T5Gemma, whose attentions are three"
        )
