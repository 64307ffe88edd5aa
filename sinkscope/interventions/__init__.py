"""Interventions: frozen descriptions of edits to a forward pass, which :func:`sinkscope.evaluate` runs."""

from sinkscope.interventions.activation import EditActivation
from sinkscope.interventions.base import Intervention, parse
from sinkscope.interventions.heads import MeanHead, ZeroHead
from sinkscope.interventions.keys import MaskKeys, ZeroAttention
from sinkscope.interventions.neurons import ZeroNeuron
from sinkscope.interventions.outputs import AmplifyVariance, ScaleOutput
from sinkscope.interventions.quantize import QuantizeKV
from sinkscope.interventions.scores import BiasScores, ScaleAttention, SelfOnly
from sinkscope.interventions.tokens import DropTokens, ReplaceToken
from sinkscope.interventions.values import MeanValue, ReplaceValue, ZeroValue
from sinkscope.interventions.windows import RecomputeWindow, SinkWindow, StreamingWindow, Window

__all__ = [
    "AmplifyVariance",
    "BiasScores",
    "DropTokens",
    "EditActivation",
    "Intervention",
    "MaskKeys",
    "MeanHead",
    "MeanValue",
    "QuantizeKV",
    "RecomputeWindow",
    "ReplaceToken",
    "ReplaceValue",
    "ScaleAttention",
    "ScaleOutput",
    "SelfOnly",
    "SinkWindow",
    "StreamingWindow",
    "Window",
    "ZeroAttention",
    "ZeroHead",
    "ZeroNeuron",
    "ZeroValue",
    "parse",
]
