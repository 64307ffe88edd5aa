"""Attention sinks, measured exactly, streamed layer by layer, on any TransformerLens model.

Data flow::

    measure:   texts -> tokens -> capture (an engine) -> Block -> metric accumulators -> SinkReport -> plots, files
    evaluate:  intervention -> edited attention -> per-token loss, KL -> EffectReport -> plots, files
    sweep:     the same, at every head, layer or position -> SweepReport
    watch:     a model that runs in anybody's code -> passes -> Block -> the same -> series, SinkReport

Two contracts carry it: a metric is a function of a :class:`~sinkscope.block.Block`, an intervention an
:class:`~sinkscope.edit.Edit`; engines know these alone. Modules import downwards::

    cli > studies > masks, sweeps, callback > observe, causal, attention, watching > interventions > capture > models
        > reports > runs > results > metrics > tokens > block, edit > errors
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope import interventions, metrics, studies, testing, where
    from sinkscope.attention import attention_map, attention_patterns
    from sinkscope.block import Block
    from sinkscope.callback import SinkCallback
    from sinkscope.causal import evaluate
    from sinkscope.errors import InertHookError, SinkscopeError
    from sinkscope.interventions import MaskKeys, SinkWindow, Window
    from sinkscope.masks import sink_mask
    from sinkscope.metrics.base import metric
    from sinkscope.models import load_model
    from sinkscope.observe import measure
    from sinkscope.reports import plots
    from sinkscope.reports.effect import EffectReport
    from sinkscope.reports.load import load_report
    from sinkscope.reports.mask import SinkMask
    from sinkscope.reports.sink import SinkReport
    from sinkscope.reports.sweep import SweepReport
    from sinkscope.sweeps import sweep
    from sinkscope.tokens import tokenize
    from sinkscope.watching import watch

__version__ = "0.1.0"

_HOME = {
    "Block": "block",
    "EffectReport": "reports.effect",
    "InertHookError": "errors",
    "MaskKeys": "interventions",
    "SinkCallback": "callback",
    "SinkMask": "reports.mask",
    "SinkReport": "reports.sink",
    "SinkWindow": "interventions",
    "SinkscopeError": "errors",
    "SweepReport": "reports.sweep",
    "Window": "interventions",
    "attention_map": "attention",
    "attention_patterns": "attention",
    "evaluate": "causal",
    "load_model": "models",
    "load_report": "reports.load",
    "measure": "observe",
    "metric": "metrics.base",
    "sink_mask": "masks",
    "sweep": "sweeps",
    "tokenize": "tokens",
    "watch": "watching",
}
_MODULES = {name: name for name in ("interventions", "metrics", "studies", "testing", "where")} | {"plots": "reports.plots"}

__all__ = [
    "Block",
    "EffectReport",
    "InertHookError",
    "MaskKeys",
    "SinkCallback",
    "SinkMask",
    "SinkReport",
    "SinkWindow",
    "SinkscopeError",
    "SweepReport",
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
    "sink_mask",
    "studies",
    "sweep",
    "testing",
    "tokenize",
    "watch",
    "where",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import sinkscope` alone loads neither torch nor TransformerLens."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"sinkscope.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"sinkscope.{_MODULES[name]}")
    else:
        raise AttributeError(f"module 'sinkscope' has no attribute {name!r}{_hint(name)}")
    globals()[name] = value
    return value


def _hint(name: str) -> str:
    """Say in which public module a name is; their source is read, since importing them takes seconds."""
    for module, path in _MODULES.items():
        file = Path(__file__).parent.joinpath(*path.split("."))
        source = (file / "__init__.py" if file.is_dir() else file.with_suffix(".py")).read_text(encoding="utf-8")
        if not name.startswith("_") and name in source and name in _names(source):
            return f": it is sinkscope.{module}.{name}"
    return ""


def _names(source: str) -> set[str]:
    """Give what a module defines, takes from other modules of this package, or lists in `__all__`."""
    import ast

    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("sinkscope"):
            found.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            found.update(str(part.value) for part in ast.walk(node.value) if isinstance(part, ast.Constant))
    return found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
