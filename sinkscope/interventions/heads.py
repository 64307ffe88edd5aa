"""Edits of whole heads: what they give, before the output projection, taken away or averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor

from sinkscope.edit import WHOLE_TEXT, Where
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention
from sinkscope.interventions.draws import draw
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class _Heads(Intervention):
    """Edits of what heads give; `heads` are query heads, None for all.

    `decoy` makes it a placebo: as many other heads of each layer, drawn by this seed.
    """

    touches: ClassVar[frozenset[str]] = frozenset({"output"})
    heads: Where = field(default=None, kw_only=True)
    decoy: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a placebo of all heads."""
        super().__post_init__()
        if self.decoy is not None:
            object.__setattr__(self, "decoy", whole_number(self.decoy, f"{type(self).__name__}(decoy=...)"))
            if self.heads is None:
                raise SinkscopeError(f"{self} edits all heads, and there are no others: name heads")

    def named_heads(self) -> tuple[int, ...]:
        """Give them."""
        return self.heads or ()

    def check_model(self, heads: Mapping[int, int]) -> None:
        """Refuse heads that a model has not, and a placebo where too few others are left."""
        super().check_model(heads)
        least = min((n for layer, n in heads.items() if self.edits(layer)), default=0)
        if self.decoy is not None and 2 * len(set(self.heads)) > least:
            raise SinkscopeError(f"{self}: {least} heads leave too few others to draw {len(set(self.heads))} from")

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Edit as many other heads of the same layers."""
        return replace(self, decoy=whole_number(seed, "seed"))

    def chosen(self, layer: int, n: int) -> list[int]:
        """Give the heads that are edited in a layer of `n` heads."""
        if self.heads is None:
            return list(range(n))
        if self.decoy is None:
            return list(self.heads)
        others = [head for head in range(n) if head not in self.heads]
        return sorted(draw("heads", self.decoy, layer).sample(others, len(set(self.heads))))


@dataclass(frozen=True)
class ZeroHead(_Heads):
    """Set what heads give to zero, before the output projection.

    >>> str(ZeroHead(heads=[3], layers=[1]))
    'zero_head(layers=[1], heads=[3])'
    """

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Zero them."""
        return outputs.index_fill(1, torch.tensor(self.chosen(layer, outputs.shape[1]), device=outputs.device), 0)


@dataclass(frozen=True)
class MeanHead(_Heads):
    """Set what heads give to its mean over the text's positions, before the output projection."""

    def why_not_live(self) -> str:
        """Refuse: the mean needs the whole text."""
        return WHOLE_TEXT

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Average them."""
        edited, which = outputs.clone(), self.chosen(layer, outputs.shape[1])
        edited[:, which] = outputs[:, which].mean(2, keepdim=True)
        return edited
