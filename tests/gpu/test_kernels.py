"""The attention op and its rows on CUDA's fused kernels, against softmax in float64 on the CPU."""

import pytest
import torch

from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.rows import Scores
from tests.conftest import DEVICE
from tests.unit.test_op import CASES, case, softmax

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16", "float16"])
#: What is allowed of log-sum-exps and shares of attention: they are float32 whatever the inputs.
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-4, torch.float16: 1e-4}


def there(q, k, v, how):
    """Move the inputs, heads beside positions in memory, as Hugging Face's projections lay them out."""
    q, k, v = (x.transpose(1, 2).to(DEVICE).contiguous().transpose(1, 2) for x in (q, k, v))
    return q, k, v, {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in how.items()}


def compare(q, k, v, how, record):
    """Compare output, log-sum-exp and the first key's share with the textbook."""
    dtype = q.dtype
    expected, pattern, lse = softmax(q, k, v, **how)
    q, k, v, how = there(q, k, v, how)
    out, found = attention_with_lse(q, k, v, **how)
    scores = Scores(q, k, found, **how)
    keys = torch.zeros(len(q), dtype=torch.long, device=DEVICE)
    mass = scores.rows(0, q.shape[2]).mass(keys)
    assert (out.device.type, found.device.type, mass.device.type) == (DEVICE.type,) * 3
    assert (out.dtype, found.dtype) == (dtype, torch.float32)
    unit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(expected.abs().max())
    for name, ours, theirs, allowed in (
        ("output", out, expected, unit),
        ("lse", found, lse, EXACT[dtype] + 1e-6 * float(lse.abs().max())),  # float32 has seven digits, whatever their size
        ("share", mass, pattern[..., 0], EXACT[dtype]),
    ):
        error = float((ours.double().cpu() - theirs).abs().max())
        record(f"{name} {dtype}".replace("torch.", ""), error)
        assert error <= allowed, name  # NaN is not
    return scores, pattern


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_cuda_is_the_same(name, dtype, record_property):
    scores, pattern = compare(*case(name, dtype), record_property)
    for start, stop in scores.cuts():
        rows, expected = scores.rows(start, stop), pattern[:, :, start:stop, : stop if scores.causal else None]
        found = rows.pattern().double().cpu()
        torch.testing.assert_close(found, expected, atol=EXACT[dtype], rtol=0)
        assert (found[expected == 0] == 0).all()
        entropy = torch.special.entr(expected).sum(-1)
        torch.testing.assert_close(rows.entropy().double().cpu(), entropy, atol=10 * EXACT[dtype], rtol=0)
        torch.testing.assert_close(rows.row_sum().double().cpu(), expected.sum(-1), atol=EXACT[dtype], rtol=0)


@dtypes
@pytest.mark.parametrize("name", CASES)
def test_sums_without_rows(name, dtype, record_property):
    """Entropies, and what keys receive from some rows, by the kernel that forms neither."""
    scores, pattern = compare(*case(name, dtype), record_property)
    fits = scores.softcap is None and scores.bias is None
    assert (scores.kernels is not None) == (fits and DEVICE.type == "cuda")
    assert (list(scores.cuts(formed=False)) == [(0, scores.n)]) or scores.kernels is None
    rows = scores.rows(0, scores.n)
    chosen = torch.rand(len(pattern), scores.n, generator=torch.Generator().manual_seed(0)) < 0.7
    entropy = torch.special.entr(pattern).sum(-1)
    torch.testing.assert_close(rows.entropy().double().cpu(), entropy, atol=10 * EXACT[dtype], rtol=0)
    received = (pattern * chosen[:, None, :, None]).sum(2)
    found = rows.received(chosen.to(DEVICE)).double().cpu()
    record_property(f"received {dtype}".replace("torch.", ""), float((found - received).abs().max()))
    torch.testing.assert_close(found, received, atol=10 * EXACT[dtype], rtol=1e-5)


@dtypes
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("t", [1, 31, 129, 1000])
@pytest.mark.parametrize("d", [4, 20, 80, 128, 192, 256])
def test_sums_of_any_size(d, t, causal, dtype, record_property):
    """The same where tiles end elsewhere than texts and heads do."""
    q, k, v = drawn(t, dtype, d=d)
    scores, pattern = compare(q, k, v, {"scale": d**-0.5 / 2, "causal": causal}, record_property)
    rows, chosen = scores.rows(0, t), torch.ones(2, t, dtype=torch.bool, device=DEVICE)
    entropy = torch.special.entr(pattern).sum(-1)
    torch.testing.assert_close(rows.entropy().double().cpu(), entropy, atol=10 * EXACT[dtype], rtol=0)
    torch.testing.assert_close(rows.received(chosen).double().cpu(), pattern.sum(2), atol=10 * EXACT[dtype], rtol=1e-5)


def drawn(t, dtype, *, d=16, d_value=None, heads=4, kv=2):
    generator = torch.Generator().manual_seed(t)
    shapes = ((heads, d), (kv, d), (kv, d_value or d))
    return [(2 * torch.randn(2, h, t, size, generator=generator)).to(dtype) for h, size in shapes]


@dtypes
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("t", [1, 2, 31, 33, 65, 255, 257, 1000])
def test_lengths(t, window, dtype, record_property):
    compare(*drawn(t, dtype), {"scale": 0.25, "causal": True, "window": window}, record_property)


@dtypes
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("d", [4, 12, 20, 65, 80, 96, 128, 192, 256, 320])
def test_head_sizes(d, window, dtype, record_property):
    compare(*drawn(130, dtype, d=d), {"scale": d**-0.5 / 2, "causal": True, "window": window}, record_property)


@dtypes
@pytest.mark.parametrize(("d", "d_value"), [(24, 16), (192, 128), (64, 72)])
def test_values_of_another_size(d, d_value, dtype, record_property):
    compare(*drawn(130, dtype, d=d, d_value=d_value), {"scale": d**-0.5 / 2, "causal": True}, record_property)


@dtypes
@pytest.mark.parametrize("how", [{}, {"window": 1000}, {"softcap": 5.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("t", [8192, 20001])
def test_long(t, how, dtype, record_property):
    """Some rows in float64: all of them would be a T x T tensor."""
    t = t if DEVICE.type == "cuda" else t // 16
    q, k, v = drawn(t, dtype, d=64)
    how = {"scale": 0.0625, "causal": True} | how
    if "sinks" in how:
        how["sinks"] = torch.tensor([0.0, 3, 6, 9], dtype=dtype)
    q, k, v, how = there(q, k, v, how)
    out, lse = attention_with_lse(q, k, v, **how)
    mass = Scores(q, k, lse, **how).rows(0, t).mass(torch.tensor([0, t // 3], device=DEVICE))
    errors = {"output": 0.0, "lse": 0.0, "share": 0.0}
    for row in (0, 1, 31, 255, 256, t // 3, t - 2, t - 1):
        first = max(0, row + 1 - how.get("window", t))
        keys, values = (x[:, :, first : row + 1].repeat_interleave(2, 1).double() for x in (k, v))
        scores = 0.0625 * (q[:, :, row, None].double() @ keys.mT)[:, :, 0]
        if "softcap" in how:
            scores = how["softcap"] * (scores / how["softcap"]).tanh()
        own = how["sinks"].double().expand(2, 4)[..., None] if "sinks" in how else scores[..., :0]
        total = torch.cat([scores, own], -1).logsumexp(-1)
        weights = (scores - total[..., None]).exp()
        shares = torch.zeros(2, 4, device=DEVICE, dtype=torch.double)
        for text, key in enumerate((0, t // 3)):
            if first <= key <= row:
                shares[text] = weights[text, :, key - first]
        for name, ours, theirs in (
            ("output", out[:, :, row], (weights[:, :, None] @ values)[:, :, 0]),
            ("lse", lse[:, :, row], total),
            ("share", mass[:, :, row], shares),
        ):
            errors[name] = max(errors[name], float((ours.double() - theirs).abs().max()))
    for name, error in errors.items():
        record_property(f"long {name} {dtype}".replace("torch.", ""), error)
        unit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps * float(v.abs().max())
        assert error <= (unit if name == "output" else EXACT[dtype]), name


@pytest.mark.skipif(DEVICE.type != "cuda", reason="counts what CUDA's allocator hands out")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"window": 512}], ids=str)
def test_memory_grows_with_the_length_alone(how, dtype):
    """At 32,768 tokens and 8 heads the pattern would be 34 GB in float32."""
    t = 32_768
    q, k, v = (torch.randn(1, heads, t, 64, device=DEVICE, dtype=dtype) for heads in (8, 2, 2))
    how = {"scale": 0.125, "causal": True} | how
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    _, lse = attention_with_lse(q, k, v, **how)
    Scores(q, k, lse, **how).rows(0, t).mass(torch.zeros(1, dtype=torch.long, device=DEVICE))
    linear = 8 * t * 64 * 4
    assert torch.cuda.max_memory_allocated() - before < 8 * linear
    scores = Scores(q, k, lse, **how)
    scores.rows(0, t).received(torch.ones(1, t, dtype=torch.bool, device=DEVICE))
    assert torch.cuda.max_memory_allocated() - before < 8 * linear
    for start, stop in list(scores.cuts())[-3:]:
        scores.rows(start, stop).pattern()
    assert torch.cuda.max_memory_allocated() - before < 8 * t * t * 4 / 8


@dtypes
def test_gradients(dtype):
    """Of the output, through the fused kernel and through blocks of a window, against the textbook's."""
    for window in (None, 40):
        how = {"scale": 0.25, "causal": True, "window": window}
        inputs = drawn(130, dtype)
        leaves = [x.double().requires_grad_() for x in inputs]
        softmax(*leaves, **how)[0].square().sum().backward()
        q, k, v, how = there(*inputs, how)
        ours = [x.detach().requires_grad_() for x in (q, k, v)]
        attention_with_lse(*ours, **how)[0].float().square().sum().backward()
        for got, expected in zip(ours, leaves, strict=True):
            unit = (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps) * float(expected.grad.abs().max())
            assert float((got.grad.double().cpu() - expected.grad).abs().max()) <= unit
