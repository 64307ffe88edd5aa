"""Bigram-Backcopy, the task that toy transformers learn here (Guo et al. 2024, arXiv 2410.13835)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor
from torch.nn import functional as F

from sinkscope.errors import SinkscopeError


@dataclass(frozen=True)
class BigramBackcopy:
    """The chain: <s>, then bigrams; after a trigger, the token before the trigger.

    Token 0 is <s>, tokens 1 to `triggers` are the triggers, the rest are ordinary. The first token after <s> is ordinary,
    so no trigger follows another, and <s> is never copied.

    Attributes:
        vocabulary: tokens other than <s>, triggers included.
        triggers: how many of them are triggers.
        length: tokens of a sequence, <s> included.
        concentration: of the Dirichlet distribution of the bigram rows; the smaller, the more predictable the chain.
        seed: of the bigram rows.
    """

    vocabulary: int = 32
    triggers: int = 3
    length: int = 64
    concentration: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.triggers < self.vocabulary:
            raise SinkscopeError(f"triggers={self.triggers}: from 1 to vocabulary - 1 = {self.vocabulary - 1}")
        if self.length < 3:
            raise SinkscopeError(f"length={self.length}: at least 3, or nothing is copied")

    @cached_property
    def table(self) -> Float[Tensor, "token next"]:
        """Give the probabilities of the next token after each that is no trigger; a trigger's own row is not used."""
        n = self.vocabulary
        rows = np.random.default_rng(self.seed).dirichlet(np.full(n, self.concentration), size=n + 1)
        rows[0, : self.triggers] = 0.0
        rows[0] /= rows[0].sum()
        return F.pad(torch.from_numpy(rows), (1, 0)).float()

    def is_trigger(self, ids: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        """Say which tokens are triggers."""
        return (ids > 0) & (ids <= self.triggers)

    def batch(self, generator: Generator, n: int) -> Int[Tensor, "n length"]:
        """Draw n sequences, by the inverse of the cumulative distribution."""
        draw, below = torch.rand(n, self.length, generator=generator), self.table.cumsum(-1)[:, :-1]
        ids = torch.zeros(n, self.length, dtype=torch.long)
        for i in range(1, self.length):
            now = ids[:, i - 1]
            drawn = (draw[:, i, None] >= below[now]).sum(-1)
            ids[:, i] = torch.where(self.is_trigger(now), ids[:, i - 2], drawn)
        return ids

    def surprise(self, ids: Int[Tensor, "n length"]) -> Float[Tensor, "n length-1"]:
        """Give the loss of whoever knows the chain, per predicted token, in nats: no model does better on average.

        -log of the bigram's probability; 0 after a trigger.
        """
        known = -self.table[ids[:, :-1], ids[:, 1:]].log()
        return known.masked_fill(self.is_trigger(ids[:, :-1]), 0.0)
