"""One caller at a time: a model that is being run by us is nobody else's until it is as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from sinkscope.errors import SinkscopeError
from sinkscope.runs.undo import Undo, uninterrupted

#: Seconds between looks at a model that another thread has.
PAUSE = 0.002
#: Who has which model: the identity of a thread. Held for a moment alone, to look or to write.
_OWNERS: WeakKeyDictionary[object, int] = WeakKeyDictionary()
_LOOK = threading.Lock()


def mine(model: object) -> bool:
    """Tell whether this thread has a model to itself: what runs now is a run of this library."""
    return _OWNERS.get(model) == threading.get_ident()


@contextmanager
def alone(model: object) -> Iterator[None]:
    """Have a model to oneself: another thread's turn is waited for.

    Raises:
        SinkscopeError: this very thread has it, such as a metric that measures the model which it is measured on.
    """
    me = threading.get_ident()
    with Undo() as undo:
        while True:
            with uninterrupted(), _LOOK:
                owner = _OWNERS.get(model)
                if owner is None:
                    undo.callback(_OWNERS.pop, model, None)
                    _OWNERS[model] = me
            if owner is None:
                break
            if owner == me:
                raise SinkscopeError(
                    "this model is being run already, by the call that this one is made in (from a metric, a hook, or a "
                    "stream of texts): call it before or after, or on a copy of the model"
                )
            time.sleep(PAUSE)
        yield
