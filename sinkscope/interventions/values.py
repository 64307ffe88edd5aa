"""Edits of the values of keys: taken away, or replaced by others, which is the fairer control."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.edit import WHOLE_TEXT, Residuals, Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, one_of, resolve
from sinkscope.interventions.draws import draw, like
from sinkscope.interventions.keys import _Keys
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class _Values(_Keys):
    """Replaces the values of keys; of some query heads alone, those that share the values keep them."""

    touches: ClassVar[frozenset[str]] = frozenset({"values"})

    def _new(self, layer: int, values: Tensor, keys: Tensor, index: list[int]) -> Float[Tensor, "batch kv_head new d_head"]:
        """Give the new values of the keys at these indices."""
        raise NotImplementedError

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Replace them."""
        index = self._chosen(keys, length).nonzero().flatten().tolist()
        if not index:
            return values
        new, sharing = self._new(layer, values, keys, index), heads // values.shape[1]
        edited = torch.zeros(heads, dtype=torch.bool)
        edited[list(self.heads) if self.heads is not None else slice(None)] = True
        groups = edited.view(-1, sharing)
        if bool((groups.any(1) == groups.all(1)).all()):
            edited, sharing = groups.any(1), 1
        values, new = (x.repeat_interleave(sharing, 1) if sharing > 1 else x for x in (values, new))
        values, which = values.clone(), edited.nonzero().flatten().to(values.device)
        for place, at in enumerate(index):
            values[:, which, at] = new[:, which, place].to(values.dtype)
        return values


@dataclass(frozen=True)
class ZeroValue(_Values):
    """Set the value vectors of keys to zero: the same as :class:`ZeroAttention`."""

    def _new(self, layer: int, values: Tensor, keys: Tensor, index: list[int]) -> Tensor:
        return torch.zeros_like(values[:, :, index])


@dataclass(frozen=True)
class MeanValue(_Values):
    """Set the value vectors of keys to the mean over the text's values."""

    def why_not_live(self) -> str:
        """Refuse: the mean needs the whole text."""
        return WHOLE_TEXT

    def _new(self, layer: int, values: Tensor, keys: Tensor, index: list[int]) -> Tensor:
        return values.mean(2, keepdim=True).expand(-1, -1, len(index), -1)


@dataclass(frozen=True)
class ReplaceValue(_Values):
    """Replace the value vectors of keys by others.

    `by` says what: `"zero"` and `"mean"` are :class:`ZeroValue` and :class:`MeanValue`; `"noise"` draws normal vectors with
    the mean (over dimensions) and the norm of those that they replace; `"shuffle"` takes those of other keys of the text, the
    same ones in every layer; `"donor"` takes those at the same positions of the next text of the call (the last one's next is
    the first), as they are in the unedited run. `seed` draws noise and keys; it is the same on every engine and device.

    Zeroing overstates what a part does: see arXiv 2604.14433.

    >>> str(ReplaceValue(0, by="noise", seed=3))
    "replace_value(keys=[0], by='noise', seed=3)"
    """

    by: str = "mean"
    seed: Whole = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no way to replace a value."""
        super().__post_init__()
        one_of(self.by, ("zero", "mean", "noise", "shuffle", "donor"), f"{type(self).__name__}(by=...)")
        object.__setattr__(self, "seed", whole_number(self.seed, f"{type(self).__name__}(seed=...)"))

    @property
    def borrows(self) -> bool:  # type: ignore[override]
        """Whether it takes another text's values."""
        return self.by == "donor"

    def check(self, length: int) -> None:
        """Refuse keys outside the text, and too many to take others' values."""
        super().check(length)
        if self.by == "shuffle" and 2 * len(set(resolve(self.keys, length).tolist())) > length:
            raise SinkscopeError(f"{self}: the text's {length} tokens leave too few other keys to take values from")

    def why_not_live(self) -> str | None:
        """Refuse what needs the whole text, or another one."""
        if self.by == "donor":
            return "there is no other text to take values from: evaluate several"
        return WHOLE_TEXT if self.by in ("mean", "shuffle") else super().why_not_live()

    def settle(self, ids: Int[Tensor, " position"], residuals: Residuals) -> Intervention:
        """Look at the donor's values.

        Raises:
            SinkscopeError: it is the only text, or the next one is too short.
        """
        if self.by != "donor":
            return self
        label, others = residuals.donor()
        at = resolve(self.keys, len(ids)).tolist()
        if max(at) >= len(others):
            raise SinkscopeError(f"{self}: {label!r}, which it takes values from, has {len(others)} tokens")
        gifts = residuals.values(others, at)
        return _Donated(tuple(at), heads=self.heads, layers=self.layers, donor=label, gifts=gifts)

    def _new(self, layer: int, values: Tensor, keys: Tensor, index: list[int]) -> Tensor:
        if self.by == "zero":
            return torch.zeros_like(values[:, :, index])
        if self.by == "mean":
            return values.mean(2, keepdim=True).expand(-1, -1, len(index), -1)
        if self.by == "noise":
            drawn = [like(values[:, :, i], "value", self.seed, layer, int(keys[i])) for i in index]
            return torch.stack(drawn, 2)
        if self.by == "donor":
            raise SinkscopeError(f"{self} takes values from another text of the call: evaluate several")
        others = [i for i in range(len(keys)) if i not in index]
        return values[:, :, draw("shuffle", self.seed).sample(others, len(index))]


@dataclass(frozen=True)
class _Donated(_Values):
    """Values of another text, looked at beforehand."""

    donor: str = field(default="", kw_only=True)
    gifts: dict[int, Tensor] = field(default_factory=dict, kw_only=True, repr=False, compare=False)

    def __str__(self) -> str:
        """Say where they are from."""
        some = "" if self.heads is None else f", heads={list(self.heads)}"
        return f"replace_value(keys={list(self.keys)}, by='donor'{some}) of {self.donor!r}"

    def _new(self, layer: int, values: Tensor, keys: Tensor, index: list[int]) -> Tensor:
        gifts = self.gifts[layer][:, [self.keys.index(int(keys[i])) for i in index]]
        return gifts.to(values.device)[None].expand(len(values), -1, -1, -1)
