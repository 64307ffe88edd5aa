"""Entropies of rows and sums of columns on a GPU, by a Triton kernel: whole rows are never formed, not even in blocks.

A block of whole rows is written and read a dozen times. Here a tile of scores becomes shares of attention and is added up
while it is in registers. Products of half precision are exact in float32; those of float32 are made of three in TF32, as
PyTorch's fused attention makes them: rows sum up to 1 within 1e-5.

Triton comes with PyTorch for CUDA. Where it is not there, or does not run, blocks are formed as on a CPU: :func:`usable`.
"""
# ruff: noqa: ANN001, ANN202 (Triton reads types off the call)

from __future__ import annotations

from functools import cache
from typing import Any, no_type_check

import torch
from jaxtyping import Bool, Float
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for a CPU comes without it
    triton = None

#: How float32 is multiplied.
PRECISION = "tf32x3"


@no_type_check
def _add_up(
    own, other, shift, mask, total, product, n_own, n_other, window, scale, heads, own_group, other_group,
    own0, own1, own2, own3, other0, other1, other2, other3,
    KEYS: tl.constexpr, CAUSAL: tl.constexpr, BANDED: tl.constexpr, MASKED: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add up A, over the keys that M rows of a head see, or (KEYS) over the rows that see M keys; of rows A log A too.

    `shift` is what is taken off a row's scores, infinity for one that does not count.
    """
    text, head, begin = tl.program_id(1) // heads, tl.program_id(1) % heads, tl.program_id(0) * M
    mine, width = begin + tl.arange(0, M), tl.arange(0, WIDE)
    inside = mine < n_own
    own += text.to(tl.int64) * own0 + (head // own_group).to(tl.int64) * own1
    other += text.to(tl.int64) * other0 + (head // other_group).to(tl.int64) * other1
    spots = mine[:, None].to(tl.int64) * own2 + width[None, :] * own3
    tile = tl.load(own + spots, mask=inside[:, None] & (width < D)[None, :], other=0.0)
    at = tl.program_id(1).to(tl.int64) * n_own + mine
    mask += text.to(tl.int64) * (n_own if KEYS else n_other)
    first, last = 0, n_other
    if BANDED:
        first, last = tl.maximum(0, begin - window + 1), tl.minimum(n_other, begin + M + window - 1)
    if KEYS:
        shift += tl.program_id(1).to(tl.int64) * n_other
        if CAUSAL:
            first = begin
        if MASKED:
            inside = inside & (tl.load(mask + mine, mask=inside, other=0) != 0)
    else:
        off = tl.load(shift + at, mask=inside, other=float("inf"))[:, None]
        if CAUSAL:
            last = tl.minimum(last, begin + M)
    sums, products = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
    for start in range(first // N * N, last, N):
        theirs = start + tl.arange(0, N)
        there = theirs < n_other
        places = theirs[None, :].to(tl.int64) * other2 + width[:, None] * other3
        part = tl.load(other + places, mask=there[None, :] & (width < D)[:, None], other=0.0)
        if KEYS:
            off = tl.load(shift + theirs, mask=there, other=float("inf"))[None, :]
        elif MASKED:
            there = there & (tl.load(mask + theirs, mask=there, other=0) != 0)
        seen = inside[:, None] & there[None, :]
        gap = theirs[None, :] - mine[:, None]
        if CAUSAL:
            seen = seen & ((gap >= 0) if KEYS else (gap <= 0))
        if BANDED:
            seen = seen & (gap < window) & (-gap < window)
        logs = tl.dot(tile, part, input_precision=PRECISION) * scale - off
        shares = tl.where(seen, tl.exp(logs), 0.0)
        sums += tl.sum(shares, 1)
        if not KEYS:
            products += tl.sum(tl.where(seen, shares * logs, 0.0), 1)
    tl.store(total + at, sums, mask=mine < n_own)
    if not KEYS:
        tl.store(product + at, products, mask=mine < n_own)


@cache
def _compiled() -> Any:
    return triton.jit(_add_up, do_not_specialize=["n_own", "n_other", "window"])


def add_up(
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    shift: Float[Tensor, "batch head query"],
    *,
    over: str,
    scale: float,
    causal: bool,
    window: int | None = None,
    key_mask: Bool[Tensor, "batch key"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Add up A = exp(scale q.k - shift) over `"keys"`, beside it A log A; or over `"queries"`.

    The other arguments are those of :func:`sinkscope.capture.op.attention_with_lse`. A row whose shift is infinite adds
    nothing.

    Returns:
        Two sums, `[batch, head, query]`; over queries the sum, `[batch, head, key]`, twice.
    """
    keys = over == "queries"
    b, h, _, d = q.shape
    own, other = (k, q) if keys else (q, k)
    groups = h // q.shape[1], h // k.shape[1]
    n = own.shape[2]
    total = torch.empty(b, h, n, dtype=torch.float32, device=q.device)
    product = total if keys else torch.empty_like(total)
    exact, wide = q.dtype == torch.float32, max(16, triton.next_power_of_2(d))
    size = (64 if exact else 128) if wide <= 128 else (32 if exact else 64)
    step = min(size, 64)
    _compiled()[triton.cdiv(n, size), b * h](
        own, other, shift.contiguous(), q if key_mask is None else key_mask.contiguous(), total, product,
        n, other.shape[2], window or 0, scale, h, *(groups[::-1] if keys else groups), *own.stride(), *other.stride(),
        KEYS=keys, CAUSAL=causal, BANDED=window is not None, MASKED=key_mask is not None,
        D=d, WIDE=wide, M=size, N=step, PRECISION=PRECISION if exact else "ieee", num_warps=4 if exact else 8,
    )  # fmt: skip
    return total, product


@cache
def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a kernel runs there: Triton needs a compiler, and a GPU that it knows."""
    q = torch.zeros(1, 1, 16, 16, dtype=dtype, device=device)
    try:
        total, _ = add_up(q, q, q[..., 0].float(), over="keys", scale=1.0, causal=True)
    except Exception:  # whatever Triton raises: blocks take over
        return False
    return total[0, 0].tolist() == list(range(1, 17))
