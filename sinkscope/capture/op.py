"""attention_with_lse: attention that also gives the log-sum-exp of each row, and never a T x T tensor.

With `lse_i` = log of the sum over visible keys of exp(score), attention to any one key is exact for the price of a dot
product: `A[i, k] = exp(score_ik - lse_i)`. Fused kernels compute it anyway and PyTorch's public function throws it away:

- CPU: `_scaled_dot_product_flash_attention_for_cpu`; takes fewer key heads than query heads as they are (from torch 2.9 on);
- CUDA: `_scaled_dot_product_flash_attention` in half precision, `_scaled_dot_product_efficient_attention` in float32;
- elsewhere, and under a soft cap, which no kernel knows: plain torch, a few query rows at a time.

A sliding window runs in blocks of query rows over the keys in reach alone. A learned sink logit is one more term of the
sum, so it is closed form on top of any of these: the output shrinks by exp(lse - lse'), lse' = log(exp(lse) + exp(sink)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.models.versions import installed

#: Query rows at a time where attention runs in blocks; by a GPU's kernels, which form no scores.
ROWS, GPU_ROWS = 256, 1024


def attention_with_lse(
    q: Float[Tensor, "batch head position d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    v: Float[Tensor, "batch kv_head key d_value"],
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
    bias: Float[Tensor, "#batch #head position key"] | None = None,
    entries: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Float[Tensor, "batch head position d_value"], Float[Tensor, "batch head position"]]:
    """Attend, exactly.

    Args:
        q: queries, rotated and normed.
        k: keys, as many as queries where attention is causal; `head` is a multiple of `kv_head`, and query head h reads key
            head h // (head / kv_head).
        v: values.
        scale: factor on q.k.
        causal: query i sees no key after i.
        window: query i sees key k iff also abs(i - k) < window.
        softcap: c in score = c tanh(scale q.k / c).
        sinks: a learned logit per head that takes its share of each row and gives nothing.
        key_mask: which keys are real; every query must have one.
        bias: added to scores after the scale: relative positions (T5).
        entries: keys and values that are no tokens, beside the others, and what is added to their scores (DeepSeek V4).

    Returns:
        The output in q's dtype, and the log-sum-exp of each row (a sink's logit and entries included), at least float32.

    >>> q = torch.zeros(1, 1, 3, 8)
    >>> attention_with_lse(q, q, q, scale=1.0, causal=True)[1].exp()  # row i sums exp(0) over i + 1 keys
    tensor([[[1., 2., 3.]]])
    """
    t = q.shape[2]
    real = None if key_mask is None else _additive(key_mask[:, None, None, :], q.dtype)
    banded = window is not None and window < t
    added = (causal, real is not None, bias is not None)
    if softcap is None and not banded and sum(added) < 2 and _has_kernel(q):
        out, lse = _kernel(q, k, v, scale, causal, real if bias is None else bias)
    else:
        out = q.new_empty(q.shape[0], t, q.shape[1], v.shape[3]).transpose(1, 2)  # Hugging Face wants it so
        lse = torch.empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        step = GPU_ROWS if q.is_cuda and softcap is None else ROWS
        for rows, keys, seen in _blocks(q, k.shape[2], causal, window if banded else None, step):
            here: Tensor | None
            if key_mask is not None and seen is not None:  # a pad's row may see no key at all, and must stay a number
                here = _additive(seen & key_mask[:, None, None, keys], q.dtype, torch.finfo(q.dtype).min)
            else:
                masked = None if real is None else real[..., keys]
                here = masked if seen is None else _additive(seen, q.dtype)
            if bias is not None:
                here = bias[:, :, rows, keys] if here is None else bias[:, :, rows, keys] + here
            part = q[:, :, rows], k[:, :, keys], v[:, :, keys]
            if softcap is None and _has_kernel(q):
                out[:, :, rows], lse[:, :, rows] = _kernel(*part, scale, False, here)
            else:
                out[:, :, rows], lse[:, :, rows] = _plain(*part, scale, softcap, here)
    if entries is not None:
        also, other = attention_with_lse(q, *entries[:2], scale=scale, causal=False, bias=entries[2])
        total = torch.logaddexp(lse, other)
        out = out * (lse - total).exp_().to(out.dtype)[..., None] + also * (other - total).exp_().to(out.dtype)[..., None]
        lse = total
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = out * (lse - total).exp_().to(out.dtype)[..., None]
        lse = total
    return out, lse


def _blocks(
    q: Tensor, n_keys: int, causal: bool, window: int | None, step: int
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Cut the rows; give, with each block, the keys in its reach and which of them each row sees (None: all)."""
    t = q.shape[2]
    for start in range(0, t, step):
        stop = min(start + step, t)
        first = 0 if window is None else max(0, start - window + 1)
        last = stop if causal else n_keys if window is None else min(n_keys, stop + window - 1)
        seen = None
        if causal or window is not None:
            gap = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, last, device=q.device)
            seen = gap >= 0 if causal else torch.ones_like(gap, dtype=torch.bool)
            seen = seen if window is None else seen & (gap.abs() < window)
        yield slice(start, stop), slice(first, last), seen


def _additive(seen: Tensor, dtype: torch.dtype, hidden: float = float("-inf")) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, hidden)


def _has_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu" or (q.device.type == "cuda" and q.dtype != torch.float64)


def _kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call the fused kernel of the device: causal, or with `bias` added to the scores, not both."""
    d_value = v.shape[3]
    # The kernels want one head size, on CUDA a multiple of 8: zeros change no score, and their columns are cut off.
    size = max(q.shape[3], d_value)
    size += -size % 8 if q.device.type == "cuda" else 0
    q, k, v = (x if x.shape[3] == size else F.pad(x, (0, size - x.shape[3])) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if q.device.type == "cpu":
        if groups > 1 and installed("torch") < (2, 9):  # whose kernel would read on behind the key heads that there are
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=bias if bias is None or bias.ndim == 4 else bias[None, None], scale=scale
        )
    elif bias is None and q.dtype != torch.float32 and size <= 256:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
    else:
        k, v = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (k, v))
        out, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None if bias is None else _aligned(bias, q, k), True, 0.0, causal, scale=scale
        )[:2]
    return out[..., :d_value], lse[:, :, : q.shape[2]]  # the efficient kernel pads lse to a multiple of 32


def _aligned(bias: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Lay a mask out as the efficient kernel reads it: rows that start at multiples of 16 elements."""
    n = k.shape[2]
    wide = F.pad(bias, (0, -n % 16))[..., :n]
    return wide.expand(q.shape[0], q.shape[1], q.shape[2], n)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attend in plain torch, float32 inside; the grouped queries of a key head are rows of one product."""
    scores = scores_of(q, k, scale, softcap)
    if bias is not None:
        scores += bias
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse[..., None]).exp_()
    b, h, n, keys = weights.shape
    out = weights.view(b, k.shape[1], -1, keys) @ v.to(weights.dtype)
    return out.view(b, h, n, -1).to(q.dtype), lse


def scores_of(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    softcap: float | None = None,
    memory: Callable[..., Tensor] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Give the scores, at least float32, in a tensor of their own; keys are not expanded to the query heads.

    `memory(like, *shape)` may give the tensor that they are written to.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    b, h, n, d = q.shape
    grouped, keys = q.to(dtype), k.to(dtype).mT
    if k.shape[2] < n:
        keys = keys * scale  # whichever is the smaller to scale
    else:
        grouped = grouped * scale
    grouped = grouped.reshape(b, k.shape[1], -1, d)
    out = None if memory is None else memory(grouped, b, k.shape[1], grouped.shape[2], k.shape[2])
    scores = torch.matmul(grouped, keys, out=out)
    if softcap is not None and scores.requires_grad:
        scores = (scores / softcap).tanh() * softcap
    elif softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.view(b, h, n, -1)
