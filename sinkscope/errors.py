"""The one family of errors that users see: what was wrong, what is allowed, and what to type."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SinkscopeError(ValueError):
    """Something that the caller can mend; the message names the value, the choices and the way out."""


class InertHookError(SinkscopeError):
    """TransformerLens would discard an edit, or never fire a hook, at the place that was asked for."""


class MetricError(SinkscopeError):
    """A metric raised, or returned what it may not; its last line is the line of the metric where that was."""


def unknown(kind: str, name: object, available: Iterable[str]) -> SinkscopeError:
    """Build the error for a name that does not exist: the nearest name and the whole list.

    >>> str(unknown("metric", "sinkmass", ["row_entropy", "sink_mass"]))
    "unknown metric 'sinkmass'; did you mean 'sink_mass'? Available: row_entropy, sink_mass"
    """
    names = sorted(available)
    ends = [full for full in names if full.endswith(f".{name}")]
    near = ends or difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return SinkscopeError(f"unknown {kind} {str(name)!r}; {hint}Available: {', '.join(names)}")
