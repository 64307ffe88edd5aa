"""Interventions: frozen descriptions of edits to a forward pass, which :func:`sinkscope.evaluate` runs."""

from sinkscope.interventions.activation import EditActivation
from sinkscope.interventions.base import Intervention, parse
from sinkscope.interventions.keys import MaskKeys, MeanValue, ZeroAttention, ZeroValue
from sinkscope.interventions.tokens import DropTokens, ReplaceToken
from sinkscope.interventions.windows import RecomputeWindow, SinkWindow, StreamingWindow, Window

__all__ = [
    "DropTokens",
    "EditActivation",
    "Intervention",
    "MaskKeys",
    "MeanValue",
    "RecomputeWindow",
    "ReplaceToken",
    "SinkWindow",
    "StreamingWindow",
    "Window",
    "ZeroAttention",
    "ZeroValue",
    "parse",
]
