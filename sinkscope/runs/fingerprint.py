"""What code does, as a digest: tells a metric, an edit or a hook from what it was before."""

from __future__ import annotations

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor, nn

#: What is a name and no more: its version is on record elsewhere.
LIBRARIES = frozenset({"sinkscope", "torch", "transformers", "transformer_lens", "numpy", "pandas"} | sys.stdlib_module_names)
LIBRARIES -= {"__main__"}
VALUES = (str, bytes, int, float, complex, types.NoneType, types.EllipsisType)
HOLDERS = (tuple, list, Mapping, set, frozenset, Tensor, np.ndarray, property)


def fingerprint(*things: Any) -> str:
    """Digest functions by what they do, and values by what they hold; neither by where they stand in memory or in a file.

    A function is its code, defaults and closure, and what of its own module it names; an object its class and attributes.

    >>> fingerprint(lambda x: x + 1) == fingerprint(lambda y: y + 1), fingerprint([1, 2]) == fingerprint([1, 2])
    (False, True)
    """
    digest = hashlib.sha256()
    with suppress(RecursionError):  # of what is nested deeper, the beginning
        for part in _spelled(things, {}):
            digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def _spelled(thing: Any, seen: dict[int, Any]) -> Iterator[str]:
    """Spell a thing out; what was `seen` is not spelled out again."""
    yield f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, VALUES):
        yield repr(thing)
    elif isinstance(thing, Tensor | np.ndarray):
        array = thing.detach().float().cpu().numpy() if isinstance(thing, Tensor) else thing
        yield f"{array.dtype} {array.shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"
    elif id(thing) not in seen:
        seen[id(thing)] = thing  # kept, so that nothing else gets its id
        for part in _parts(thing):
            yield from _spelled(part, seen)
    yield "."


def _parts(thing: Any) -> Iterator[Any]:
    """Give what a thing is made of."""
    if isinstance(thing, types.CodeType):  # co_code is bare of what an interpreter learns while it runs
        yield from (thing.co_code, thing.co_names, thing.co_varnames, thing.co_freevars, thing.co_consts)
    elif isinstance(thing, types.FunctionType):
        yield from (thing.__code__, thing.__defaults__, thing.__kwdefaults__)
        yield [held for cell in thing.__closure__ or () for held in _held(cell)]
        if not _library(thing.__module__):
            named = sorted({n for code in _codes(thing.__code__) for n in code.co_names if n in thing.__globals__})
            yield [(n, g) for n in named if _own(g := thing.__globals__[n], thing.__module__)]
    elif isinstance(thing, types.MethodType):
        yield from (thing.__func__, thing.__self__)
    elif isinstance(thing, functools.partial):
        yield from (thing.func, thing.args, thing.keywords)
    elif isinstance(thing, property):
        yield from (thing.fget, thing.fset)
    elif isinstance(thing, type):
        yield thing.__qualname__
        if not _library(thing.__module__):
            yield {n: part for n, part in vars(thing).items() if n != "__firstlineno__" and _own(part, thing.__module__)}
            yield thing.__bases__
    elif isinstance(thing, Mapping):
        yield from thing.items()
    elif isinstance(thing, set | frozenset):
        yield from sorted(thing, key=repr)
    elif isinstance(thing, list | tuple):
        yield from thing
    elif isinstance(thing, nn.Module):
        yield [(name, float(p.detach().double().sum())) for name, p in thing.named_parameters() if not p.is_meta]
    else:
        yield getattr(thing, "__qualname__", None)
        if not _library(type(thing).__module__) or hasattr(thing, "__wrapped__") or hasattr(thing, "__dataclass_fields__"):
            yield from (type(thing), getattr(thing, "__dict__", {}))
        elif type(thing).__hash__ is not None and " at 0x" not in (shown := repr(thing)):  # a path, a pattern, a dtype
            yield shown


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Give a function's code, and that of the functions in it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _held(cell: Any) -> Iterator[Any]:
    try:
        yield cell.cell_contents
    except ValueError:  # empty
        return


def _library(module: str | None) -> bool:
    return (module or "").partition(".")[0] in LIBRARIES


def _own(thing: Any, module: str) -> bool:
    """Tell values, and what is defined in the same module."""
    return isinstance(thing, (*VALUES, *HOLDERS)) or getattr(thing, "__module__", None) == module
