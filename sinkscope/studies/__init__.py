"""Studies: published experiments, runnable, with the published figures beside ours. One file each.

A study is a function of a model and a text that gives a :class:`StudyReport`; its published figures are rows of
`published.csv`, each with its source and how it was read. Without a text, it takes one that comes with Python.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sinkscope.errors import unknown

if TYPE_CHECKING:
    from sinkscope.studies.compared import architectures
    from sinkscope.studies.conflict import semantic_conflict
    from sinkscope.studies.everything import run_all
    from sinkscope.studies.first import first_token
    from sinkscope.studies.massive import massive_activations
    from sinkscope.studies.mixing import over_mixing
    from sinkscope.studies.others import non_first
    from sinkscope.studies.rate import sink_rate
    from sinkscope.studies.start import bos
    from sinkscope.studies.streaming import streaming_llm
    from sinkscope.studies.training import emergence
    from sinkscope.studies.trigger import necessity

#: Name on the command line -> module and function, in the order in which they are best read.
STUDIES = {
    "first-token": ("first", "first_token"),
    "sink-rate": ("rate", "sink_rate"),
    "non-first": ("others", "non_first"),
    "bos": ("start", "bos"),
    "massive-activations": ("massive", "massive_activations"),
    "streaming-llm": ("streaming", "streaming_llm"),
    "over-mixing": ("mixing", "over_mixing"),
    "semantic-conflict": ("conflict", "semantic_conflict"),
    "emergence": ("training", "emergence"),
    "necessity": ("trigger", "necessity"),
    "make-a-sink": ("make", "make_a_sink"),
    "secondary-sinks": ("secondary", "secondary_sinks"),
    "repeated-token": ("repeats", "repeated_token"),
    "nop-broadcast": ("broadcast", "nop_broadcast"),
    "inactive-heads": ("inactive", "inactive_heads"),
    "dose-response": ("dose", "dose_response"),
    "kv-quantisation": ("quantised", "kv_quantisation"),
    "architectures": ("compared", "architectures"),
}

__all__ = [
    "STUDIES",
    "architectures",
    "bos",
    "emergence",
    "find",
    "first_token",
    "massive_activations",
    "necessity",
    "non_first",
    "over_mixing",
    "run_all",
    "semantic_conflict",
    "sink_rate",
    "streaming_llm",
]


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
    for module, function in [*STUDIES.values(), ("everything", "run_all")]:
        if name == function:
            return getattr(importlib.import_module(f"sinkscope.studies.{module}"), name)
    raise AttributeError(f"module 'sinkscope.studies' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
