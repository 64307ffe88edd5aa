"""The shape of whole rows: where attention lands over positions, and how spread out it is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.block import Block
from sinkscope.metrics.base import Array, derived, metric, over_heads


def with_a_choice(block: Block) -> Tensor:
    """Average over the queries that see at least two keys."""
    return block.n_visible > 1


@metric(needs="pattern", reads="entropy", unit="nats")
def row_entropy(block: Block) -> Tensor:
    """Mean entropy of an attention row, in nats; 0 (one key) to log T. Null: mean of log(i + 1)."""
    return block.entropy


@metric(needs="pattern", reads="entropy", over=with_a_choice, unit="share of the maximum")
def normalized_row_entropy(block: Block) -> Tensor:
    """Mean of row entropy over log(i + 1), its maximum, for rows with a choice; 0 to 1, null 1."""
    return block.entropy / block.n_visible[:, None, :].clamp(min=2).to(block.entropy.dtype).log()


@metric(needs="pattern", reads="entropy", unit="keys")
def effective_keys(block: Block) -> Tensor:
    """Mean number of keys that a row is spread over, exp(entropy); 1 to T. Null: mean of i + 1."""
    return block.entropy.exp()


@metric(needs="pattern", unit="share of attention")
def head_profile(block: Block) -> Tensor:
    """Mean over queries of A[i, k] for every key, per head; large: one row per (layer, head, key)."""
    return block.pattern


head_profile = replace(head_profile, reads="received")


def _alpha(profile: Array, tokens: int, causal: bool) -> Array:
    """Turn means over all T queries into means over the T - k queries that can see key k, `[..., key]`."""
    return profile * tokens / (tokens - np.arange(tokens)) if causal else profile


def sinks_in(profile: Array, tokens: int, causal: bool, eps: float) -> tuple[NDArray[np.bool_], Array]:
    """Tell where alpha_k exceeds a threshold, `[layer, head, key]`, and in which share of the heads there are, `[key]`."""
    above = _alpha(profile, tokens, causal) > eps
    return above, above.sum(axis=(0, 1)) / (~np.isnan(profile).all(-1)).sum()


@derived(of=("head_profile",), axes=("layer", "key"), unit="share of attention")
def position_profile(head_profile: Array, tokens: int, causal: bool) -> Array:
    """Mean over queries of the attention that each position receives, averaged over heads; sums to 1 over keys.

    mean over i and h of A[h, i, k]. Null: sum over i >= k of 1 / (i + 1), over T. Source: seed analysis.
    """
    return over_heads(head_profile)


@derived(of=("head_profile",), axes=("layer", "key"), unit="share of attention", every_query=True)
def received_profile(head_profile: Array, tokens: int, causal: bool) -> Array:
    """alpha_k of every position, averaged over heads: what it receives from the queries that can see it; 0 to 1.

    Source: Gu et al. 2024, arXiv 2410.10781.
    """
    return over_heads(_alpha(head_profile, tokens, causal))


#: A position is listed by `sink_positions` when it is a sink in at least this share of the heads.
SHARE_OF_HEADS = 0.1


@derived(
    of=("head_profile",),
    axes=("key",),
    total=lambda share: float(np.isfinite(share).sum()),
    eps=0.3,
    unit="share of heads",
    every_query=True,
)
def sink_positions(head_profile: Array, tokens: int, causal: bool, eps: float) -> Array:
    """Every position whose alpha_k exceeds the threshold in at least a tenth of the heads, with that share.

    In the summary, how many there are. Finds sinks that are not the first token: delimiters, [SEP], repeated tokens.
    Source: Gu et al. 2024, arXiv 2410.10781, over all k.
    """
    _, share = sinks_in(head_profile, tokens, causal, eps)
    return np.where(share >= SHARE_OF_HEADS, share, np.nan)
