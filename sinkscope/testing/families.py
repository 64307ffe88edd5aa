"""Tiny random Hugging Face models, one per attention family, and a tokenizer for them: offline, from a seed.

What tests need of a model is its wiring, not its knowledge: absolute, rotary and ALiBi positions, grouped keys,
local windows, soft caps, learned sinks, an encoder, and one model without attention for the error path. Weights are
drawn wide, so that patterns are far from uniform: with Hugging Face's own init (0.02) every head is nearly a uniform
one, on which a wrong answer looks right.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from sinkscope.errors import unknown
from sinkscope.models.versions import as_configured, class_of
from sinkscope.testing.architectures import ARCHITECTURES, tiny_architecture
from sinkscope.testing.senses import SENSES
from sinkscope.testing.sizes import CONTEXT, VOCAB, WINDOW, options_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

HIDDEN, HEADS, HEAD_DIM, MLP = 32, 4, 8, 64
#: Standard deviation of matrices; what is added to biases and norms; a gain for norms of queries and keys.
SPREAD, JITTER, GAIN = 0.25, 0.1, 0.7


@dataclass(frozen=True)
class Family:
    """How to build one family, beside the sizes that all share.

    Attributes:
        model: name of the model's class in `transformers`; its `config_class` is the config's.
        options: keyword arguments of the config.
        local: per layer, whether its attention is local (a window of `WINDOW` keys); as many as there are layers.
    """

    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    local: tuple[bool, ...] = (False,) * 3


_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_ALTERNATING = (True, False, True, False)

FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel"),
    "opt": Family("OPTForCausalLM", {"ffn_dim": MLP, "word_embed_proj_dim": HIDDEN}),
    "gpt_neox": Family("GPTNeoXForCausalLM", {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5}}),
    "gptj": Family("GPTJForCausalLM", {"rotary_dim": 4}),
    "bloom": Family("BloomForCausalLM"),
    "llama": Family("LlamaForCausalLM", _GROUPED),
    "mistral": Family("MistralForCausalLM", {**_GROUPED, "sliding_window": WINDOW}, (True,) * 3),
    "qwen3": Family("Qwen3ForCausalLM", _GROUPED),
    "gemma2": Family("Gemma2ForCausalLM", {**_GEMMA, "attn_logit_softcapping": 3.0}, _ALTERNATING),
    "gemma3": Family("Gemma3ForCausalLM", _GEMMA, (True, True, True, False)),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {**_GROUPED, **_EXPERTS, "rope_parameters": _ROTARY, "sliding_window": WINDOW},
        _ALTERNATING,
    ),
    "phi": Family("PhiForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "gpt_neo": Family(
        "GPTNeoForCausalLM",
        {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
        (False, True, False, True),
    ),
    "bert": Family("BertForMaskedLM"),
    "mamba": Family("MambaForCausalLM", {"state_size": 4, "time_step_rank": 4}),
}


_SEQUENCES = {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS}
_SEQUENCES |= {"decoder_attention_heads": HEADS, "encoder_ffn_dim": MLP, "decoder_ffn_dim": MLP}
_RELATIVE = {"d_model": HIDDEN, "d_kv": HEAD_DIM, "d_ff": MLP, "num_layers": 2, "num_decoder_layers": 3}
_MODULE = {
    **_GEMMA,
    "attn_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "head_dim": HEAD_DIM,
}
_MODULE |= {"hidden_size": HIDDEN, "intermediate_size": MLP, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_MODULE |= {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB}

#: Models with an encoder of two layers and a decoder of two or three, with `side=` for each of their attentions.
ENCODER_DECODERS: dict[str, Family] = {
    "t5": Family("T5ForConditionalGeneration", _RELATIVE),
    "mt5": Family("MT5ForConditionalGeneration", _RELATIVE),
    "switch": Family("SwitchTransformersForConditionalGeneration", {**_RELATIVE, "num_experts": 2, "expert_capacity": 64}),
    "marian": Family("MarianMTModel", {**_SEQUENCES, "decoder_vocab_size": VOCAB}),
    "bart": Family("BartForConditionalGeneration", _SEQUENCES),
    "mbart": Family("MBartForConditionalGeneration", _SEQUENCES),
    "pegasus": Family("PegasusForConditionalGeneration", _SEQUENCES),
    "m2m_100": Family("M2M100ForConditionalGeneration", _SEQUENCES),
    "blenderbot": Family("BlenderbotForConditionalGeneration", _SEQUENCES),
    "t5gemma": Family("T5GemmaForConditionalGeneration", {"encoder": _MODULE, "decoder": _MODULE}),
    "led": Family(
        "LEDForConditionalGeneration",
        {**_SEQUENCES, "attention_window": WINDOW}
        | dict.fromkeys(("max_encoder_position_embeddings", "max_decoder_position_embeddings"), CONTEXT),
    ),
}


def tiny_config(family: str) -> PretrainedConfig:
    """Build the config of a family, or of an architecture by its class's name in `transformers`.

    Attention is eager, and `architectures` is set (TransformerBridge looks for it).

    Raises:
        SinkscopeError: there is no such family; the message lists them.

    >>> tiny_config("gemma2").layer_types
    ['sliding_attention', 'full_attention', 'sliding_attention', 'full_attention']
    """
    if family in ARCHITECTURES:
        return cast("PretrainedConfig", tiny_architecture(family))
    if family in SENSES:
        return cast("PretrainedConfig", tiny_architecture(SENSES[family].model, SENSES[family].options))
    recipe = _recipe(family)
    make = class_of(recipe.model).config_class
    sizes = {
        **dict.fromkeys(("num_layers", "num_hidden_layers"), len(recipe.local)),
        **dict.fromkeys(("num_heads", "num_attention_heads"), HEADS),
        "hidden_size": HIDDEN,
        "head_dim": HEAD_DIM,
        "intermediate_size": MLP,
        "max_position_embeddings": CONTEXT,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in recipe.local],
    }
    known = options_of(make)
    options = {name: value for name, value in sizes.items() if name in known} | as_configured(dict(recipe.options), known)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    if family in ENCODER_DECODERS:
        options = {name: options[name] for name in ("num_heads", "max_position_embeddings") if name in options} | dict(
            recipe.options
        )
        special |= {"pad_token_id": 0, "decoder_start_token_id": 1}
    config = make(vocab_size=VOCAB, architectures=[recipe.model], attn_implementation="eager", **special, **options)
    return cast("PretrainedConfig", config)


def _recipe(family: str) -> Family:
    known = FAMILIES | ENCODER_DECODERS
    if family not in known:
        raise unknown("family", family, [*known, *SENSES, *ARCHITECTURES])
    return known[family]


def tiny_hf_model(family: str, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random model of a family, or of an architecture, on the CPU: float32, eager, in eval mode.

    It is the same for a seed. Neither the hub nor torch's global generator is touched. Learned sink logits (gpt_oss) come
    from a unit normal, so that they take a visible share of each row.

    Raises:
        SinkscopeError: there is no such family; the message lists them.
    """
    config = tiny_config(family)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        model = cast("PreTrainedModel", class_of((config.architectures or [""])[0])(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("sinks"):
                weight.copy_(noise)
            elif weight.ndim > 1:
                weight.copy_(SPREAD * noise)
            else:
                gain = GAIN if family in FAMILIES and name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
                weight.add_(JITTER * noise + gain)
    return model.eval()


def tiny_tokenizer(family: str = "llama") -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token per character, which fits every tiny model: lower case, digits, punctuation.

    Id 0 pads. Decoders get BOS (id 1) in front, as Llama's does; bert gets [CLS] (1) and [SEP] (2) around the text, and
    encoder-decoders EOS (2) behind it, as T5's do.
    The arguments `name_or_path` and `add_bos_token` keep TransformerBridge from loading it again by name.

    >>> tiny_tokenizer()("a b").input_ids, tiny_tokenizer("bert")("a b").input_ids
    ([1, 4, 40, 5], [1, 4, 40, 5, 2])
    """
    import tokenizers as tk
    from transformers import PreTrainedTokenizerFast

    encoder = family == "bert" or family.endswith("MaskedLM")
    roles = ("pad", "cls", "sep", "unk") if encoder else ("pad", "bos", "eos", "unk")
    if family in ENCODER_DECODERS:
        roles = ("pad", "cls", "eos", "unk")  # without a BOS, which TransformerBridge would want in front
    special = {f"{role}_token": f"[{role.upper()}]" if encoder else f"<{role}>" for role in roles}
    symbols = [*special.values(), *string.ascii_lowercase, *string.digits, *" .,;:!?'\"-()\n"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    characters = tk.Tokenizer(tk.models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    characters.pre_tokenizer = tk.pre_tokenizers.Split("", "isolated")
    characters.decoder = tk.decoders.Fuse()
    arguments: dict[str, Any] = {"name_or_path": "tiny", "model_max_length": CONTEXT}
    if encoder:
        around = [("[CLS]", 1), ("[SEP]", 2)]
        characters.post_processor = tk.processors.TemplateProcessing("[CLS] $A [SEP]", None, around)
        arguments["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # HookedEncoder asks for all
    elif family in ENCODER_DECODERS:
        characters.post_processor = tk.processors.TemplateProcessing("$A <eos>", None, [("<eos>", 2)])
    else:
        arguments["add_bos_token"] = True
    make = cast("Any", PreTrainedTokenizerFast)  # its constructor has no annotations
    return cast("PreTrainedTokenizerFast", make(tokenizer_object=characters, **arguments, **special))
