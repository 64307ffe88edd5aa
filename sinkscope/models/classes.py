"""Which class of transformers loads a checkpoint: the one that it names, as far as it predicts tokens or sees or hears."""

from __future__ import annotations

from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.features import READS

#: How the classes end that predict tokens.
PREDICT = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "MTModel")
#: What TransformerLens calls a class of transformers, where that is another name.
CALLED = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


def class_for(config: Any) -> Any:
    """Give the class that loads a checkpoint: the one that it names, where it is covered, else what fits its type.

    Args:
        config: of the checkpoint, as `AutoConfig` reads it.

    Raises:
        SinkscopeError: it predicts no tokens, and reads neither images nor sound; or it has two towers.
    """
    import transformers

    named = (config.architectures or [""])[0]
    own = getattr(transformers, named, None)
    fits = getattr(own, "config_class", None) is type(config)
    trained = named.endswith("ForPreTraining")  # it masks positions, or TransformerLens does not wrap it: its body alone
    if fits and (named.endswith(PREDICT) or (_senses(own) and not trained)):
        return own
    if config.is_encoder_decoder:
        return transformers.AutoModelForSeq2SeqLM
    if named.endswith("BertModel"):
        return transformers.AutoModelForMaskedLM
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    body = transformers.MODEL_MAPPING.get(type(config), None)
    if (trained or not named) and _senses(body):
        return body
    kind = type(config).__name__.removesuffix("Config")
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        raise SinkscopeError(
            f"{named or kind} has two towers: load one with transformers ({kind}VisionModel.from_pretrained, or "
            f"{kind}TextModel), and pass it to ss.measure as it is"
        )
    raise SinkscopeError(
        f"{named or type(config).__name__} predicts no tokens, and reads neither images nor sound: models of text that do "
        "are covered (gpt2, bert-base-uncased); a plain Hugging Face encoder of text can be passed to ss.measure as it is"
    )


def _senses(made: Any) -> bool:
    """Tell a class that reads images or sound."""
    return getattr(made, "main_input_name", None) in READS
