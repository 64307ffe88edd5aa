"""What the configurations of tiny models are told: sizes that all share, each under a configuration's own name for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Layers of a tiny model; layers of a tower for images or sound, and of either side of an encoder-decoder.
LAYERS, FEW = 4, 2
VOCAB, CONTEXT, WINDOW, PATCH = 64, 128, 8, 4

#: What a configuration is told if it has a field, or another name for a field, of this name.
SIZES: dict[str, Any] = {
    **{"vocab_size": VOCAB, "decoder_vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "n_positions": CONTEXT},
    **{"max_seq_len": CONTEXT, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    **dict.fromkeys(("num_hidden_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), FEW),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd"), 32),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "d_kv": 8, "kv_channels": 8, "rotary_dim": 4},
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1},
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **{"moe_shared_expert_intermediate_size": 16, "shared_intermediate_size": 32, "norm_topk_prob": True},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12},
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_dt_rank"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_chunk_size", "chunk_size"), 16),
    **{"mamba_d_state": 8, "ssm_state_size": 8, "mamba_d_ssm": 64, "use_mamba_kernels": False},
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "forced_eos_token_id": None},
}


@dataclass(frozen=True)
class Part:
    """A configuration inside another: the name of its class, and what it is told. `...` leaves a size as the class has it."""

    config: str
    options: Mapping[str, Any] = field(default_factory=dict)


def options_of(make: Any) -> set[str]:
    """Name what a configuration takes: a dataclass since transformers 5, a plain class before."""
    return {*make.attribute_map, *getattr(make, "__dataclass_fields__", inspect.signature(make.__init__).parameters)}


def configuration(make: Any, options: Mapping[str, Any]) -> Any:
    """Tell a configuration the sizes that it knows, each under its own name for it, and the options before them."""
    import transformers

    known, other = options_of(make), make.attribute_map
    told = {other.get(name, name): value for name, value in SIZES.items() if name in known}
    told |= {other.get(name, name): value for name, value in options.items()}
    for name, value in told.items():
        if isinstance(value, Part):
            told[name] = configuration(getattr(transformers, value.config), value.options)
    return make(**{name: value for name, value in told.items() if value is not ...})
