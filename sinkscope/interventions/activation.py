"""Edits of the residual stream: massive activations set to zero, to their mean, or to any number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.looks import settled
from sinkscope.capture.residuals import one_stream
from sinkscope.edit import Residuals, Where, Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, real_numbers
from sinkscope.interventions.draws import draw
from sinkscope.metrics.mechanism import median
from sinkscope.tokens import whole_number

#: An activation is massive from this magnitude, and from this many times the median magnitude (Sun et al. 2402.17762).
LEAST, RATIO = 100.0, 1000.0
#: What `to` may be beside a number: it is found in each text.
FOUND = ("mean", "noise", "shuffle")
FOUND_WORDS = "'mean', 'noise' or 'shuffle'"
#: Consecutive segments of a text that a mean is taken over, each run on its own, and their tokens.
SEGMENTS, TOKENS = 16, 64


class Massive(NamedTuple):
    """One activation of the residual stream after a layer; `ratio` is to the median magnitude there."""

    layer: int
    position: int
    dim: int
    value: float
    ratio: float


def largest(layer: int, residual: Float[Tensor, "position d_model"], n: int = 8) -> list[Massive]:
    """Give the `n` largest activations after one layer, with their ratio to the median."""
    size = residual.detach().float().abs()
    middle = float(median(size.flatten(), dim=0))
    values, places = size.flatten().topk(min(n, size.numel()))
    width = size.shape[1]
    return [
        Massive(layer, p // width, p % width, float(residual[p // width, p % width]), v / middle if middle else float("inf"))
        for v, p in zip(values.tolist(), places.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class EditActivation(Intervention):
    """Set activations of the residual stream, after some layers, to a number.

    `positions` and `dims` are pairs (one of either stands for all). Without them, the massive ones are located in each
    text: those of at least 100 and `ratio` times the median magnitude, after the first layer that has any.

    `to` is a number, or `"mean"`: over consecutive segments of the text, run one by one, the mean of the largest activation
    in the dimension (Sun et al. 2024, arXiv 2402.17762, section 3.3). `"noise"` draws it from a normal distribution with the
    mean and standard deviation that the dimension has over the text's other tokens, `"shuffle"` takes what it has at another
    token; both by `seed`, of the unedited run, after the first of the layers.

    The placebo of an edit that is located in each text is so too: `decoy` is its seed.

    >>> str(EditActivation(0.0, positions=0, dims=[3, 5], layers=2))
    'edit_activation(to=0.0, layers=[2], positions=[0], dims=[3, 5])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"residual"})
    to: Any = 0.0
    positions: Where = field(default=None, kw_only=True)
    dims: Where = field(default=None, kw_only=True)
    ratio: Any = field(default=RATIO, kw_only=True)
    seed: Whole = field(default=0, kw_only=True)
    #: Of a placebo that is yet to be located: the seed that draws its dimensions.
    decoy: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is neither a number nor a way to find one, and half a place."""
        super().__post_init__()
        object.__setattr__(self, "seed", whole_number(self.seed, f"{type(self).__name__}(seed=...)"))
        if not isinstance(self.to, str):
            object.__setattr__(self, "to", real_numbers(self.to, f"{type(self).__name__}(to=...)"))
        elif self.to not in FOUND:
            raise SinkscopeError(f"{self}: to is a number, one for each place, or {FOUND_WORDS}")
        ratio = real_numbers(self.ratio, f"{type(self).__name__}(ratio=...)")
        if isinstance(ratio, tuple) or not ratio > 1:
            raise SinkscopeError(f"{self}: ratio must be a number above 1")
        object.__setattr__(self, "ratio", ratio)
        numbers = self.to if isinstance(self.to, tuple) else [self.to]
        given = [name for name in ("layers", "positions", "dims") if getattr(self, name) is not None]
        if "positions" in given or "dims" in given:
            if len(given) < 3:
                raise SinkscopeError(f"{self}: give layers, positions and dims, or neither positions nor dims")
            n = len(self._places)
            if {len(self.positions), len(self.dims)} - {1, n} or (len(numbers) not in (1, n) and self.to not in FOUND):
                raise SinkscopeError(f"{self}: positions and dims (and numbers) are pairs: as many of each, or one")
            if min(self.positions) < 0 or min(self.dims) < 0:
                raise SinkscopeError(f"{self}: positions and dims count from 0")

    @property
    def _places(self) -> list[tuple[int, int]]:
        n = max(len(self.positions), len(self.dims))
        places = (tuple(given) * n if len(given) == 1 else tuple(given) for given in (self.positions, self.dims))
        return list(zip(*places, strict=False))

    def check(self, length: int) -> None:
        """Refuse positions outside the text."""
        outside = [p for p in self.positions or () if p >= length]
        if outside:
            raise SinkscopeError(f"{self}: {outside} lies outside the text, whose positions are 0 to {length - 1}")

    def settle(self, ids: Int[Tensor, " position"], residuals: Residuals) -> Intervention:
        """Locate what is not given, in one text.

        Raises:
            SinkscopeError: nothing is massive; says what is largest.
        """
        edit = self
        if edit.dims is None:
            found = [m for layer in residuals(ids, largest) for m in layer if self.edits(m.layer)]
            massive = [m for m in found if abs(m.value) >= LEAST and m.ratio >= self.ratio]
            if not massive:
                top = max(found, key=lambda m: m.ratio)
                raise SinkscopeError(
                    f"{self}: no activation is at least {LEAST:g} and {self.ratio:g} times the median. The largest is "
                    f"{top.value:.4g}, {top.ratio:.0f} times, in dimension {top.dim} of token {top.position} after layer "
                    f"{top.layer}: pass a lower ratio, or layers, positions and dims"
                )
            first = min(m.layer for m in massive)
            places = sorted({(m.position, m.dim) for m in massive if m.layer == first})
            layers = self.layers if self.layers is not None else (first,)
            edit = replace(self, layers=layers, positions=[p for p, _ in places], dims=[d for _, d in places], decoy=None)
            edit = edit if self.decoy is None else edit.placebo(self.decoy)
        if edit.to == "mean":
            return replace(edit, to=edit._mean(ids, residuals))
        return replace(edit, to=edit._drawn(ids, residuals), seed=0) if edit.to in FOUND else edit

    def _mean(self, ids: Tensor, residuals: Residuals) -> tuple[float, ...]:
        """Average the largest activation in each dimension over segments of a text."""
        size, dims = min(TOKENS, max(1, len(ids) // 2)), [dim for _, dim in self._places]

        def look(layer: int, residual: Tensor) -> Tensor:
            after = residual[:, dims].float()
            return after.gather(0, after.abs().argmax(0, keepdim=True))[0]

        segments = [s for s in torch.split(ids, size)[:SEGMENTS] if len(s) == size]
        return tuple(torch.stack([residuals(s, look)[self.layers[0]] for s in segments]).mean(0).tolist())

    def _drawn(self, ids: Tensor, residuals: Residuals) -> tuple[float, ...]:
        """Draw what each place gets from what its dimension has at the tokens that are not edited there."""
        after = residuals(ids, lambda layer, residual: residual[:, [d for _, d in self._places]].double().cpu())[
            self.layers[0]
        ]
        numbers = []
        for place, (position, dim) in enumerate(self._places):
            edited = [p for p, d in self._places if d == dim]
            others = [p for p in range(len(ids)) if p not in edited]
            if len(others) < 2:
                raise SinkscopeError(f"{self}: too few other tokens to draw dimension {dim} from")
            values, random = after[others, place], draw(self.to, self.seed, position, dim)
            spread = float(values.std(correction=0))
            drawn = float(values.mean()) + random.gauss() * spread if self.to == "noise" else random.choice(values.tolist())
            numbers.append(drawn)
        return tuple(numbers)

    def placebo(self, seed: SupportsIndex = 0) -> EditActivation:
        """Set as many activations in other dimensions of the same tokens, which are not massive."""
        if self.dims is None:
            return replace(self, decoy=whole_number(seed, "seed"))
        others = [d for d in range(max(self.dims)) if d not in self.dims]
        if len(others) < len(self.dims):
            raise SinkscopeError(f"{self}: too few other dimensions below {max(self.dims)} for a placebo")
        return replace(self, dims=random.Random(whole_number(seed, "seed")).sample(others, len(self.dims)))

    def why_not_live(self) -> str | None:
        """Refuse what is not located."""
        located = self.dims is not None and self.to not in FOUND
        return None if located else "it is not located: take edit.located(model, text)"

    def located(self, model: Any, text: Any, side: str | None = None) -> Intervention:
        """Give the concrete edit: what is not given is located in one text, as :func:`sinkscope.evaluate` would."""
        found: Intervention = settled(model, text, self, side)
        return found

    def residual(self, layer: int, residual: Tensor, positions: Tensor) -> Tensor:
        """Set them."""
        if self.dims is None or self.to in FOUND:
            raise SinkscopeError(f"{self} is not located: take edit.located(model, text)")
        one_stream(layer, residual)
        if max(self.dims) >= residual.shape[-1]:
            raise SinkscopeError(f"{self}: the residual stream has dimensions 0 to {residual.shape[-1] - 1}")
        edited = residual.clone()
        numbers = self.to if isinstance(self.to, tuple) else (self.to,) * len(self._places)
        for (position, dim), number in zip(self._places, numbers, strict=True):
            edited[:, (positions == position).nonzero().flatten(), dim] = float(number)
        return edited
