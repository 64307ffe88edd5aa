"""Intervention: an edit that people write down: its text form, its placebo, composition, and `on(model)`.

What it does to a forward pass is said in the methods of :class:`sinkscope.edit.Edit`, all of which do nothing by default; the
library owns the forward pass. A new edit is a frozen dataclass in this package, with the methods that it needs.
"""

from __future__ import annotations

import ast
import math
import random
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor

from sinkscope.capture import live
from sinkscope.edit import Edit
from sinkscope.errors import SinkscopeError, unknown
from sinkscope.interventions.both import Both
from sinkscope.tokens import whole_number


@dataclass(frozen=True)
class Intervention(Edit):
    """One edit to the forward pass. Nothing is changed until :func:`sinkscope.evaluate` runs it, or inside `on(model)`.

    `layers` are the layers that are edited, None for all. Interventions compose: `MaskKeys(0) & Window(256)`.
    """

    #: Text name -> class, for :func:`parse`.
    registry: ClassVar[dict[str, type[Intervention]]] = {}

    def __init_subclass__(cls, written: bool = True, **how: Any) -> None:
        """Register the class under its name in snake case, if it has a text form."""
        super().__init_subclass__(**how)
        if written and not cls.__name__.startswith("_"):
            Intervention.registry[_snake(cls.__name__)] = cls

    def __post_init__(self) -> None:
        """Take lists and single numbers where tuples are kept, and refuse anything else."""
        for name in ("layers", "heads", "keys", "positions", "dims"):
            if hasattr(self, name) and getattr(self, name) is not None:
                object.__setattr__(self, name, whole_numbers(getattr(self, name), f"{type(self).__name__}({name}=...)"))

    def __and__(self, other: Intervention) -> Intervention:
        """Do both."""
        return _Both(first=self, second=other)

    def __str__(self) -> str:
        """Give the form that the command line takes, and that :func:`parse` reads back."""
        shown = []
        for f in sorted(fields(self), key=lambda f: bool(f.kw_only)):
            value = getattr(self, f.name)
            if not f.kw_only or value != f.default:
                shown.append(f"{f.name}={list(value) if isinstance(value, tuple) else value!r}")
        return f"{_snake(type(self).__name__)}({', '.join(shown)})"

    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        """Give the same edit on a matched position that is not a sink.

        Raises:
            SinkscopeError: the edit has no position to match.
        """
        raise SinkscopeError(f"{self} has no sink position, so there is no placebo for it")

    def on(self, model: Any, side: str | None = None) -> AbstractContextManager[Any]:
        """Run any code under this edit: `with ss.MaskKeys(0).on(model): model.generate(...)`. Undone at exit.

        Positions are counted from the first token that the model is given; a KV cache grows as usual, and what an edit
        evicts or hides in it is not looked at. Gradients flow. Texts of a batch must not be padded on the left. Your hooks
        on the residual stream fire; of those inside a bridge's attention, `hook_pattern` and `hook_attn_scores` do not (on
        TransformerLens 3.9 none), since Hugging Face's attention stands in its place.

        Args:
            model: as for :func:`sinkscope.evaluate`.
            side: as for :func:`sinkscope.evaluate`. Sources come whole, so in the encoder and in cross-attention keys may be
                counted from the source's end, and means taken over it, where no source of the batch is padded.

        Raises:
            SinkscopeError: an edit that makes another input (dropped tokens, re-computation): change the ids instead.
            InertHookError: this model would discard the edit; names what works.
        """
        return live.on(model, self, side)


@dataclass(frozen=True)
class _Both(Both, Intervention):
    def placebo(self, seed: SupportsIndex = 0) -> Intervention:
        placebo: Intervention = self.first.placebo(seed) & self.second.placebo(seed)
        return placebo


def _snake(name: str) -> str:
    """Give a class's text name: `quantize_kv` for QuantizeKV."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def whole_numbers(given: Any, what: str) -> tuple[int, ...]:
    """Take one whole number or several, of any type: NumPy's, PyTorch's and pandas' included.

    Raises:
        SinkscopeError: none, or something else.
    """
    several = isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", 1) != 0
    items = tuple(given) if several else (given,)
    try:
        numbers = tuple(whole_number(item, what) for item in items)
    except SinkscopeError:
        numbers = ()
    if not numbers:
        raise SinkscopeError(f"{what}: expected one or several whole numbers, got {given!r}")
    return numbers


def real_numbers(given: Any, what: str) -> Any:
    """Take a number, or several as a tuple, of any type.

    Raises:
        SinkscopeError: something else.
    """
    if isinstance(given, Iterable) and not isinstance(given, str) and getattr(given, "ndim", 1) != 0:
        return tuple(real_numbers(item, what) for item in given)
    number = given.item() if hasattr(given, "item") and getattr(given, "size", 1) != 0 else given
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise SinkscopeError(f"{what}: to is a number, one for each place, or 'mean'; got {given!r}")
    return number


def real_number(given: Any, what: str, least: float = -math.inf) -> Any:
    """Take one finite number, of any type, not below the least.

    Raises:
        SinkscopeError: something else.
    """
    number = given.item() if hasattr(given, "item") and getattr(given, "size", 1) != 0 else given
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number < least:
        bound = "" if least == -math.inf else f", at least {least:g}"
        raise SinkscopeError(f"{what}: expected a finite number{bound}, got {given!r}")
    return number


def one_of(given: Any, choices: Sequence[str], what: str) -> str:
    """Take one of some words.

    Raises:
        SinkscopeError: something else.
    """
    if not isinstance(given, str) or given not in choices:
        raise SinkscopeError(f"{what}: expected one of {', '.join(map(repr, choices))}, got {given!r}")
    return given


def resolve(keys: Iterable[int], length: int) -> Int[Tensor, " key"]:
    """Turn positions that may count from the end into positions."""
    return torch.tensor([k + length if k < 0 else k for k in keys])


def elsewhere(positions: Sequence[int], seed: SupportsIndex) -> tuple[int, ...]:
    """Draw as many other early positions, which nearly as many queries see."""
    near = [k for k in range(4, 32) if k not in positions]
    draw = random.Random(whole_number(seed, "seed"))
    return tuple(sorted(draw.sample(near, min(len(positions), len(near)))))


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
