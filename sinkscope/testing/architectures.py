"""Tiny random models of the architectures that TransformerLens's registry lists, as configurations of Hugging Face.

`families.py` has the few that most tests run on; these are for the table in docs/compatibility.md, and for you. Each is an
architecture's name and what its configuration must be told beside the sizes that all share (`sizes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkscope.models.versions import class_of
from sinkscope.testing.senses import BY_CLASS
from sinkscope.testing.sizes import CONTEXT, FEW, PATCH, WINDOW, Part, configuration

_LOCAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA = {**_LOCAL, "query_pre_attn_scalar": 16}
_ROTARY = {"rope_type": "default", "rope_theta": 10_000.0}
_IN_THREE = {"rope_parameters": {**_ROTARY, "mrope_section": [2, 1, 1]}}
_LATENT = {"num_key_value_heads": 4, "head_dim": ...}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16}
_SHORT = {"layer_types": ["conv", "full_attention"] * 2}
_CHUNKS = {
    **{"attention_chunk_size": WINDOW, "layer_types": ["chunked_attention", "full_attention"] * 2},
    **{"no_rope_layers": [1, 0, 1, 0], "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
}
_FALCON = {"alibi": False, "head_dim": ...}
_PIXELS = {"image_size": 16, "patch_size": PATCH}
_SPECTRUM = {"num_mel_bins": 16, "max_source_positions": 16}

_LLAMA, _QWEN2 = Part("LlamaConfig"), Part("Qwen2Config")
_CLIP = Part("CLIPVisionConfig", {**_PIXELS, "num_hidden_layers": FEW})
_COARSE = Part("CLIPVisionConfig", {**_PIXELS, "num_hidden_layers": FEW, "patch_size": 8})
_SIGLIP = Part("SiglipVisionConfig", {**_PIXELS, "num_hidden_layers": FEW, "patch_size": 8})
#: Heights and widths that an image may be cut into tiles of.
_TILES = [[16, 32], [32, 16], [32, 32]]
_FLAMINGO = Part("AudioFlamingo3EncoderConfig", {**_SPECTRUM, "num_hidden_layers": FEW})
_T5GEMMA = {**_GEMMA, "num_hidden_layers": 4}
_DEEP = {"depth": FEW, "num_heads": 4, "patch_size": PATCH, "out_hidden_size": 32}
#: Tokens that stand for images and videos, where the class's own lie outside a tiny vocabulary.
_STAND_INS: dict[str, Any] = {
    "image_token_id": 60,
    "video_token_id": 61,
    "vision_start_token_id": 62,
    "vision_end_token_id": 63,
}
_GEMMA3_MARKS: dict[str, Any] = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
_GEMMA4_MARKS: dict[str, Any] = {"audio_config": None, "image_token_id": 60, "video_token_id": 61, "audio_token_id": 62}
_QWEN_EYE = {**_DEEP, "num_position_embeddings": 16}
_QWEN2_EYE = {"depth": FEW, "num_heads": 4, "patch_size": PATCH, "embed_dim": 32, "hidden_size": 32}
_QWEN3_EYE = {**_QWEN_EYE, "deepstack_visual_indexes": [0]}


def _holding(text: Part, eye: Part | None = None, ear: Part | None = None, **options: Any) -> dict[str, Any]:
    """Put a text model into a larger one."""
    parts = {"text_config": text, "vision_config": eye, "audio_config": ear}
    return {name: part for name, part in parts.items() if part is not None} | options


#: Decoders that need no more than sizes.
_PLAIN = """
Llama Qwen2 Qwen3 Qwen3Moe Gemma Granite Olmo Olmo2 Phi Phi3 Bloom Cohere StableLm Apertus HunYuanDenseV1 Nemotron Glm
Glm4 Arcee SeedOss Starcoder2 Olmoe FlexOlmo GraniteMoe Ernie4_5 Ernie4_5_Moe Jais2 BitNet NanoChat JetMoe MiniMaxM2
Ministral3 GPTBigCode CodeGen XGLM Mamba FalconMamba GPTJ Qwen2Moe Glm4Moe Phimoe FalconH1
"""
_DECODERS: dict[str, dict[str, Any]] = {
    **{name: {} for name in _PLAIN.split()},
    "OPT": {"word_embed_proj_dim": 32},
    "Mistral": {"sliding_window": WINDOW},
    "Mixtral": {"sliding_window": None},
    "Gemma2": {**_GEMMA, "attn_logit_softcapping": 3.0},
    "Gemma3": _GEMMA,
    "VaultGemma": {**_GEMMA, "attn_logit_softcapping": 3.0},
    "Gemma4": {**_LOCAL, "num_kv_shared_layers": 2},
    "Qwen3_5": _LINEAR,
    "Qwen3_5Moe": _LINEAR,
    "Qwen3Next": _LINEAR,
    "OlmoHybrid": {**_LINEAR, "linear_num_key_heads": 4, "head_dim": 8},
    "GptOss": {**_LOCAL, "rope_parameters": _ROTARY},
    "GPTNeo": {"attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "GPTNeoX": {"rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5}},
    "DeepseekV3": {**_LATENT, "first_k_dense_replace": 1},
    "DeepseekV2": {**_LATENT, "first_k_dense_replace": 1, "topk_method": "greedy"},
    "DeepseekV4": {
        **{"num_key_value_heads": 1, "head_dim": 16, "sliding_window": WINDOW, "num_nextn_predict_layers": 0},
        **{"o_groups": 2, "o_lora_rank": 16, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
    },
    "Glm4MoeLite": {**_LATENT, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "GlmMoeDsa": {
        **{"num_key_value_heads": 4, "v_head_dim": 16, "first_k_dense_replace": 1},
        **{"index_topk": 32, "index_head_dim": 16, "index_n_heads": 2},
    },
    "Youtu": _LATENT,
    "NemotronH": {"layers_block_type": ["mamba", "attention", "moe", "attention"], "num_hidden_layers": ...},
    "Falcon": {**_FALCON, "new_decoder_architecture": False, "multi_query": True, "num_kv_heads": 1},
    "Olmo3": _LOCAL,
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"] * 2},
    "Mpt": {"attn_config": {"attn_impl": "eager", "alibi": True}},
    "Lfm2": _SHORT,
    "Lfm2Moe": {**_SHORT, "num_dense_layers": 1},
    "Afmoe": _LOCAL,
    "Laguna": {**_LOCAL, "num_attention_heads_per_layer": [4, 8, 4, 8]},
    "Exaone4": _LOCAL,
    "Cohere2": _LOCAL,
    "SmolLM3": {"no_rope_layers": [1, 0, 1, 0]},
    "ModernBertDecoder": {**_LOCAL, "local_attention": WINDOW},
    "Zamba2": {
        **{"layers_block_type": ["mamba", "hybrid"] * 2, "num_key_value_heads": 4, "head_dim": ...},
        **{"mamba_expand": 2, "adapter_rank": 8},
    },
    "Bamba": {"attn_layer_indices": [1, 3]},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "attention_window_size": WINDOW},
    "Llama4": _CHUNKS,
    "HrmText": {"prefix_lm": False},
    "Mamba2": {"num_heads": 4, "head_dim": 16},
    "Rwkv": {"attention_hidden_size": 32},
}
_TWO_SIDED: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("T5", "MT5", "Pegasus", "M2M100", "Bart", "Blenderbot", "MBart", "SwitchTransformers")},
    "LED": {
        "max_encoder_position_embeddings": CONTEXT,
        "max_decoder_position_embeddings": CONTEXT,
        "attention_window": WINDOW,
    },
    "LongT5": {"local_radius": 5, "global_block_size": 4},
    "T5Gemma": {
        "encoder": Part("T5GemmaModuleConfig", _T5GEMMA),
        "decoder": Part("T5GemmaModuleConfig", {**_T5GEMMA, "is_decoder": True}),
    },
    "T5Gemma2": {
        "encoder": Part(
            "T5Gemma2EncoderConfig", {"text_config": Part("T5Gemma2TextConfig", _GEMMA), "vision_config": _SIGLIP}
        ),
        "decoder": Part("T5Gemma2DecoderConfig", _GEMMA),
    },
}
_INSIDE: dict[str, dict[str, Any]] = {
    "Llava": _holding(_LLAMA, _CLIP, image_token_index=60),
    "LlavaNext": _holding(_LLAMA, _COARSE, image_token_index=60, image_grid_pinpoints=_TILES),
    "LlavaOnevision": _holding(_QWEN2, _SIGLIP, image_token_index=60, video_token_index=61, image_grid_pinpoints=_TILES),
    "Qwen3_5": _holding(Part("Qwen3_5TextConfig", _LINEAR), Part("Qwen3_5VisionConfig", _QWEN_EYE), **_STAND_INS),
    "Qwen3_5Moe": _holding(Part("Qwen3_5MoeTextConfig", _LINEAR), Part("Qwen3_5MoeVisionConfig", _QWEN_EYE)),
    "Gemma3": _holding(
        Part("Gemma3TextConfig", _GEMMA),
        _SIGLIP,
        mm_tokens_per_image=4,
        **_GEMMA3_MARKS,
    ),
    "Gemma3n": _holding(
        Part("Gemma3nTextConfig", {**_LOCAL, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4})
    ),
    "Gemma4": _holding(
        Part("Gemma4TextConfig", {**_LOCAL, "global_head_dim": 16}),
        Part(
            "Gemma4VisionConfig",
            {"num_hidden_layers": FEW, "patch_size": PATCH, "num_key_value_heads": 4, "position_embedding_size": 64}
            | {"pooling_kernel_size": 2},
        ),
        **_GEMMA4_MARKS,
    ),
    "Gemma4Unified": _holding(Part("Gemma4UnifiedTextConfig", _LOCAL), audio_config=None),
    "Mistral3": _holding(
        Part("MistralConfig", {"sliding_window": None}),
        Part("PixtralVisionConfig", {**_PIXELS, "num_hidden_layers": FEW}),
        image_token_index=60,
        spatial_merge_size=2,
    ),
    "Qwen3VL": _holding(Part("Qwen3VLTextConfig", _IN_THREE), Part("Qwen3VLVisionConfig", _QWEN3_EYE), **_STAND_INS),
    "Qwen3VLMoe": _holding(Part("Qwen3VLMoeTextConfig", _IN_THREE), Part("Qwen3VLMoeVisionConfig", _QWEN3_EYE), **_STAND_INS),
    "Qwen2VL": _holding(Part("Qwen2VLTextConfig", _IN_THREE), Part("Qwen2VLVisionConfig", _QWEN2_EYE), **_STAND_INS),
    "Qwen2_5_VL": _holding(
        Part("Qwen2_5_VLTextConfig", _IN_THREE),
        Part("Qwen2_5_VLVisionConfig", {**_DEEP, "window_size": 16, "fullatt_block_indexes": [1]}),
        **_STAND_INS,
    ),
    "Glm4v": _holding(
        Part("Glm4vTextConfig", {"rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}),
        Part("Glm4vVisionConfig", {**_DEEP, "image_size": 16}),
        **_STAND_INS,
    ),
    "Llama4": _holding(
        Part("Llama4TextConfig", _CHUNKS),
        Part(
            "Llama4VisionConfig",
            {**_PIXELS, "num_hidden_layers": FEW}
            | dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        ),
    ),
    "Idefics3": _holding(_LLAMA, Part("Idefics3VisionConfig", {**_PIXELS, "num_hidden_layers": FEW}), image_token_id=60),
    "Florence2": _holding(
        Part("BartConfig"),
        Part(
            "Florence2VisionConfig",
            {"depths": (1,) * 4, "embed_dim": (8,) * 4, "num_heads": (2,) * 4, "num_groups": (2,) * 4}
            | {"projection_dim": 32, "num_hidden_layers": ..., "num_attention_heads": ...},
        ),
    ),
    "Emu3": {
        "text_config": Part("Emu3TextConfig"),
        "vq_config": {"base_channels": 32, "num_res_blocks": 1, "embed_dim": 4, "codebook_size": 16, "hidden_size": 32}
        | {"channel_multiplier": (1, 1), "attn_resolutions": ()},
        "vocabulary_map": {"<image>": 60, "<|extra_200|>": 61} | {f"<|visual token {n:06}|>": 4 + n for n in range(16)},
    },
    "AudioFlamingo3": _holding(_QWEN2, ear=_FLAMINGO),
    "MusicFlamingo": _holding(_QWEN2, ear=_FLAMINGO),
    "Qwen2Audio": _holding(
        _QWEN2, ear=Part("Qwen2AudioEncoderConfig", {**_SPECTRUM, "encoder_layers": FEW}), audio_token_index=60
    ),
    "GlmAsr": _holding(_LLAMA, ear=Part("GlmAsrEncoderConfig", {"num_hidden_layers": FEW, "num_mel_bins": 16})),
}

#: Architecture (the class's name in `transformers`) -> what its configuration is told.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{f"{name}ForCausalLM": options for name, options in _DECODERS.items()},
    **{f"{name}ForConditionalGeneration": options for name, options in (_TWO_SIDED | _INSIDE).items()},
    "GPT2LMHeadModel": {},
    "OpenAIGPTLMHeadModel": {},
    "BloomModel": {},
    "MarianMTModel": {},
    "BertForMaskedLM": {},
    "BertLMHeadModel": {"is_decoder": True},
    "RobertaForMaskedLM": {"max_position_embeddings": CONTEXT + 2, "pad_token_id": 1},
    **{name: dict(sense.options) for name, sense in BY_CLASS.items()},
}
#: Names in the registry of what `transformers` calls otherwise.
ALSO_CALLED = {
    "MPTForCausalLM": "MptForCausalLM",
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}


def tiny_architecture(architecture: str, options: Mapping[str, Any] | None = None) -> Any:
    """Build the configuration of an architecture, eager, with `architectures` set to its name.

    Args:
        architecture: one of `ARCHITECTURES`, or any class of `transformers` with `options`.
        options: what the configuration is told beside the sizes that all share.
    """
    name = ALSO_CALLED.get(architecture, architecture)
    told = ARCHITECTURES[name] if options is None else dict(options)
    config = configuration(class_of(name).config_class, told | {"architectures": [name]})
    config._attn_implementation = "eager"
    return config
