"""A progress bar on stderr, or nothing at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: Seconds before a bar appears, so that short runs say nothing, and between its lines where stderr is a file or a pipe.
DELAY, QUIET = 2.0, 10.0


@contextmanager
def bar(show: bool, total: int | None, what: str, unit: str = "layer") -> Iterator[Callable[[int], None]]:
    """Show how much of `total` (None: unknown) is done and how long the rest will take; yields a function that adds to it."""
    if not show:
        yield lambda n: None
        return
    from tqdm.auto import tqdm

    interval = 0.1 if sys.stderr.isatty() else QUIET
    with tqdm(total=total, desc=what, unit=unit, leave=False, delay=DELAY, mininterval=interval) as progress:

        def add(n: int) -> None:
            progress.update(n)

        yield add
