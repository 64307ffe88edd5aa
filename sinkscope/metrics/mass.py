"""Attention to the sink key: statistics that need one column of the pattern, and no whole row."""

from __future__ import annotations

from torch import Tensor

from sinkscope.block import Block
from sinkscope.metrics.base import Array, derived, mean_of, metric, over_heads


def seeing_key(block: Block) -> Tensor:
    """Average over the queries at or after the key (all queries in an encoder); windows are not looked at."""
    return block.keys[:, None] < block.n_visible


def in_window(block: Block) -> Tensor:
    """Average over the queries that can see the key: causality and the layer's sliding window respected."""
    return block.sees_key


def with_a_choice(block: Block) -> Tensor:
    """Average over the queries that see the key and at least one other: row 0 has no choice."""
    return seeing_key(block) & (block.n_visible > 1)


def last_row(block: Block) -> Tensor:
    """Take the last real token's row alone."""
    return block.queries[None, :] == block.lengths[:, None] - 1


@metric(needs="mass", unit="share of attention")
def sink_mass(block: Block) -> Tensor:
    """Mean attention that a query pays to the sink key, row 0 included; 0 to 1.

    mean over i of A[i, k]. Null: H_T / T for key 0 (harmonic number), not 1 / T.
    Source: attention-sink analyses of GPT-2; F-Attn in Gated Attention, arXiv 2505.06708.
    """
    return block.mass


@metric(needs="mass", over=with_a_choice, unit="share of attention")
def sink_mass_excess(block: Block) -> Tensor:
    """Mean attention to the sink key beyond uniform attention, over queries that have a choice; -1 to 1, null 0.

    mean over i >= 1 of A[i, k] - 1 / (i + 1). Source: this library.
    """
    return block.mass - 1.0 / block.n_visible[:, None, :].to(block.mass.dtype)


@metric(needs="mass", over=in_window, null="visible", unit="share of attention")
def visible_sink_mass(block: Block) -> Tensor:
    """Mean attention to the sink key over the queries that can see it; 0 to 1.

    Equal to sink_mass for key 0 on layers without a sliding window; on layers with one, late queries can't see the
    key and don't count. Null: uniform attention over the keys in the window. Source: this library.
    """
    return block.mass


@metric(needs="mass", over=in_window, null="visible", thresholds=(0.3, 0.8), unit="share of heads")
def visible_sink_rate(block: Block) -> Tensor:
    """Share of heads whose visible_sink_mass exceeds the threshold, per sequence; 0 to 1. Source: this library."""
    return block.mass


@metric(needs="mass", over=seeing_key, unit="share of attention")
def received(block: Block) -> Tensor:
    """Mean attention that the sink key receives from itself and later queries, alpha_k; 0 to 1.

    sum over i >= k of A[i, k] / (T - k). Source: Gu et al. 2024, arXiv 2410.10781, section 3.
    """
    return block.mass


@metric(needs="mass", over=seeing_key, thresholds=(0.3, 0.8), unit="share of heads")
def sink_rate(block: Block) -> Tensor:
    """Share of (layer, head) whose alpha_k exceeds the threshold, thresholded per sequence; 0 to 1.

    Source: Sink_k^eps of Gu et al. 2024, arXiv 2410.10781 (eps 0.3, T = 64); eps 0.8 in Barbero et al. 2025, 2504.02732.
    """
    return block.mass


@metric(needs="mass", over=last_row, unit="share of attention")
def last_row_share(block: Block) -> Tensor:
    """Attention that the last token pays to the sink key; 0 to 1, null 1 / T.

    A[T - 1, k]. Source: Xiao et al. 2023, arXiv 2309.17453, fig. 12.
    """
    return block.mass


@metric(needs="mass", unit="share of attention")
def row_deficit(block: Block) -> Tensor:
    """What is missing from a row's sum of one: the share that a learned sink logit takes (gpt-oss); 0 to 1, null 0.

    mean over i of 1 - sum over k of A[i, k].
    """
    return 1.0 - block.row_sum


@derived(of=("sink_mass", "row_deficit"), at_key=True, unit="share of attention")
def sink_strength(sink_mass: Array, row_deficit: Array, tokens: int, causal: bool) -> float:
    """Share of all attention in the model that lands on the sink key; 0 to 1. Source: seed analysis."""
    return mean_of(sink_mass) / mean_of(1.0 - row_deficit)


@derived(of=("sink_mass",), at_key=True, unit="times")
def first_to_rest_ratio(sink_mass: Array, tokens: int, causal: bool) -> float:
    """How many times more attention the sink key gets than the average other key; 1 would be even.

    m / ((1 - m) / (T - 1)), m = sink_mass averaged over the model. Source: seed analysis (GPT-2, 10 tokens: 20.4).
    """
    m = mean_of(sink_mass)
    return float("inf") if m >= 1.0 else m / ((1.0 - m) / (tokens - 1))


@metric(needs="mass", over=seeing_key, unit="share of attention", per_query=True)
def query_profile(block: Block) -> Tensor:
    """Attention that each query pays to the sink key, one number per query; 0 to 1; large: asked for by name.

    A[i, k] for every i >= k. Null: 1 / (i + 1). A key whose score is c above all others gets e^c / (e^c + i), so that the
    logit of its share falls with slope -1 in the logarithm of i, the number of other keys in sight:

    >>> import numpy as np, sinkscope as ss
    >>> report = ss.measure(ss.testing.planted_sink([[5.0]]), "the quick brown fox jumps", ["query_profile"])
    >>> rows = report.frame.query("text == 'all' and query > 0")
    >>> logit = np.log(rows["value"] / (1 - rows["value"]))
    >>> slope, score = np.polyfit(np.log(rows["query"].astype(float)), logit, 1)
    >>> round(float(slope), 3), round(float(score), 3)
    (-1.0, 5.0)
    """
    return block.mass


def late_minus_early(series: Array) -> float:
    """Mean of the last third of the layers minus mean of the first third (each at least one layer)."""
    third = max(1, len(series) // 3)
    return float(series[-third:].mean() - series[:third].mean())


@derived(of=("sink_mass",), axes=("layer",), total=late_minus_early, at_key=True, unit="share of attention")
def layer_progression(sink_mass: Array, tokens: int, causal: bool) -> Array:
    """Layer series of sink_mass; in the summary, the mean of the last third of the layers minus that of the first.

    -1 to 1, null 0. Source: seed analysis.
    """
    return over_heads(sink_mass)
