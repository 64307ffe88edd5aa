"""Edits of the neurons of an MLP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, SupportsIndex

import torch
from torch import Tensor

from sinkscope.edit import Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, whole_numbers
from sinkscope.interventions.draws import draw
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class ZeroNeuron(Intervention):
    """Set neurons of one layer's MLP to zero at every token: what its last matrix takes (of a gated MLP, the product).

    `decoy` makes it a placebo: as many other neurons of the layer, drawn by this seed. Sink neurons: Yona et al.,
    arXiv 2503.08908; register neurons: arXiv 2506.08010.

    >>> str(ZeroNeuron(1, [7890, 10411]))
    'zero_neuron(layer=1, neurons=[7890, 10411])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"neurons"})
    layer: Whole
    neurons: Any
    decoy: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what are no neurons of one layer."""
        super().__post_init__()
        if self.layers is not None:
            raise SinkscopeError(f"{self}: its layer stands first; other layers have other neurons")
        object.__setattr__(self, "layer", whole_number(self.layer, f"{type(self).__name__}(layer=...)"))
        object.__setattr__(self, "neurons", whole_numbers(self.neurons, f"{type(self).__name__}(neurons=...)"))
        if min(self.neurons) < 0:
            raise SinkscopeError(f"{self}: neurons count from 0")

    def check_model(self, heads: Mapping[int, int]) -> None:
        """Refuse a layer that a model has not."""
        if self.layer not in heads:
            raise SinkscopeError(f"{self}: layer {self.layer}; those with attention are {min(heads)} to {max(heads)}")

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Edit as many other neurons of the same layer."""
        return replace(self, decoy=whole_number(seed, "seed"))

    def edits(self, layer: int) -> bool:
        """Tell whether it is this layer."""
        return bool(layer == self.layer)

    def mlp(self, layer: int, activations: Tensor) -> Tensor:
        """Zero them.

        Raises:
            SinkscopeError: there are no such neurons, or too few others.
        """
        n, which = activations.shape[-1], list(self.neurons)
        if max(which) >= n:
            raise SinkscopeError(f"{self}: layer {layer} has neurons 0 to {n - 1}")
        if self.decoy is not None:
            others = sorted(set(range(n)) - set(which))
            if len(others) < len(set(which)):
                raise SinkscopeError(f"{self}: {n} neurons leave too few others to draw {len(set(which))} from")
            which = draw("neurons", self.decoy).sample(others, len(set(which)))
        return activations.index_fill(-1, torch.tensor(which, device=activations.device), 0)
