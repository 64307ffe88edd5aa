"""Studies: published experiments, runnable, with the published figures beside ours. One file each.

A study is a function of a model and a text that gives a :class:`StudyReport`; its published figures are rows of
`published.csv`, each with its source and how it was read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sinkscope.errors import unknown

if TYPE_CHECKING:
    from sinkscope.studies.massive import massive_activations
    from sinkscope.studies.streaming import streaming_llm

#: Name on the command line -> module and function.
STUDIES = {
    "streaming-llm": ("streaming", "streaming_llm"),
    "massive-activations": ("massive", "massive_activations"),
}

__all__ = ["STUDIES", "find", "massive_activations", "streaming_llm"]


def find(name: str) -> Callable[..., Any]:
    """Give a study by its name.

    Raises:
        SinkscopeError: there is no such study; lists them.
    """
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    module, function = STUDIES[name]
    found: Callable[..., Any] = getattr(importlib.import_module(f"sinkscope.studies.{module}"), function)
    return found


def __getattr__(name: str) -> Any:
    for module, function in STUDIES.values():
        if name == function:
            return getattr(importlib.import_module(f"sinkscope.studies.{module}"), name)
    raise AttributeError(f"module 'sinkscope.studies' has no attribute {name!r}")
