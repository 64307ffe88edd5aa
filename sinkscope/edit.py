"""Edit: all that an engine asks of an intervention. Every answer is "nothing" by default.

Beside :mod:`sinkscope.block` this is the other contract of the library: engines know edits and no intervention, and an
intervention is an edit with a text form. Positions are those of the text, ascending; `edits(layer)` has been asked before
anything that takes a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError

#: One whole number or several, or None for all of them; kept as a tuple.
Where = Any
#: A whole number of any type; kept as an int.
Whole = Any
#: Runs some ids, has a function look at `(layer, residual stream after it)`, and gives what it saw, layer by layer.
Residuals = Callable[[Int[Tensor, " position"], Callable[[int, Float[Tensor, "position d_model"]], Any]], list[Any]]


@dataclass(frozen=True)
class Edit:
    """One edit to the forward pass; `layers` are the layers that are edited, None for all."""

    layers: Where = field(default=None, kw_only=True)

    #: Whether it says which keys a cache still holds; one edit of that kind at most makes sense.
    is_window: ClassVar[bool] = False
    #: What it edits: "input", "scores", "pattern", "values" or "residual". A model may discard some.
    touches: ClassVar[frozenset[str]] = frozenset()

    def parts(self) -> tuple[Edit, ...]:
        """Give the edits that this one is composed of."""
        return (self,)

    # Before anything runs.

    def check(self, length: int) -> None:
        """Refuse what a text of this length can't have.

        Raises:
            SinkscopeError: names the range.
        """

    def check_model(self, layers: Sequence[int], n_heads: int) -> None:
        """Refuse layers and heads that a model has not: `layers` are those with attention.

        Raises:
            SinkscopeError: names those there are.
        """
        for part in self.parts():
            outside = [layer for layer in part.layers or () if layer not in layers]
            if outside:
                raise SinkscopeError(f"{part}: layers {outside}; those with attention are {layers[0]} to {layers[-1]}")
            heads = [h for h in part.named_heads() if not 0 <= h < n_heads]
            if heads:
                raise SinkscopeError(f"{part}: heads {heads}; the heads are 0 to {n_heads - 1}")

    def named_heads(self) -> tuple[int, ...]:
        """Give the heads that it names; none where it edits all."""
        return ()

    def why_not_live(self) -> str | None:
        """Say what must be known of a whole text beforehand, so that nobody's running code can be edited so; or None."""
        return None

    def settle(self, ids: Int[Tensor, " position"], residuals: Residuals) -> Edit:
        """Give the concrete edit for one text; `residuals(ids, look)` looks at its residual stream after each layer."""
        return self

    # The input.

    def input(self, ids: Int[Tensor, " position"]) -> tuple[Int[Tensor, " position"], Int[Tensor, " position"]]:
        """Give the ids to run, and for each the position that it had in the text."""
        return ids, torch.arange(len(ids))

    def swaps(self) -> tuple[tuple[int, int], ...]:
        """Give (position, token id) of tokens that are swapped on their way in, whatever the rest of the text."""
        return ()

    def rerun(self) -> int | None:
        """Give how many tokens the model is run on anew for every token, or None for one pass over all."""
        return None

    # Attention.

    def edits(self, layer: int) -> bool:
        """Tell whether this layer is edited."""
        return self.layers is None or layer in self.layers

    def reach(self, layer: int, start: int, stop: int) -> Int[Tensor, " key"]:
        """Give every key that queries `start` to `stop` may see, ascending; the others are not even looked at."""
        return torch.arange(stop)

    def hides(
        self, layer: int, queries: Int[Tensor, "query 1"], keys: Int[Tensor, "1 key"], heads: int, length: int
    ) -> Bool[Tensor, "*head query key"] | None:
        """Tell which keys are hidden before softmax; the library lets a query always see itself."""
        return None

    def zeroes(self, layer: int, keys: Int[Tensor, " key"], heads: int, length: int) -> Bool[Tensor, "head 1 key"] | None:
        """Tell which weights become zero after softmax."""
        return None

    def values(
        self, layer: int, values: Float[Tensor, "batch kv_head key d_head"], keys: Int[Tensor, " key"], length: int
    ) -> Tensor:
        """Give the values to use, for keys at these positions of a text of this length."""
        return values

    def cache(self, layer: int) -> tuple[int, int] | None:
        """Give (size, sinks) where positions are those inside a cache of that size, else None."""
        return None

    def evicts(self) -> int | None:
        """Give the size of a plain window in every layer, which never looks back at what it has evicted, else None."""
        return None

    # Between layers.

    def residual(
        self, layer: int, residual: Float[Tensor, "batch position d_model"], positions: Int[Tensor, " position"]
    ) -> Tensor:
        """Give the residual stream to use after a layer."""
        return residual


@dataclass(frozen=True)
class Both(Edit):
    """Two edits, the first before the second."""

    first: Any = None
    second: Any = None

    def __post_init__(self) -> None:
        """Refuse two windows."""
        if self.first.is_window and self.second.is_window:
            raise SinkscopeError(f"two windows can't be composed: {self}")

    def __str__(self) -> str:
        """Give both text forms."""
        return f"{self.first} & {self.second}"

    @property
    def is_window(self) -> bool:  # type: ignore[override]
        """Whether one of them is a window."""
        return bool(self.first.is_window or self.second.is_window)

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """What either touches."""
        return frozenset(self.first.touches | self.second.touches)

    def parts(self) -> tuple[Edit, ...]:
        """Give those of both."""
        return (*self.first.parts(), *self.second.parts())

    def check(self, length: int) -> None:
        """Check both."""
        self.first.check(length)
        self.second.check(length)

    def why_not_live(self) -> str | None:
        """Ask both."""
        return next((why for part in (self.first, self.second) if (why := part.why_not_live()) is not None), None)

    def settle(self, ids: Tensor, residuals: Residuals) -> Edit:
        """Settle both."""
        return type(self)(first=self.first.settle(ids, residuals), second=self.second.settle(ids, residuals))

    def input(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Edit what the first gives."""
        ids, first = self.first.input(ids)
        ids, second = self.second.input(ids)
        return ids, first[second]

    def swaps(self) -> tuple[tuple[int, int], ...]:
        """Give those of both."""
        return (*self.first.swaps(), *self.second.swaps())

    def rerun(self) -> int | None:
        """Ask both."""
        return next((n for part in (self.first, self.second) if (n := part.rerun()) is not None), None)

    def edits(self, layer: int) -> bool:
        """Tell whether either edits the layer."""
        return bool(self._here(layer))

    def _here(self, layer: int) -> list[Edit]:
        return [part for part in (self.first, self.second) if part.edits(layer)]

    def reach(self, layer: int, start: int, stop: int) -> Tensor:
        """Give what both reach."""
        first, *others = (part.reach(layer, start, stop) for part in self._here(layer))
        return first[torch.isin(first, others[0])] if others else first

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Hide what either hides."""
        return _either(part.hides(layer, queries, keys, heads, length) for part in self._here(layer))

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Zero what either zeroes."""
        return _either(part.zeroes(layer, keys, heads, length) for part in self._here(layer))

    def values(self, layer: int, values: Tensor, keys: Tensor, length: int) -> Tensor:
        """Edit what the first gives."""
        for part in self._here(layer):
            values = part.values(layer, values, keys, length)
        return values

    def cache(self, layer: int) -> tuple[int, int] | None:
        """Ask both."""
        return next((c for part in self._here(layer) if (c := part.cache(layer)) is not None), None)

    def evicts(self) -> int | None:
        """Ask both."""
        return next((n for part in (self.first, self.second) if (n := part.evicts()) is not None), None)

    def residual(self, layer: int, residual: Tensor, positions: Tensor) -> Tensor:
        """Edit what the first gives."""
        for part in self._here(layer):
            residual = part.residual(layer, residual, positions)
        return residual


def _either(answers: Any) -> Tensor | None:
    found = [answer for answer in answers if answer is not None]
    return None if not found else found[0] if len(found) == 1 else found[0] | found[1]


#: No edit at all.
NOTHING = Edit()
