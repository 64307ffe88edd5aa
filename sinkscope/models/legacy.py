"""HookedTransformer, HookedEncoder and HookedEncoderDecoder, which TransformerLens has up to 3.9.

They are built from a loaded Hugging Face model. TransformerLens builds these by name, from a list that many models (SmolLM2)
are not on; given a directory with a config, its own conversion of configuration and weights works for every architecture that
it knows.
"""

from __future__ import annotations

import copy
import importlib.metadata
import tempfile
from typing import Any

import torch

from sinkscope.errors import SinkscopeError
from sinkscope.models.hooked_sides import is_hooked
from sinkscope.models.versions import has_bridge

#: Outputs are wrong that differ by this much of their mean size; rounding makes 1e-6, in half precision 1e-2.
WRONG, WRONG_IN_HALF = 1e-3, 5e-2


def convert(network: Any, tokenizer: Any, name: str) -> Any:
    """Make a HookedTransformer of a decoder, a HookedEncoder of a BERT model, a HookedEncoderDecoder of a T5.

    Weights are not folded or centred.

    Args:
        network: the Hugging Face model, on its device.
        tokenizer: its tokenizer.
        name: what reports call it.

    Raises:
        SinkscopeError: an architecture that this TransformerLens can't convert, or converts to another model; says which.
    """
    from transformer_lens import HookedEncoder, HookedEncoderDecoder, HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    architecture = network.config.architectures[0]
    if architecture == "BertForMaskedLM":
        network = _with_pooler(network)
    with tempfile.TemporaryDirectory(prefix="config-") as directory:  # a path that names a family would be taken for it
        config = copy.deepcopy(network.config)
        if architecture.startswith("GPT2"):
            config.n_ctx = config.n_positions  # the attribute's old name, which TransformerLens reads
        if architecture.startswith("T5") and not hasattr(config, "n_positions"):
            config.n_positions = 512  # T5's, which transformers 5 no longer says; nothing here depends on it
        config.save_pretrained(directory)
        try:
            cfg = loading.get_pretrained_model_config(directory, device=str(network.device), dtype=network.dtype)
            weights = loading.get_pretrained_state_dict(directory, cfg, network, dtype=network.dtype)
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise _refusal(name, architecture, error) from error
    cfg.model_name = name
    if not has_bridge() and cfg.positional_embedding_type == "rotary":  # TransformerLens 2 takes 10,000 for most Llamas
        cfg.rotary_base = getattr(network.config, "rope_theta", cfg.rotary_base)
    if tokenizer is None:
        cfg.tokenizer_name = None  # or it would be looked for in the directory that is gone
    try:
        if architecture.startswith(("Bert", "T5")):
            make = HookedEncoder if architecture.startswith("Bert") else HookedEncoderDecoder
            encoder = make(cfg, tokenizer, move_to_device=False)
            encoder.load_state_dict(weights, strict=False)
            return _proved(encoder.to(network.device).eval(), network, name)
        model = HookedTransformer(cfg, tokenizer, move_to_device=False, default_padding_side="right")
        model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        return _proved(model.to(network.device).eval(), network, name)
    except RuntimeError as error:
        raise _refusal(name, architecture, error) from error


def _proved(model: Any, network: Any, name: str) -> Any:
    """Give the model, if it computes what Hugging Face's does: TransformerLens 2 leaves learned sinks out (gpt-oss).

    Raises:
        SinkscopeError: it does not.
    """
    ids = torch.arange(1, 33, device=network.device)[None]  # positions that are far apart are one to T5
    with torch.no_grad():
        if hasattr(model, "encoder_output"):
            ours, theirs = model.encoder_output(ids), network.base_model(ids).last_hidden_state
        elif is_hooked(model):
            ours = model(ids, decoder_input=ids, one_zero_attention_mask=torch.ones_like(ids))
            theirs = network(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
        else:
            ours, theirs = model(ids, attention_mask=torch.ones_like(ids)), network(ids, use_cache=False).logits
    gap = float((ours - theirs).abs().float().mean() / theirs.abs().float().mean())
    if not gap < (WRONG if network.dtype in (torch.float32, torch.float64) else WRONG_IN_HALF):
        architecture = network.config.architectures[0]
        raise _refusal(name, architecture, f"its output differs from Hugging Face's by {gap:.2g} of its mean size")
    return model


def _refusal(name: str, architecture: str, why: object) -> SinkscopeError:
    version = importlib.metadata.version("transformer-lens")
    return SinkscopeError(
        f"TransformerLens {version} can't make a HookedTransformer of {name!r} ({architecture}): "
        f"{' '.join(str(why).split())}. Use backend='bridge'"
        f"{'' if has_bridge() else ', which TransformerLens has from 3.0 on; or a plain Hugging Face model'}"
    )


def _with_pooler(network: Any) -> Any:
    """Give BERT the pooler that TransformerLens's conversion of weights expects; no attention depends on it."""
    from transformers import BertForPreTraining

    whole = BertForPreTraining(network.config).to(network.device, network.dtype)
    whole.load_state_dict(network.state_dict(), strict=False)
    return whole.eval()
