"""Intervention: a frozen description of one edit to a forward pass, its text form, and composition.

An edit says what it does in a few small methods, all of which do nothing by default; the library owns the forward pass.
A new edit is a frozen dataclass in this package, with the methods that it needs.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError, unknown

#: One whole number or several, or None for all of them; kept as a tuple.
Where = Any


@dataclass(frozen=True)
class Intervention:
    """One edit to the forward pass. Nothing is changed until :func:`sinkscope.evaluate` runs it, or inside `on(model)`.

    `layers` are the layers that are edited, None for all. Interventions compose: `MaskKeys(0) & Window(256)`.
    """

    layers: Where = field(default=None, kw_only=True)

    #: Text name -> class, for :func:`parse`.
    registry: ClassVar[dict[str, type[Intervention]]] = {}
    #: Whether it says which keys a cache still holds; one edit of that kind at most makes sense.
    is_window: ClassVar[bool] = False
    #: What it edits: "input", "scores", "pattern", "values" or "residual". A model may discard some.
    touches: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **how: Any) -> None:
        """Register the class under its name in snake case."""
        super().__init_subclass__(**how)
        if not cls.__name__.startswith("_"):
            Intervention.registry[re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()] = cls

    def __post_init__(self) -> None:
        """Take lists and single numbers where tuples are kept, and refuse anything else."""
        for name in ("layers", "heads", "keys", "positions", "dims"):
            if hasattr(self, name) and getattr(self, name) is not None:
                object.__setattr__(self, name, _integers(getattr(self, name), f"{type(self).__name__}({name}=...)"))

    def __and__(self, other: Intervention) -> Intervention:
        """Do both."""
        return _Both(first=self, second=other)

    def __str__(self) -> str:
        """Give the form that the command line takes, and that :func:`parse` reads back."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        shown = []
        for f in sorted(fields(self), key=lambda f: bool(f.kw_only)):
            value = getattr(self, f.name)
            if not f.kw_only or value != f.default:
                shown.append(f"{f.name}={list(value) if isinstance(value, tuple) else value!r}")
        return f"{name}({', '.join(shown)})"

    def placebo(self, seed: int = 0) -> Intervention:
        """Give the same edit on a matched position that is not a sink.

        Raises:
            SinkscopeError: the edit has no position to match.
        """
        raise SinkscopeError(f"{self} has no sink position, so there is no placebo for it")

    def check(self, length: int) -> None:
        """Refuse, before anything runs, what a text of this length can't have.

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
            heads = [h for h in getattr(part, "heads", None) or () if not 0 <= h < n_heads]
            if heads:
                raise SinkscopeError(f"{part}: heads {heads}; the heads are 0 to {n_heads - 1}")

    def parts(self) -> tuple[Intervention, ...]:
        """Give the edits that this one is composed of."""
        return (self,)

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """Run any code under this edit: `with ss.MaskKeys(0).on(model): model.generate(...)`. Undone at exit.

        Positions are counted from the first token that the model is given; a KV cache grows as usual, and what an edit
        evicts or hides in it is not looked at. Gradients flow. Texts of a batch must not be padded on the left. Your hooks
        on the residual stream fire; of those inside a bridge's attention, `hook_pattern` and `hook_attn_scores` do not (on
        TransformerLens 3.9 none), since Hugging Face's attention stands in its place.

        Args:
            model: as for :func:`sinkscope.evaluate`.

        Raises:
            SinkscopeError: an edit that makes another input (dropped tokens, re-computation): change the ids instead.
            InertHookError: this model would discard the edit; names what works.
        """
        from sinkscope.capture.live import on

        return on(model, self)

    def settle(self, ids: Int[Tensor, " position"], residuals: Any) -> Intervention:
        """Give the concrete edit for one text; `residuals(ids, look)` looks at its residual stream after each layer."""
        return self

    # What an edit may do. `edits(layer)` has been asked before. Positions are those of the text, ascending.

    def edits(self, layer: int) -> bool:
        """Tell whether this layer is edited."""
        return self.layers is None or layer in self.layers

    def input(self, ids: Int[Tensor, " position"]) -> tuple[Int[Tensor, " position"], Int[Tensor, " position"]]:
        """Give the ids to run, and for each the position that it had in the text."""
        return ids, torch.arange(len(ids))

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

    def residual(
        self, layer: int, residual: Float[Tensor, "batch position d_model"], positions: Int[Tensor, " position"]
    ) -> Tensor:
        """Give the residual stream to use after a layer."""
        return residual

    def rerun(self) -> int | None:
        """Give how many tokens the model is run on anew for every token, or None for one pass over all."""
        return None

    def cache(self, layer: int) -> tuple[int, int] | None:
        """Give (size, sinks) where positions are those inside a cache of that size, else None."""
        return None


@dataclass(frozen=True)
class _Both(Intervention):
    first: Intervention = None  # type: ignore[assignment]
    second: Intervention = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.first.is_window and self.second.is_window:
            raise SinkscopeError(f"two windows can't be composed: {self}")

    @property
    def is_window(self) -> bool:  # type: ignore[override]
        return self.first.is_window or self.second.is_window

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        return self.first.touches | self.second.touches

    def __str__(self) -> str:
        return f"{self.first} & {self.second}"

    def placebo(self, seed: int = 0) -> Intervention:
        return self.first.placebo(seed) & self.second.placebo(seed)

    def check(self, length: int) -> None:
        self.first.check(length)
        self.second.check(length)

    def parts(self) -> tuple[Intervention, ...]:
        return (*self.first.parts(), *self.second.parts())

    def settle(self, ids: Tensor, residuals: Any) -> Intervention:
        return self.first.settle(ids, residuals) & self.second.settle(ids, residuals)

    def _parts(self, layer: int) -> list[Intervention]:
        return [part for part in (self.first, self.second) if part.edits(layer)]

    def edits(self, layer: int) -> bool:
        return bool(self._parts(layer))

    def input(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        ids, first = self.first.input(ids)
        ids, second = self.second.input(ids)
        return ids, first[second]

    def reach(self, layer: int, start: int, stop: int) -> Tensor:
        first, *others = (part.reach(layer, start, stop) for part in self._parts(layer))
        return first[torch.isin(first, others[0])] if others else first

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor | None:
        found = [h for p in self._parts(layer) if (h := p.hides(layer, queries, keys, heads, length)) is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] | found[1]

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        found = [z for p in self._parts(layer) if (z := p.zeroes(layer, keys, heads, length)) is not None]
        return None if not found else found[0] if len(found) == 1 else found[0] | found[1]

    def values(self, layer: int, values: Tensor, keys: Tensor, length: int) -> Tensor:
        for part in self._parts(layer):
            values = part.values(layer, values, keys, length)
        return values

    def residual(self, layer: int, residual: Tensor, positions: Tensor) -> Tensor:
        for part in self._parts(layer):
            residual = part.residual(layer, residual, positions)
        return residual

    def rerun(self) -> int | None:
        return next((n for part in (self.first, self.second) if (n := part.rerun()) is not None), None)

    def cache(self, layer: int) -> tuple[int, int] | None:
        return next((c for part in self._parts(layer) if (c := part.cache(layer)) is not None), None)


def _integers(given: Any, what: str) -> tuple[int, ...]:
    items = (given,) if isinstance(given, int) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not items or not all(isinstance(i, int) and not isinstance(i, bool) for i in items) or isinstance(given, str):
        raise SinkscopeError(f"{what}: expected one or several whole numbers, got {given!r}")
    return items


def resolve(keys: Iterable[int], length: int) -> Int[Tensor, " key"]:
    """Turn positions that may count from the end into positions."""
    return torch.tensor([k + length if k < 0 else k for k in keys])


def inside(keys: Iterable[int], length: int, what: object) -> None:
    """Refuse positions outside a text.

    Raises:
        SinkscopeError: names them and the range.
    """
    outside = [k for k in keys if not -length <= k < length]
    if outside:
        raise SinkscopeError(f"{what}: {outside} lies outside the text, whose positions are 0 to {length - 1}")


def parse(text: str) -> Intervention:
    """Read an intervention from its text form.

    Raises:
        SinkscopeError: not of the form `name(argument=value, ...)`, joined by `&`; no such name; a bad argument.

    >>> str(parse("sink_window(256, sinks=4)"))
    'sink_window(size=256, sinks=4)'
    >>> str(parse("mask_keys(keys=[0]) & window(size=64)"))
    'mask_keys(keys=[0]) & window(size=64)'
    """
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SinkscopeError):
            raise
        raise _unreadable(text) from None


def _unreadable(text: str) -> SinkscopeError:
    return SinkscopeError(
        f"can't read the intervention {text[:200]!r}: write it as window(size=256), several joined by &. "
        f"There are: {', '.join(sorted(Intervention.registry))}"
    )


def _build(node: ast.expr, text: str) -> Intervention:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return _build(node.left, text) & _build(node.right, text)
    call = node if isinstance(node, ast.Call) else None
    name = call.func if call is not None else node
    if not isinstance(name, ast.Name) or (call is not None and any(k.arg is None for k in call.keywords)):
        raise _unreadable(text)
    if name.id not in Intervention.registry:
        raise unknown("intervention", name.id, Intervention.registry)
    kind = Intervention.registry[name.id]
    args = [ast.literal_eval(a) for a in call.args] if call is not None else []
    named = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords} if call is not None else {}
    try:
        return kind(*args, **named)
    except TypeError as error:
        takes = ", ".join(f.name for f in fields(kind))
        raise SinkscopeError(f"{name.id}(...) takes {takes}: {str(error).rpartition('__init__() ')[2]}") from None
