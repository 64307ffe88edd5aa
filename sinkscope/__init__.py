"""Attention sinks, measured exactly, streamed layer by layer, on any TransformerLens model.

Data flow::

    measure:   texts -> tokens -> capture (an engine) -> Block -> metric accumulators -> SinkReport -> plots, files
    evaluate:  intervention -> edited attention -> per-token loss, KL -> EffectReport -> plots, files

A metric is a function of a block, an intervention a frozen dataclass; everything around them is the library's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope import interventions, metrics, studies, testing
    from sinkscope.attention import attention_map, attention_patterns
    from sinkscope.block import Block
    from sinkscope.causal import evaluate
    from sinkscope.errors import InertHookError, SinkscopeError
    from sinkscope.interventions import MaskKeys, SinkWindow, Window
    from sinkscope.metrics.base import metric
    from sinkscope.models import load_model
    from sinkscope.observe import measure
    from sinkscope.reports import plots
    from sinkscope.reports.effect import EffectReport
    from sinkscope.reports.load import load_report
    from sinkscope.reports.sink import SinkReport
    from sinkscope.tokens import tokenize

__version__ = "0.1.0"

_HOME = {
    "Block": "block",
    "EffectReport": "reports.effect",
    "InertHookError": "errors",
    "MaskKeys": "interventions",
    "SinkReport": "reports.sink",
    "SinkWindow": "interventions",
    "SinkscopeError": "errors",
    "Window": "interventions",
    "attention_map": "attention",
    "attention_patterns": "attention",
    "evaluate": "causal",
    "load_model": "models",
    "load_report": "reports.load",
    "measure": "observe",
    "metric": "metrics.base",
    "tokenize": "tokens",
}
_MODULES = {name: name for name in ("interventions", "metrics", "studies", "testing")} | {"plots": "reports.plots"}

__all__ = [
    "Block",
    "EffectReport",
    "InertHookError",
    "MaskKeys",
    "SinkReport",
    "SinkWindow",
    "SinkscopeError",
    "Window",
    "attention_map",
    "attention_patterns",
    "evaluate",
    "interventions",
    "load_model",
    "load_report",
    "measure",
    "metric",
    "metrics",
    "plots",
    "studies",
    "testing",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import sinkscope` alone loads neither torch nor TransformerLens."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"sinkscope.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"sinkscope.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'sinkscope' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
