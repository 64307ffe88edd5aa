"""A digest of all numbers that a network holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def digest(network: nn.Module) -> str:
    """Digest every parameter and buffer, bit by bit, with its name, shape and dtype; what is not in memory by these alone."""
    found = hashlib.sha256()
    for name, tensor in _tensors(network):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_meta:
            data = tensor.detach().cpu().contiguous()
            found.update((data.view(torch.uint8) if data.ndim else data.reshape(1).view(torch.uint8)).numpy().data)
    return found.hexdigest()


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give all tensors by name; those that stand for others (quantised weights) as what they are made of."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        yield from _plain(name, tensor)
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        if callable(weight) and not isinstance(weight, nn.Module):  # torch's own quantised layers hide theirs behind a method
            yield from _plain(f"{name}.weight", weight())


def _plain(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    if hasattr(tensor, "__tensor_flatten__"):
        for part in tensor.__tensor_flatten__()[0]:
            yield from _plain(f"{name}.{part}", getattr(tensor, part))
    elif tensor.is_quantized:
        yield name, tensor.int_repr()
        scheme = str(tensor.qscheme())
        spread = "per_channel" in scheme
        yield f"{name} {scheme}", tensor.q_per_channel_scales() if spread else torch.tensor([tensor.q_scale()])
        yield f"{name} zero", tensor.q_per_channel_zero_points() if spread else torch.tensor([tensor.q_zero_point()])
    else:
        yield name, tensor
