"""HookedTransformer and HookedEncoder, which TransformerLens has up to 3.9: built from a loaded Hugging Face model.

TransformerLens builds these by name, from a list that many models (SmolLM2) are not on; given a directory with a config,
its own conversion of configuration and weights works for every architecture that it knows.
"""

from __future__ import annotations

import copy
import tempfile
from typing import Any

from sinkscope.errors import SinkscopeError


def convert(network: Any, tokenizer: Any, name: str) -> Any:
    """Make a HookedTransformer of a decoder, or a HookedEncoder of a BERT model; weights are not folded or centred.

    Args:
        network: the Hugging Face model, on its device.
        tokenizer: its tokenizer.
        name: what reports call it.

    Raises:
        SinkscopeError: an architecture that TransformerLens 3.9 can't convert; says which.
    """
    from transformer_lens import HookedEncoder, HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    architecture = network.config.architectures[0]
    if architecture == "BertForMaskedLM":
        network = _with_pooler(network)
    with tempfile.TemporaryDirectory(prefix="config-") as directory:  # a path that names a family would be taken for it
        config = copy.deepcopy(network.config)
        if architecture.startswith("GPT2"):
            config.n_ctx = config.n_positions  # the attribute's old name, which 3.9 reads
        config.save_pretrained(directory)
        try:
            cfg = loading.get_pretrained_model_config(directory, device=str(network.device), dtype=network.dtype)
            weights = loading.get_pretrained_state_dict(directory, cfg, network, dtype=network.dtype)
        except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
            raise _refusal(name, architecture, error) from error
    cfg.model_name = name
    if tokenizer is None:
        cfg.tokenizer_name = None  # or it would be looked for in the directory that is gone
    try:
        if architecture.startswith("Bert"):
            encoder = HookedEncoder(cfg, tokenizer, move_to_device=False)
            encoder.load_state_dict(weights, strict=False)
            return encoder.to(network.device).eval()
        model = HookedTransformer(cfg, tokenizer, move_to_device=False, default_padding_side="right")
        model.load_and_process_state_dict(
            weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
        )
        return model.to(network.device).eval()
    except RuntimeError as error:
        raise _refusal(name, architecture, error) from error


def _refusal(name: str, architecture: str, error: Exception) -> SinkscopeError:
    return SinkscopeError(
        f"TransformerLens 3.9 can't make a HookedTransformer of {name!r} ({architecture}): "
        f"{' '.join(str(error).split())}. Use backend='bridge'"
    )


def _with_pooler(network: Any) -> Any:
    """Give BERT the pooler that 3.9's conversion of weights expects; no attention depends on it."""
    from transformers import BertForPreTraining

    whole = BertForPreTraining(network.config).to(network.device, network.dtype)
    whole.load_state_dict(network.state_dict(), strict=False)
    return whole
