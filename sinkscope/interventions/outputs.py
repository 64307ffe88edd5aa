"""Edits of what attention gives at a token: scaled, or its deviation from the mean scaled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sinkscope.edit import WHOLE_TEXT
from sinkscope.interventions.base import real_number, resolve
from sinkscope.interventions.keys import _Queries


@dataclass(frozen=True)
class ScaleOutput(_Queries):
    """Multiply what attention gives at some tokens by a factor, before the output projection (whose bias stays).

    Where a norm follows the projection (Gemma 2 and 3), scaling all heads alike is undone by it. `heads` are query heads.
    The control of Li et al. 2026, arXiv 2605.06611: a larger norm alone makes no sink.

    >>> str(ScaleOutput(10, 4))
    'scale_output(positions=[10], factor=4)'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"output"})
    factor: Any

    def __post_init__(self) -> None:
        """Refuse what is no factor."""
        super().__post_init__()
        object.__setattr__(self, "factor", real_number(self.factor, f"{type(self).__name__}(factor=...)"))

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Scale them."""
        edited, heads = outputs.clone(), list(self.heads) if self.heads is not None else slice(None)
        still, wanted = self._still(outputs), set(resolve(self.positions, len(queries)).tolist())
        for at, position in enumerate(queries.tolist()):
            if position in wanted:
                mean = still if isinstance(still, float) else still[:, heads]
                edited[:, heads, at] = mean + self.factor * (outputs[:, heads, at] - mean)
        return edited

    def _still(self, outputs: Tensor) -> Tensor | float:
        """Give what is not scaled."""
        return 0.0


@dataclass(frozen=True)
class AmplifyVariance(ScaleOutput):
    """Multiply the deviation of what attention gives at some tokens from its mean over the text by a factor.

    o becomes mean + factor (o - mean), as if fewer values had been averaged there. Source: Li et al. 2026,
    arXiv 2605.06611.
    """

    def why_not_live(self) -> str:
        """Refuse: the mean needs the whole text."""
        return WHOLE_TEXT

    def _still(self, outputs: Tensor) -> Tensor:
        return outputs.mean(2)
