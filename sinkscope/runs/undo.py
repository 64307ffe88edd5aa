"""What a run changes on a model is put back: after an error, and after Ctrl-C at whatever moment it comes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Protocol, TypeVar, runtime_checkable

from sinkscope.errors import MetricError


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until a few changes that belong together are made."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


@contextmanager
def heeded() -> Iterator[Callable[[], None]]:
    """Heed Ctrl-C also where Python loses it, as it does what is raised while a generator or an object is being let go of.

    Yields a function to call now and then, which raises the interrupt once more if the run is still going on.
    """
    handler, came = signal.getsignal(signal.SIGINT), list[int]()
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield lambda: None
        return

    def note(number: int, frame: Any) -> None:
        came.append(number)
        handler(number, frame)

    def look() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield look
        look()
    finally:
        signal.signal(signal.SIGINT, handler)


@runtime_checkable
class Closable(Protocol):
    """A context manager that can be closed as well, any number of times."""

    def __enter__(self) -> Any:
        """Enter it."""

    def __exit__(self, *how: Any) -> bool | None:
        """Leave it."""

    def close(self) -> None:
        """Do what leaving it does, if it is not done."""


C = TypeVar("C", bound=Closable)


@contextmanager
def surely(thing: C) -> Iterator[C]:
    """Enter something, and see to it that it is left, should an interrupt come just when it is.

    What is wrong with a metric is raised anew: of the two hundred lines that a model's modules add to it none helps.
    """
    try:
        with closing(thing), thing:
            yield thing
    except MetricError as error:
        raise MetricError(*error.args) from error.__cause__


class Undo(ExitStack):
    """An exit stack that an interrupt can't keep from its work: hit before it begins, it does it when it is let go of."""

    def __exit__(self, *details: Any) -> bool:
        """Undo, the latest change first."""
        with uninterrupted():
            return bool(super().__exit__(*details))

    def __del__(self) -> None:
        if self._exit_callbacks:  # type: ignore[attr-defined]
            self.close()
