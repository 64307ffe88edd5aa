"""Numerics: half precision on real weights, scores of 1e5, rows with nothing to see, and the number of threads."""

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.rows import Scores
from tests.conftest import most_slow
from tests.model.compare import novel

#: How far one head's sink mass, a row entropy in nats, and the model's sink mass may be from float32, on SmolLM2.
BOUNDS = {torch.bfloat16: (0.03, 0.1, 0.003), torch.float16: (0.003, 0.01, 0.0003)}


@pytest.mark.model
@pytest.mark.parametrize("dtype", most_slow(BOUNDS, torch.bfloat16))
def test_half_precision_on_real_weights(smollm2, dtype):
    half = ss.load_model("smollm2-135m", device="cpu", dtype=dtype)
    head, entropy, whole = BOUNDS[dtype]
    expected, got = (ss.measure(m, novel(256), ["sink_mass", "row_entropy"], max_tokens=128) for m in (smollm2, half))
    gaps = (got.frame["value"] - expected.frame["value"]).abs().groupby(got.frame["metric"]).max()
    assert gaps["sink_mass"] < head
    assert gaps["row_entropy"] < entropy
    values = [r.summary("all").set_index("metric")["value"] for r in (got, expected)]
    assert values[0]["sink_mass"] == pytest.approx(values[1]["sink_mass"], abs=whole)


@pytest.mark.model
def test_threads_change_nothing_that_counts(smollm2):
    reports = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        reports.append(ss.measure(smollm2, novel(256), max_tokens=256).frame["value"])
    torch.set_num_threads(1)
    np.testing.assert_allclose(reports[0], reports[1], atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(reports[0], reports[2])


LAYERS = [{"causal": True}, {"causal": True, "window": 40}, {"causal": True, "softcap": 50.0}, {"causal": False}]


@pytest.mark.parametrize("largest", [1e3, 1e5])
@pytest.mark.parametrize("how", LAYERS, ids=str)
def test_extreme_scores(largest, how):
    """Scores up to 1e5: each is known to a few units in its last place, and so is its exponential, relative to it."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, 16, generator=generator) for _ in range(3))
    scale = largest / float((q @ k.mT).abs().max())
    scores = (q.double() @ k.double().mT) * scale
    if "softcap" in how:
        scores = how["softcap"] * (scores / how["softcap"]).tanh()
    gap = torch.arange(300)[:, None] - torch.arange(300)
    if how["causal"]:
        scores = scores.masked_fill((gap < 0) | (gap >= how.get("window", 300)), float("-inf"))
    pattern = scores.softmax(-1)
    out, lse = attention_with_lse(q, k, v, scale=scale, **how)
    bound = 4 * torch.finfo(torch.float32).eps * largest  # 0.05 at 1e5
    torch.testing.assert_close(out.double(), pattern @ v.double(), atol=4 * bound, rtol=0)
    rows = Scores(q, k, lse, scale=scale, **how).rows(0, 300)
    mass = rows.mass(torch.tensor([0]))
    assert 0 <= float(mass.min()) <= float(mass.max()) <= 1
    torch.testing.assert_close(mass.double(), pattern[..., 0], atol=bound, rtol=0)
    torch.testing.assert_close(rows.pattern().double(), pattern, atol=bound, rtol=0)
    assert bool(torch.isfinite(rows.entropy()).all())


def test_a_row_with_nothing_to_see_gives_nothing():
    q = torch.randn(2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 6, [False] * 6])
    out, lse = attention_with_lse(q, q, q, scale=1.0, causal=False, key_mask=mask)
    assert bool(torch.isfinite(out).all())
    assert float(out[1].abs().max()) == 0
    pattern = Scores(q, q, lse, scale=1.0, causal=False, key_mask=mask).rows(0, 6).pattern()
    assert float(pattern[1].abs().max()) == 0
    torch.testing.assert_close(pattern[0].sum(-1), torch.ones(2, 6))
