"""Edits of single keys: hide them, zero the attention they get, or take their values away."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar, SupportsIndex

import torch
from torch import Tensor

from sinkscope.edit import Where
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import FROM_THE_END, Intervention, inside, resolve
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class _Keys(Intervention):
    """Edits at some key positions; `heads` are query heads, None for all."""

    keys: Where = (0,)
    heads: Where = field(default=None, kw_only=True)

    def check(self, length: int) -> None:
        """Refuse keys outside the text."""
        inside(self.keys, length, self)

    def named_heads(self) -> tuple[int, ...]:
        """Give them."""
        return self.heads or ()

    def why_not_live(self) -> str | None:
        """Refuse keys that count from the end."""
        return FROM_THE_END if min(self.keys) < 0 else None

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Give the same edit on as many other early positions, which nearly as many queries see."""
        near = [k for k in range(4, 32) if k not in self.keys]
        draw = random.Random(whole_number(seed, "seed"))
        return replace(self, keys=tuple(sorted(draw.sample(near, min(len(self.keys), len(near))))))

    def _chosen(self, keys: Tensor, length: int) -> Tensor:
        inside(self.keys, length, self)  # another edit may have made the input shorter
        return torch.isin(keys, resolve(self.keys, length).to(keys.device))


@dataclass(frozen=True)
class MaskKeys(_Keys):
    """Hide keys before softmax: the rest of a row is renormalised. A query may always see itself.

    >>> str(MaskKeys([0], heads=[1]))
    'mask_keys(keys=[0], heads=[1])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"scores"})

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Hide the keys from every query."""
        hidden = self._chosen(keys, length).expand(len(queries), -1)
        if self.heads is None:
            return hidden
        per_head = torch.zeros(heads, *hidden.shape, dtype=torch.bool, device=hidden.device)
        per_head[list(self.heads)] = hidden
        return per_head


@dataclass(frozen=True)
class ZeroAttention(_Keys):
    """Set the attention to keys to zero after softmax: rows lose what they paid there. The same as zeroing the value."""

    touches: ClassVar[frozenset[str]] = frozenset({"pattern"})

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor:
        """Zero the keys' columns."""
        chosen = torch.zeros(heads, 1, len(keys), dtype=torch.bool, device=keys.device)
        chosen[list(self.heads) if self.heads is not None else slice(None)] = self._chosen(keys, length)
        return chosen


@dataclass(frozen=True)
class ZeroValue(_Keys):
    """Set the value vectors of keys to zero; `heads` are key-value heads, of which there may be fewer."""

    touches: ClassVar[frozenset[str]] = frozenset({"values"})

    def values(self, layer: int, values: Tensor, keys: Tensor, length: int) -> Tensor:
        """Zero some rows."""
        return self._with(values, torch.zeros_like(values[:, :, :1]), keys, length)

    def _with(self, values: Tensor, new: Tensor, keys: Tensor, length: int) -> Tensor:
        outside = [h for h in self.heads or () if h >= values.shape[1]]
        if outside:
            raise SinkscopeError(f"{self}: heads {outside}; the key-value heads are 0 to {values.shape[1] - 1}")
        edited = values.clone()
        heads = list(self.heads) if self.heads is not None else slice(None)
        for index in self._chosen(keys, length).nonzero().flatten().tolist():
            edited[:, heads, index] = new[:, heads, 0]
        return edited


@dataclass(frozen=True)
class MeanValue(ZeroValue):
    """Set the value vectors of keys to the mean over the text's values."""

    def why_not_live(self) -> str:
        """Refuse: the mean needs the whole text."""
        return "the mean over a text is not known before the text is"

    def values(self, layer: int, values: Tensor, keys: Tensor, length: int) -> Tensor:
        """Average over positions."""
        return self._with(values, values.mean(2, keepdim=True), keys, length)
