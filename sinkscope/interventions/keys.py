"""Edits of single keys: hide them, or zero the attention they get."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, SupportsIndex

import torch
from jaxtyping import Shaped
from torch import Tensor

from sinkscope.edit import FROM_THE_END, Where
from sinkscope.interventions.base import Intervention, elsewhere, inside, resolve


def for_heads(
    heads: Where, here: Shaped[Tensor, "query key"], n: int
) -> Shaped[Tensor, "query key"] | Shaped[Tensor, "head query key"]:
    """Give what holds for all of `n` heads, or for some of them: the others have False, or 0."""
    if heads is None:
        return here
    per_head = here.new_zeros(n, *here.shape)
    per_head[list(heads)] = here
    return per_head


@dataclass(frozen=True)
class _Places(Intervention):
    """Edits at some positions, of all heads or of some; `at` names the field that holds the positions."""

    at: ClassVar[str]

    def check(self, length: int) -> None:
        """Refuse positions outside the text."""
        inside(self._where, length, self)

    def named_heads(self) -> tuple[int, ...]:
        """Give them."""
        return getattr(self, "heads", None) or ()

    def why_not_live(self) -> str | None:
        """Refuse positions that count from the end."""
        return FROM_THE_END if min(self._where) < 0 else None

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Give the same edit on as many other early positions, which nearly as many queries see."""
        return replace(self, **{self.at: elsewhere(self._where, seed)})

    @property
    def _where(self) -> tuple[int, ...]:
        return tuple(getattr(self, self.at))

    def _chosen(self, positions: Tensor, length: int) -> Tensor:
        inside(self._where, length, self)  # another edit may have made the input shorter
        return torch.isin(positions, resolve(self._where, length).to(positions.device))


@dataclass(frozen=True)
class _Keys(_Places):
    """Edits at some keys; `heads` are query heads, None for all."""

    at: ClassVar[str] = "keys"
    keys: Where = (0,)
    heads: Where = field(default=None, kw_only=True)


@dataclass(frozen=True)
class _Queries(_Places):
    """Edits at some query positions; `heads` are query heads, None for all."""

    at: ClassVar[str] = "positions"
    at_queries: ClassVar[bool] = True
    positions: Where
    heads: Where = field(default=None, kw_only=True)


@dataclass(frozen=True)
class MaskKeys(_Keys):
    """Hide keys before softmax: the rest of a row is renormalised. A query may always see itself.

    >>> str(MaskKeys([0], heads=[1]))
    'mask_keys(keys=[0], heads=[1])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"scores"})

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Hide the keys from every query."""
        return for_heads(self.heads, self._chosen(keys, length).expand(len(queries), -1), heads)


@dataclass(frozen=True)
class ZeroAttention(_Keys):
    """Set the attention to keys to zero after softmax: rows lose what they paid there. The same as zeroing the value."""

    touches: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor:
        """Zero the keys' columns."""
        return for_heads(self.heads, self._chosen(keys, length)[None], heads).expand(heads, 1, -1)
