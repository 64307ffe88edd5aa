"""Why a key is a sink: the queries, keys, values, head outputs and residual stream behind attention.

These need activations besides attention, which are hooked only when they are asked for. Chance has no value for them. Those
that describe a whole text give the same number in every row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sinkscope.block import Block
from sinkscope.metrics.base import Array, derived, mean_of, metric
from sinkscope.metrics.mass import seeing_key, with_a_choice


def _at_key(block: Block, per_position: Tensor) -> Tensor:
    """Take the sink key's entry, `[batch, position, ...]` -> `[batch, ...]`."""
    keys = block.keys.to(per_position.device)
    return per_position[torch.arange(len(keys), device=keys.device), keys]


def _real(per_position: Tensor, lengths: Tensor) -> Tensor:
    """Mark with NaN what stands at pads, `[batch, position, ...]`."""
    real = torch.arange(per_position.shape[1], device=per_position.device) < lengths[:, None].to(per_position.device)
    return per_position.masked_fill(~real.reshape(*real.shape, *[1] * (per_position.ndim - 2)), torch.nan)


def median(values: Tensor, dim: int) -> Tensor:
    """Median of what is not NaN; of an even number, the mean of the middle two."""
    return (values.nanmedian(dim=dim).values - (-values).nanmedian(dim=dim).values) / 2  # torch gives the lower middle one


def _every_row(block: Block, per_head: Tensor) -> Tensor:
    """Repeat one number per head in every row, `[batch, head]` -> `[batch, head, query]`."""
    return per_head[..., None].expand(-1, -1, block.n_queries)


def _for_queries(per_kv_head: Tensor, heads: int) -> Tensor:
    """Repeat grouped key-value heads for the query heads that share them, `[batch, position, kv_head, ...]`."""
    return per_kv_head.repeat_interleave(heads // per_kv_head.shape[2], dim=2)


def _drain(block: Block, vectors: Tensor) -> Tensor:
    """Norm of the sink key's vector over the median norm of a text's vectors, `[batch, kv_head]`."""
    norms = vectors.float().norm(dim=-1)
    return _at_key(block, norms) / median(_real(norms, block.real_keys), dim=1)


@metric(needs="value", at_key=True, unit="times the median")
def value_drain(block: Block) -> Tensor:
    """Norm of the sink key's value over the median norm of all values; below 1, the sink has little to say.

    |v_k| / median over j of |v_j|, per key-value head. Source: value-state drain of Guo et al. 2024, arXiv 2410.13835.
    """
    return _every_row(block, _drain(block, block.value))


@metric(needs="rotated_key", at_key=True, unit="norm")
def key_norm(block: Block) -> Tensor:
    """Norm of the sink key's key vector, as scores see it, per key-value head; 0 and up.

    |k_k|. Source: Gu et al. 2024, arXiv 2410.10781, who find it small.
    """
    return _every_row(block, _at_key(block, block["rotated_key"].float().norm(dim=-1)))


@metric(needs="rotated_key", at_key=True, unit="times the median")
def key_drain(block: Block) -> Tensor:
    """Norm of the sink key's key vector over the median norm of all keys, per key-value head; 0 and up.

    |k_k| / median over j of |k_j|. Source: this library, as value_drain.
    """
    return _every_row(block, _drain(block, block["rotated_key"]))


@metric(needs=("rotated_query", "rotated_key"), over=seeing_key, at_key=True, unit="cosine")
def query_key_cosine(block: Block) -> Tensor:
    """Mean cosine of a query with the sink key, as scores see both (after any rotation); -1 to 1.

    mean over i >= k of cos(q_i, k_k). Source: Gu et al. 2024, arXiv 2410.10781: the angle, not the norms, makes the score.
    """
    queries = block["rotated_query"].float()
    keys = _at_key(block, _for_queries(block["rotated_key"].float(), queries.shape[2]))
    return torch.nn.functional.cosine_similarity(queries, keys[:, None], dim=-1).transpose(1, 2)


@metric(needs=("mass", "value", "output", "gate"), over=with_a_choice, unit="share of the output's norm")
def sink_output_share(block: Block) -> Tensor:
    """Norm of what the sink key adds to a head's output, over that output's norm; 0 and up.

    Above 1, the other keys cancel it. Where outputs are gated, both as the gate lets them through.

    mean over i of |g_i A[i, k] v_k| / |g_i z_i|, over queries with a choice; g_i is 1 where there is no gate. Source: NOP and
    broadcast sinks, arXiv 2606.08105.
    """
    gate = block["gate"].float()
    z = (gate * block["output"].float()).norm(dim=-1)
    v = _at_key(block, _for_queries(block.value.float(), z.shape[2]))
    added = (gate * v[:, None]).norm(dim=-1) if gate.shape[-1] > 1 else gate[..., 0] * v.norm(dim=-1)[:, None]
    shares: Tensor = block.mass * (added / z.clamp_min(torch.finfo(z.dtype).tiny)).transpose(1, 2)
    return shares


@metric(needs="gate", unit="share let through")
def gate_mean(block: Block) -> Tensor:
    """Mean of the gate on a head's output, over its numbers and the queries; 0 (closed) to 1, which it is without a gate.

    A gate that is a softplus (Laguna's) has no upper bound: it may amplify. mean over i and d of g[i, d]. Source: gated
    attention of Qiu et al. 2025, arXiv 2505.06708.
    """
    return block["gate"].float().mean(-1).transpose(1, 2)


@derived(of=("gate_mean",), axes=("layer", "head"), total=mean_of, eps=0.1, unit="share of heads")
def gate_closed(gate_mean: Array, tokens: int, causal: bool, eps: float) -> Array:
    """Whether a head's gate lets less than eps through on average: 1 (closed) or 0; in the summary, the share of heads.

    Source: this library; what is behind a closed gate is not written, a sink included.
    """
    return np.where(np.isnan(gate_mean), np.nan, gate_mean < eps)


@metric(needs="output", unit="times the layer's mean")
def head_output_norm(block: Block) -> Tensor:
    """Mean norm of a head's output over the mean of its layer's heads; well below 1, the head is inactive.

    mean over i of |z_i| / mean over i and heads. Source: the best of the head scores of arXiv 2504.03889.
    """
    norms = _real(block["output"].float().norm(dim=-1), block.lengths)
    return (norms / norms.nanmean(dim=(1, 2), keepdim=True)).nan_to_num(0.0).transpose(1, 2)


@derived(
    of=("received", "sink_output_share"),
    axes=("layer", "head"),
    total=mean_of,
    eps=0.5,
    at_key=True,
    unit="share of sink heads",
)
def nop_rate(received: Array, sink_output_share: Array, tokens: int, causal: bool, eps: float) -> Array:
    """Label of a head whose sink key receives over 0.3: 1 (NOP) if its sink_output_share is below eps, else 0 (broadcast).

    In the summary, the share of NOP heads among sink heads. Source: NOP and broadcast sinks, arXiv 2606.08105; thresholds are
    this library's.
    """
    return np.where((received > 0.3) & ~np.isnan(sink_output_share), sink_output_share < eps, np.nan)


# --- the residual stream: one number per layer, in the place of head 0 --------------------------------------------------


def _magnitudes(block: Block) -> Tensor:
    """Magnitudes of the residual stream after the layer, `[batch, position * d_model]`; NaN at pads."""
    return _real(block.residual.float().abs(), block.lengths).flatten(1)


def _largest(size: Tensor) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each text, and where it is in `_magnitudes`."""
    found = size.nan_to_num(-1.0).max(dim=1)
    return found.values, found.indices


@metric(needs="residual", unit="times the median")
def massive_activation(block: Block) -> Tensor:
    """Largest magnitude in the residual stream after a layer over the median magnitude there; 1 and up.

    max |h| / median |h| over tokens and dimensions. Source: Sun et al. 2024, arXiv 2402.17762.
    """
    size = _magnitudes(block)
    return _every_row(block, (_largest(size)[0] / median(size, dim=1))[:, None])


@metric(needs="residual", unit="magnitude")
def massive_magnitude(block: Block) -> Tensor:
    """Largest magnitude in the residual stream after a layer; 0 and up. Source: Sun et al. 2024, arXiv 2402.17762."""
    return _every_row(block, _largest(_magnitudes(block))[0][:, None])


@metric(needs="residual", unit="position")
def massive_position(block: Block) -> Tensor:
    """Position of the token with the largest magnitude after a layer; means over texts say something only if they agree."""
    return _every_row(block, (_largest(_magnitudes(block))[1] // block.residual.shape[-1]).float()[:, None])


@metric(needs="residual", unit="dimension")
def massive_dimension(block: Block) -> Tensor:
    """Dimension with the largest magnitude after a layer; means over texts say something only if they agree."""
    return _every_row(block, (_largest(_magnitudes(block))[1] % block.residual.shape[-1]).float()[:, None])


@derived(
    of=("massive_magnitude", "massive_activation"),
    axes=("layer",),
    total=lambda rule: float(rule.mean()),
    unit="share of layers",
)
def massive_rule(massive_magnitude: Array, massive_activation: Array, tokens: int, causal: bool) -> Array:
    """Whether a layer has an activation above 100 and at least 1,000 times the median; in the summary, the share of layers.

    Source: Sun et al. 2024, arXiv 2402.17762, section 2.2. Made for large models: small ones may stay below it.
    """
    size, ratio = massive_magnitude[:, 0], massive_activation[:, 0]
    return np.where(np.isnan(size), np.nan, (size > 100) & (ratio >= 1000))


@metric(needs="residual", unit="nats")
def matrix_entropy(block: Block) -> Tensor:
    """Entropy of the residual stream's squared singular values after a layer, in nats; 0 (one direction) to log min(T, d).

    -sum p log p, p = s^2 / sum s^2 of the matrix [token, dimension]. Source: compression valleys, arXiv 2510.06477.
    """
    entropies = []
    for h, length in zip(block.residual.double(), block.lengths.tolist(), strict=True):
        real = h[:length]
        squares = torch.linalg.eigvalsh(real @ real.T if length <= real.shape[1] else real.T @ real).clamp_min(0)
        entropies.append(torch.special.entr(squares / squares.sum()).sum())
    return _every_row(block, torch.stack(entropies).float()[:, None])
