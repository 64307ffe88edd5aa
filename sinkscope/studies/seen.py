"""What happens inside attention under an edit, seen in the pass that `evaluate` makes anyway.

A column of ones is put beside the values of every key that is watched: what attention gives there is the weight on the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkscope.capture.edited import InsideCapture
from sinkscope.capture.plans import plan
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.interventions.both import Both
from sinkscope.models import Adapter
from sinkscope.tokens import Tokens

#: (layer, weights on the watched keys, heads' outputs, values) of one text -> what is kept.
Look = Callable[
    [int, Float[Tensor, "head query watched"], Float[Tensor, "head query d_value"], Float[Tensor, "kv_head key d_value"]], Any
]


#: What output projections are called in Hugging Face's attention modules.
PROJECTIONS = {"o_proj", "out_proj", "c_proj", "dense", "o", "wo", "proj"}


def _weights(layer: int, weights: Tensor, outputs: Tensor, values: Tensor) -> Tensor:
    return weights


@dataclass(frozen=True, eq=False)
class _Seen(Both, Intervention):
    """An edit under another name, and what `look` gives in every layer."""

    name: str = ""
    keys: tuple[int, ...] = ()
    look: Look = _weights
    taken: list[Any] = field(default_factory=list)
    stash: dict[int, Tensor] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        return self.first.touches | {"values", "output"}  # type: ignore[no-any-return]

    def settle(self, ids: Tensor, residuals: Any) -> Intervention:
        return replace(self, first=self.first.settle(ids, residuals))

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        values = super().values(layer, values, keys, heads, length)
        self.stash[layer] = values[0].detach()
        marks = (keys[:, None] == torch.tensor(self.keys)).to(values.device, values.dtype)
        return torch.cat([values, marks.expand(*values.shape[:2], -1, -1)], -1)

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        outputs, weights = outputs[..., : -len(self.keys)], outputs[..., -len(self.keys) :]
        outputs = super().outputs(layer, outputs, queries)
        sharing = outputs.shape[1] // self.stash[layer].shape[0]
        values = self.stash.pop(layer).repeat_interleave(sharing, 0)
        self.taken.append(self.look(layer, weights[0].detach(), outputs[0].detach(), values))
        return outputs


class Seen:
    """A run of `evaluate` that is looked at: give it `.edit`, and ask for `.found` afterwards.

    Args:
        edit: what is edited; None for nothing.
        keys: the keys whose weights are watched.
        look: what is kept of a layer; None: the weights.
        name: what the edit is called in the report; None for its text form.
    """

    def __init__(
        self, edit: Intervention | None, keys: Sequence[int] = (0,), look: Look | None = None, name: str | None = None
    ) -> None:
        made = Intervention() if edit is None else edit
        how = {"name": str(made) if name is None else name, "keys": tuple(keys), "look": look or _weights}
        self.edit = _Seen(first=made, second=Intervention(), **how)  # type: ignore[arg-type]

    def found(self, n_layers: int) -> list[list[Any]]:
        """Give what was kept, `[text][layer with attention]`."""
        taken = self.edit.taken
        return [taken[start : start + n_layers] for start in range(0, len(taken), n_layers)]


@dataclass(frozen=True, eq=False)
class Within(Intervention, written=False):
    """An edit in some heads of each layer: one edit where a chain would have a part for every layer.

    Attributes:
        inner: the edit, of all heads and layers.
        places: layer -> heads.
        name: what it is called in the report.
    """

    inner: Any = None
    places: Mapping[int, Sequence[int]] = field(default_factory=dict)
    name: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """What the edit does."""
        return frozenset(self.inner.touches)

    @property
    def borrows(self) -> bool:  # type: ignore[override]
        """Ask the edit."""
        return bool(self.inner.borrows)

    def check(self, length: int) -> None:
        """Ask the edit."""
        self.inner.check(length)

    def why_not_live(self) -> str | None:
        """Ask the edit."""
        why: str | None = self.inner.why_not_live()
        return why

    def settle(self, ids: Tensor, residuals: Any) -> Intervention:
        """Settle the edit."""
        return replace(self, inner=self.inner.settle(ids, residuals))

    def edits(self, layer: int) -> bool:
        """Tell whether heads of this layer are edited."""
        return layer in self.places

    def _here(self, layer: int) -> Any:
        return replace(self.inner, heads=tuple(self.places[layer]))

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Hide in these heads."""
        hidden: Tensor | None = self._here(layer).hides(layer, queries, keys, heads, length)
        return hidden

    def biases(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Bias in these heads."""
        added: Tensor | None = self._here(layer).biases(layer, keys, heads, length)
        return added

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Edit the values that these heads see."""
        edited: Tensor = self._here(layer).values(layer, values, keys, heads, length)
        return edited

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Edit what these heads give."""
        edited: Tensor = self._here(layer).outputs(layer, outputs, queries)
        return edited


def check_inside(adapter: Adapter, sample: Tokens) -> None:
    """Refuse a model whose attention can't be looked at under an edit, or whose heads are no grid.

    Raises:
        SinkscopeError: names the model.
    """
    if adapter.uneven:
        raise SinkscopeError(
            f"the layers of {adapter.name} have unequal numbers of heads, which this study does not take: ss.measure, "
            "ss.evaluate and ss.sweep do"
        )
    if not isinstance(plan(adapter, sample, [Intervention()]), InsideCapture):
        raise SinkscopeError(f"{adapter.name} does not ask Hugging Face's attention interface: nothing is seen under an edit")


def projection(adapter: Adapter, layer: int) -> Callable[[Tensor], Tensor]:
    """Give what turns heads' vectors, `[head, position, d_value]`, into what each writes, `[head, position, d_model]`.

    The matrix is that of the layer's attention which is called as output projections are; its bias belongs to no head.

    Raises:
        SinkscopeError: there is none.
    """
    found: list[nn.Module] = []
    for name, module in adapter.blocks[layer].named_modules():
        own, path = vars(module), set(name.split("."))
        attends = "attn" in name or "attention" in name
        if attends and path & PROJECTIONS and own.get("out_features", own.get("nf")) == adapter.width:
            found.append(module)
    if not found:
        raise SinkscopeError(f"the output projection of layer {layer} of {adapter.name} was not found")

    @torch.no_grad()
    def project(vectors: Tensor) -> Tensor:
        heads, n, d = vectors.shape
        alone = torch.einsum("hnd,hg->hngd", vectors, torch.eye(heads, device=vectors.device, dtype=vectors.dtype))
        flat = alone.reshape(heads, n, heads * d).contiguous()
        written: Tensor = found[-1](flat) - found[-1](flat.new_zeros(1, 1, heads * d))
        return written

    return project
