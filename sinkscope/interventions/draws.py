"""What is drawn by a seed: on the CPU, from numbers and words alone, so that it is the same on every engine and device."""

from __future__ import annotations

import random

import torch
from jaxtyping import Float
from torch import Tensor


def draw(*of: object) -> random.Random:
    """Give a generator that depends on these words and numbers, and on nothing else."""
    return random.Random(" ".join(map(str, of)))


def noise(shape: tuple[int, ...], *of: object) -> Tensor:
    """Draw normal numbers, in float64."""
    generator = torch.Generator().manual_seed(draw(*of).getrandbits(63))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def like(x: Float[Tensor, "... d"], *of: object) -> Float[Tensor, "... d"]:
    """Draw vectors with the mean and the norm of those given, over the last axis; the same of every batch's.

    >>> x = torch.tensor([[1.0, 2.0, 6.0]])
    >>> y = like(x, 0)
    >>> bool(torch.isclose(y.mean(), x.mean())), bool(torch.isclose(y.norm(), x.norm()))
    (True, True)
    """
    drawn = noise(tuple(x.shape[1:]), *of).to(x.device)
    drawn = drawn - drawn.mean(-1, keepdim=True)
    middle = x.double().mean(-1, keepdim=True)
    spread = (x.double() - middle).norm(dim=-1, keepdim=True)
    return torch.addcmul(middle, spread, drawn / drawn.norm(dim=-1, keepdim=True)).to(x.dtype)
