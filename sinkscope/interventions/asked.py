"""What a caller asks for: interventions in any form, by their text form, and placebos beside them."""

from __future__ import annotations

from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.interventions.base import Intervention, parse
from sinkscope.tokens import whole_number

#: Seeds tried for each placebo, since some draw the same.
SEEDS = 4


def named(given: Any) -> list[tuple[str, Intervention]]:
    """Take interventions in any form, each with its text form.

    Raises:
        SinkscopeError: none, one twice, or something else.
    """
    several = [given] if isinstance(given, Intervention | str) else list(given)
    edits = [parse(e) if isinstance(e, str) else e for e in several]
    for edit in edits:
        if not isinstance(edit, Intervention):
            raise SinkscopeError(f"expected an intervention or its text form, got a {type(edit).__name__}")
    if not edits or len({str(e) for e in edits}) < len(edits):
        raise SinkscopeError("give at least one intervention, and each once")
    return [(str(e), e) for e in edits]


def with_placebos(edits: list[tuple[str, Intervention]], n: Any) -> tuple[list[tuple[str, Intervention]], dict[str, str]]:
    """Give edits with `n` different placebos behind each that has any, and placebo -> edit.

    Raises:
        SinkscopeError: that is no number of placebos.
    """
    n = int(n) if isinstance(n, bool) else whole_number(n, "placebo", "True, or how many placebos each edit gets")
    if n < 0:
        raise SinkscopeError(f"placebo={n}: give True, or how many placebos each edit gets")
    taken = dict(edits)
    found: dict[str, str] = {}
    for name, edit in edits:
        mine: dict[str, Intervention] = {}
        for seed in range(SEEDS * n):
            if len(mine) < n and (text := placebo_of(edit, seed)) and text not in taken:
                mine[text] = edit.placebo(seed)
        taken |= mine
        found |= dict.fromkeys(mine, name)
    return list(taken.items()), found


def placebo_of(edit: Intervention, seed: int = 0) -> str:
    """Give the text form of an edit's placebo; nothing where it has none."""
    try:
        return str(edit.placebo(seed))
    except SinkscopeError:
        return ""
