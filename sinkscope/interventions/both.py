"""Both: two edits as one, the first before the second."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.edit import Edit, Residuals
from sinkscope.errors import SinkscopeError


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

    @property
    def borrows(self) -> bool:  # type: ignore[override]
        """Whether one of them does."""
        return bool(self.first.borrows or self.second.borrows)

    def check(self, length: int) -> None:
        """Check both."""
        self.first.check(length)
        self.second.check(length)

    def check_model(self, heads: Mapping[int, int]) -> None:
        """Check both."""
        self.first.check_model(heads)
        self.second.check_model(heads)

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

    def biases(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Add up both."""
        found = [b for part in self._here(layer) if (b := part.biases(layer, keys, heads, length)) is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] + found[1]

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Edit what the first gives."""
        for part in self._here(layer):
            values = part.values(layer, values, keys, heads, length)
        return values

    def held(self, layer: int, what: str, states: Tensor, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """Ask the one that holds copies."""
        found = [h for part in self._here(layer) if (h := part.held(layer, what, states, keys)) is not None]
        if len(found) > 1:
            raise SinkscopeError(f"a layer has one cache, and {self} says twice what it holds: name layers for each")
        return found[0] if found else None

    def unrotated(self, layer: int) -> bool:
        """Ask both."""
        return any(part.unrotated(layer) for part in self._here(layer))

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Edit what the first gives."""
        for part in self._here(layer):
            outputs = part.outputs(layer, outputs, queries)
        return outputs

    def mlp(self, layer: int, activations: Tensor) -> Tensor:
        """Edit what the first gives."""
        for part in self._here(layer):
            activations = part.mlp(layer, activations)
        return activations

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
