"""Output gates: where a layer says how much of what its heads give is let through to the output projection.

In Qwen3-Next, Qwen3.5 and their like a head's gate stands behind its queries, in a projection twice as wide; elsewhere
(AFM, HRM, Laguna, HY-V4, ...) it is a projection of its own, with a number for each number of a head or one for the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

#: How the types of models begin whose gates stand behind the queries.
BEHIND = ("qwen3_next", "qwen3_5", "qwen4_exp")
#: What a projection of gates is called, in a module that has an output projection too.
NAMES = ("q_gate_proj", "gate_proj", "g_proj")
#: How the types of models begin whose gate is a softplus, 0 (closed) and up; it is a sigmoid, 0 to 1, in all others.
SOFTPLUS = ("laguna",)


@dataclass(frozen=True, eq=False)
class Gate:
    """The gate of a layer: `projection` gives it, behind other numbers of a head where there are any.

    Of a stack that is run several times in a pass (HRM's), it is that of several `layers`, in the order of its calls.
    """

    projection: nn.Module
    attention: Any
    heads: int
    soft: bool
    layers: tuple[int, ...]

    def read(self, given: Float[Tensor, "batch position width"]) -> Float[Tensor, "batch position head d_gate"]:
        """Give what a head's output is multiplied by, of what the projection gave; `d_gate` is `d_head`, or 1."""
        size = getattr(self.attention, "v_head_dim", None) or self.attention.head_dim
        gate = given.detach().reshape(*given.shape[:-1], self.heads, -1)[..., -size:].float()
        bias = getattr(self.attention, "gate_bias", None)  # of a head (Beam's)
        gate = gate if bias is None else gate + bias.detach().float()[:, None]
        return functional.softplus(gate) if self.soft else torch.sigmoid(gate)


def find_gates(network: nn.Module, config: Any, heads: Mapping[int, int]) -> list[Gate]:
    """Find the gates of those layers that attend, each with its number of heads; none where outputs are not gated."""
    kind = str(config.model_type)
    names = (*NAMES, "q_proj") if kind.startswith(BEHIND) else NAMES
    found: dict[int, Gate] = {}
    for place, module in network.named_modules():
        says = getattr(module, "layer_idx", None)
        own = (getattr(module, name, None) for name in names)
        projection = next((gate for gate in own if isinstance(gate, nn.Module)), None)
        if says is None or projection is None or not hasattr(module, "o_proj"):
            continue
        runs = tuple(layer for layer in _runs(config, place, int(says)) if layer in heads)
        if runs:
            found[id(projection)] = Gate(projection, module, heads[runs[0]], kind.startswith(SOFTPLUS), runs)
    return list(found.values())


def _runs(config: Any, place: str, says: int) -> tuple[int, ...]:
    """Tell as which layers a module is run: HRM's low stack `L_cycles` times, then its high one, and all of it again."""
    stack = getattr(config, "num_layers_per_stack", None)
    if not stack:
        return (says,)
    high = "H_module" in place.split(".")
    times = range(config.num_hidden_layers // stack)
    return tuple(time * stack + says for time in times if high == (time % (config.L_cycles + 1) == config.L_cycles))
