"""Edits of the input: tokens left out, or swapped for another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, SupportsIndex

import torch
from torch import Tensor

from sinkscope.edit import FROM_THE_END, OTHER_INPUT, Where, Whole
from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, inside, resolve
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class DropTokens(Intervention):
    """Leave tokens out of the input; the others move up.

    >>> str(DropTokens([0]))
    'drop_tokens(positions=[0])'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"input"})
    positions: Where = (0,)

    def __post_init__(self) -> None:
        """Refuse layers: the input has none."""
        super().__post_init__()
        _no_layers(self)

    def check(self, length: int) -> None:
        """Refuse positions outside the text."""
        inside(self.positions, length, self)
        if length - len(set(resolve(self.positions, length).tolist())) < 2:
            raise SinkscopeError(f"{self} leaves fewer than 2 of {length} tokens")

    def why_not_live(self) -> str:
        """Refuse: the tokens that are left have other positions."""
        return OTHER_INPUT

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Leave as many later tokens out."""
        first = 8 + whole_number(seed, "seed") % 24
        return DropTokens(tuple(range(first, first + len(self.positions))))

    def input(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Leave them out."""
        kept = torch.arange(len(ids))
        kept = kept[~torch.isin(kept, resolve(self.positions, len(ids)))]
        return ids[kept], kept


@dataclass(frozen=True)
class ReplaceToken(Intervention):
    """Swap the token at a position for another, given by its id. The new token's own prediction is not scored.

    >>> str(ReplaceToken(0, 198))
    'replace_token(position=0, token=198)'
    """

    touches: ClassVar[frozenset[str]] = frozenset({"input"})
    position: Whole = 0
    token: Whole = 0

    def __post_init__(self) -> None:
        """Refuse what is not a position and an id."""
        super().__post_init__()
        _no_layers(self)
        for name in ("position", "token"):
            number = whole_number(getattr(self, name), f"{self}: {name}", "a whole number: a position, a token's id")
            object.__setattr__(self, name, number)
        if self.token < 0:
            raise SinkscopeError(f"{self}: a token's id is not negative")

    def check(self, length: int) -> None:
        """Refuse a position outside the text."""
        inside([self.position], length, self)

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Swap a later token."""
        return replace(self, position=8 + whole_number(seed, "seed") % 24)

    def why_not_live(self) -> str | None:
        """Refuse a position that counts from the end."""
        return FROM_THE_END if self.position < 0 else None

    def swaps(self) -> tuple[tuple[int, int], ...]:
        """Swap it."""
        return ((self.position, self.token),)

    def input(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Swap it."""
        ids = ids.clone()
        ids[self.position] = self.token
        return ids, torch.arange(len(ids))


def _no_layers(edit: Intervention) -> None:
    if edit.layers is not None:
        raise SinkscopeError(f"{edit}: it edits the input, which has no layers")
