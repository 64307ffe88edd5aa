"""The two stacks of an encoder-decoder of Hugging Face, and what their configurations say."""

from __future__ import annotations

from typing import Any

from torch import nn

from sinkscope.errors import SinkscopeError
from sinkscope.models.identity import Side

#: What modules of cross-attention are called in Hugging Face's decoders.
CROSS = frozenset({"encoder_attn", "EncDecAttention", "cross_attn"})


def stack_of(network: Any, half: str) -> Any:
    """Find the encoder or the decoder; of Florence-2, inside the BART that it gives for a decoder."""
    found = network.get_encoder() if half == "encoder" else network.get_decoder()
    return inside if isinstance(inside := getattr(found, half, None), nn.Module) else found


def sides_in(network: Any) -> dict[int, Side]:
    """Tell which attention each module of both stacks belongs to, by its `id`."""
    found: dict[int, Side] = {id(module): "encoder" for module in stack_of(network, "encoder").modules()}
    for name, module in stack_of(network, "decoder").named_modules():
        found[id(module)] = "cross" if CROSS & set(name.split(".")) else "decoder"
    return found


def layers_of(stack: Any) -> nn.ModuleList:
    """Find the list of a stack's layers.

    Raises:
        SinkscopeError: there is none.
    """
    found = next((child for child in stack.children() if isinstance(child, nn.ModuleList)), None)
    if found is None:
        raise SinkscopeError(f"the layers of {type(stack).__name__} were not found")
    return found


def longest_input(config: Any, half: str) -> int | None:
    """Read the longest input of a stack; relative positions bound none."""
    if getattr(config, "relative_attention_num_buckets", None):
        return None
    names = (f"max_{half}_position_embeddings", "max_target_positions", "max_position_embeddings", "n_positions")
    return next((int(size) for name in names if (size := getattr(config, name, None))), None)


def windows_of(config: Any, n_layers: int, half: str) -> dict[int, int]:
    """Read sliding windows; an encoder's reach as far on both sides, the query's own key not counted."""
    size, types = getattr(config, "sliding_window", None) or 0, getattr(config, "layer_types", None) or [""] * n_layers
    reach = int(size) + (half == "encoder")
    return {layer: reach for layer in range(n_layers) if size and types[layer] == "sliding_attention"}


def vocabulary_of(stack: Any) -> int:
    """Count the token ids that a stack takes; 0 where it does not say."""
    weight = getattr(stack.get_input_embeddings(), "weight", None)
    return 0 if weight is None else int(weight.shape[0])
