"""What JSON must look like that is read back from a file: a shape to compare it with."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Any


def fits(thing: Any, shape: Any, where: str = "it") -> None:
    """Compare what was read with a shape.

    Args:
        thing: what JSON gave.
        shape: a type, or several as `int | None`; `[shape]` for a list; `(shape, shape)` for a list of so many; a dict for an
            object that has at least these keys, where the key `...` stands for all others.
        where: a name for it.

    Raises:
        ValueError: it looks otherwise; says where.

    >>> fits({"texts": [{"label": "a", "n_tokens": 3}], "more": 1}, {"texts": [{"label": str, "n_tokens": int}]})
    >>> fits({"texts": [{"label": "a", "n_tokens": True}]}, {"texts": [{"n_tokens": int}]}, "seal")
    Traceback (most recent call last):
    ...
    ValueError: seal.texts[0].n_tokens is a bool
    """
    if isinstance(shape, dict):
        fine = isinstance(thing, Mapping) and all(isinstance(key, str) for key in thing)
        parts = [(f"{where}.{key}", key, inner) for key, inner in shape.items() if key is not ...] if fine else []
        if fine and ... in shape:
            parts += [(f"{where}.{key}", key, shape[...]) for key in thing if key not in shape]
        for name, key, inner in parts:
            if key not in thing:
                raise ValueError(f"{name} is missing")
            fits(thing[key], inner, name)
    elif isinstance(shape, list | tuple):
        fine = isinstance(thing, list) and (isinstance(shape, list) or len(thing) == len(shape))
        inner = shape * len(thing) if fine and isinstance(shape, list) else shape
        for n, (part, of) in enumerate(zip(thing, inner, strict=True) if fine else ()):
            fits(part, of, f"{where}[{n}]")
    else:
        fine = _is(thing, shape)
    if not fine:
        raise ValueError(f"{where} is a {type(thing).__name__}" + (f" of {len(thing)}" if isinstance(thing, list) else ""))


def _is(thing: Any, kind: type | UnionType) -> bool:
    """Tell types as JSON has them: true is no number, and a whole number may stand for any."""
    if isinstance(thing, bool):
        return kind is bool
    return isinstance(thing, kind) or (isinstance(thing, int) and isinstance(0.0, kind))
