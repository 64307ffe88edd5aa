"""A progress bar on stderr, or nothing at all; and a line for what takes long and can't be counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Timer

from sinkscope.runs.undo import heeded

#: Seconds before a bar appears, so that short runs say nothing, and between its lines where stderr is a file or a pipe.
DELAY, QUIET = 2.0, 10.0
#: The same in a notebook, whose stderr is no terminal though somebody looks at it.
NOTEBOOK_DELAY, NOTEBOOK = 0.5, 0.2


@contextmanager
def bar(show: bool, total: int | None, what: str, unit: str = "layer") -> Iterator[Callable[[int], None]]:
    """Show how much of `total` (None: unknown) is done and how long the rest will take; yields a function that adds to it."""
    with heeded() as look:
        if not show:
            yield lambda n: look()
            return
        with _shown(total, what, unit) as add:

            def count(n: int) -> None:
                look()
                add(n)

            yield count


@contextmanager
def _shown(total: int | None, what: str, unit: str) -> Iterator[Callable[[int], None]]:
    from tqdm.auto import tqdm

    live, seen = in_notebook(), sys.stderr.isatty()
    delay, interval = (NOTEBOOK_DELAY, NOTEBOOK) if live else (DELAY, 0.1 if seen else QUIET)
    with tqdm(total=total, desc=what, unit=unit, leave=False, delay=delay, mininterval=interval) as progress:
        first = Timer(delay, progress.refresh)  # the first layer of a long text may take longer
        first.daemon = True
        if live or seen:
            first.start()

        def add(n: int) -> None:
            progress.update(n)

        try:
            yield add
        finally:
            first.cancel()


@contextmanager
def saying(show: bool, what: str) -> Iterator[None]:
    """Say on stderr what is being done: at once to a person, to a file or a pipe only when it takes long."""
    if not show:
        yield
        return
    line = f"{what}\n"
    timer = Timer(QUIET, sys.stderr.write, [line])
    timer.daemon = True
    if sys.stderr.isatty() or in_notebook():
        sys.stderr.write(line)
        sys.stderr.flush()
    else:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def in_notebook() -> bool:
    """Tell whether IPython runs this: a notebook, or its terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


@dataclass
class Shares:
    """Turns shares of a whole, as they grow, into ticks of a bar."""

    tick: Callable[[int], None]
    whole: int
    seen: int = 0

    def __call__(self, share: float) -> None:
        """Tick up to this share."""
        self.tick(int(share * self.whole) - self.seen)
        self.seen = int(share * self.whole)
