"""Attention sinks, measured exactly, streamed layer by layer, on any TransformerLens model.

Data flow::

    measure:  texts -> tokens -> capture (an engine) -> Block -> metric accumulators -> SinkReport -> plots, files

A metric is a function of a block; everything around it is the library's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope import metrics, plots, testing
    from sinkscope.attention import attention_map
    from sinkscope.block import Block
    from sinkscope.errors import InertHookError, SinkscopeError
    from sinkscope.files import load_report
    from sinkscope.metrics.base import metric
    from sinkscope.models import load_model
    from sinkscope.observe import measure
    from sinkscope.report import SinkReport
    from sinkscope.tokens import tokenize

__version__ = "0.1.0"

_HOME = {
    "Block": "block",
    "InertHookError": "errors",
    "SinkReport": "report",
    "SinkscopeError": "errors",
    "attention_map": "attention",
    "load_model": "models",
    "load_report": "files",
    "measure": "observe",
    "metric": "metrics.base",
    "tokenize": "tokens",
}
_MODULES = ("metrics", "plots", "testing")

__all__ = [
    "Block",
    "InertHookError",
    "SinkReport",
    "SinkscopeError",
    "attention_map",
    "load_model",
    "load_report",
    "measure",
    "metric",
    "metrics",
    "plots",
    "testing",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import sinkscope` alone loads neither torch nor TransformerLens."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"sinkscope.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"sinkscope.{name}")
    else:
        raise AttributeError(f"module 'sinkscope' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
