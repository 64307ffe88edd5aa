"""Places: where one edit can be made, head by head, layer by layer or position by position, and the edit there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import reduce
from operator import and_
from typing import Any, NamedTuple

from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention
from sinkscope.interventions.heads import MeanHead, ZeroHead
from sinkscope.tokens import whole_number

#: What an edit can be swept over -> what it must take for that.
OVER = {"heads": ("heads",), "layers": ("layers",), "positions": ("keys", "positions", "position")}


class Place(NamedTuple):
    """One place; what a sweep does not go over is None."""

    layer: int | None = None
    head: int | None = None
    position: int | None = None


def places(edit: Intervention, over: str, heads: Mapping[int, int], positions: Sequence[int]) -> list[Place]:
    """Give every place of a sweep in order; layers and heads that the edit names bound it.

    Args:
        edit: what is done at each.
        over: `"heads"`, `"layers"` or `"positions"`.
        heads: how many each layer with attention has.
        positions: those to go over.
    """
    if over == "positions":
        return [Place(position=position) for position in positions]
    named = [layer for layer in heads if edit.edits(layer)]
    if over == "layers":
        return [Place(layer=layer) for layer in named]
    return [Place(layer=layer, head=head) for layer in named for head in edit.named_heads() or range(heads[layer])]


def at(edit: Intervention, place: Place) -> Intervention:
    """Give the edit at one place, every part of it.

    Raises:
        SinkscopeError: a part does not take what the sweep goes over.

    >>> from sinkscope.interventions import parse
    >>> str(at(parse("zero_value(keys=[0])"), Place(layer=3, head=1)))
    'zero_value(keys=[0], layers=[3], heads=[1])'
    """
    parts: list[Intervention] = [_at(part, place) for part in edit.parts()]
    return reduce(and_, parts)


def _at(part: Any, place: Place) -> Any:
    over = "positions" if place.position is not None else "layers" if place.head is None else "heads"
    takes = {f.name for f in fields(part)}
    name = next((name for name in OVER[over] if name in takes), None)
    if name is None:
        several = " or ".join(f"{name}=" for name in OVER[over])
        can = " or ".join(repr(other) for other, names in OVER.items() if takes & set(names))
        raise SinkscopeError(f"{part} takes no {several}, so it can't be swept over {over}; over={can or 'nothing'} can")
    if over == "positions":
        return replace(part, **{name: place.position if name == "position" else (place.position,)})
    return replace(part, layers=(place.layer,), **({} if place.head is None else {"heads": (place.head,)}))


def fits(edit: Intervention, length: int) -> bool:
    """Tell whether a text of this length can have an edit."""
    try:
        edit.check(length)
    except SinkscopeError:
        return False
    return True


def seeds(edit: Intervention, over: str, placebo: Any) -> int:
    """Count the placebos to draw at each place.

    Args:
        edit: what is swept.
        over: what it is swept over.
        placebo: True, False, a number of draws, or None: one, where there is one that is not another place of the sweep.

    Raises:
        SinkscopeError: a placebo is asked for, and there is none.
    """
    if placebo is None or isinstance(placebo, bool):
        wanted = 0 if placebo is False else 1
    else:
        wanted = whole_number(placebo, "placebo", "True, False or a number of draws")
    if wanted < 0:
        raise SinkscopeError(f"placebo={wanted}: give True, False or a number of draws")
    others = over == "positions" or (over == "heads" and any(isinstance(p, ZeroHead | MeanHead) for p in edit.parts()))
    if wanted and others and placebo is not None:
        raise SinkscopeError(f"over={over!r}, every one of the {over} is the others' placebo: leave placebo out")
    if others:
        return 0
    try:
        for seed in range(wanted):
            edit.placebo(seed)
    except SinkscopeError:
        if placebo is not None:
            raise
        return 0
    return wanted
