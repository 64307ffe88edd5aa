"""Edits of scores, before softmax: attention to keys scaled or biased, and tokens that attend to themselves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sinkscope.interventions.base import real_number
from sinkscope.interventions.keys import _Keys, _Queries, for_heads


@dataclass(frozen=True)
class _Biased(_Keys):
    """Adds a number to the scores of keys; rows are renormalised."""

    touches: ClassVar[frozenset[str]] = frozenset({"scores"})

    def _added(self) -> float:
        raise NotImplementedError

    def biases(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Add it."""
        added = torch.where(self._chosen(keys, length), self._added(), 0.0)
        return for_heads(self.heads, added[None], heads)


@dataclass(frozen=True)
class ScaleAttention(_Biased):
    """Multiply the attention to keys by a factor and renormalise each row: the logarithm is added to the keys' scores.

    A row that gave the keys a gives them g a / (g a + 1 - a). A factor of 1 changes nothing; 0 is :class:`MaskKeys`, under
    which a query may always see itself. A learned sink counts among what is renormalised.
    Source: ZeroTuning, arXiv 2505.11739.

    >>> str(ScaleAttention(0, 0.5, heads=[1]))
    'scale_attention(keys=[0], factor=0.5, heads=[1])'
    """

    factor: Any = None

    def __post_init__(self) -> None:
        """Refuse what is no factor."""
        super().__post_init__()
        object.__setattr__(self, "factor", real_number(self.factor, f"{type(self).__name__}(factor=...)", 0.0))

    def _added(self) -> float:
        return math.log(self.factor)

    def biases(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Add the logarithm; of 0, hide the keys instead."""
        return super().biases(layer, keys, heads, length) if self.factor else None

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Hide the keys, where the factor is 0."""
        if self.factor:
            return None
        return for_heads(self.heads, self._chosen(keys, length).expand(len(queries), -1), heads)


@dataclass(frozen=True)
class BiasScores(_Biased):
    """Add a number to the scores of keys, before softmax; rows are renormalised. 0 changes nothing.

    >>> str(BiasScores([0, 1], -2))
    'bias_scores(keys=[0, 1], bias=-2)'
    """

    bias: Any = None

    def __post_init__(self) -> None:
        """Refuse what is no number."""
        super().__post_init__()
        object.__setattr__(self, "bias", real_number(self.bias, f"{type(self).__name__}(bias=...)"))

    def _added(self) -> float:
        return float(self.bias)


@dataclass(frozen=True)
class SelfOnly(_Queries):
    """Have tokens attend to themselves alone: a row of theirs is one at itself (less what a learned sink takes).

    The first token of a text can't do otherwise; that a later one made to do so becomes a sink is one of the two
    interventions of Li et al. 2026, arXiv 2605.06611 (the other: :class:`AmplifyVariance`).

    >>> str(SelfOnly(10))
    'self_only(positions=[10])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"scores"})

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Hide every key from them; the library lets a query see itself."""
        return for_heads(self.heads, self._chosen(queries, length).expand(-1, keys.shape[1]), heads)
