"""attention_with_lse and the rows made from it, against plain softmax in float64; and that no T x T tensor is formed."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sinkscope.capture import op
from sinkscope.capture import rows as rows_module
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.proof import in_tf32
from sinkscope.capture.rows import Scores

T = 300  # two blocks of rows, the second not full
CASES = {
    "causal": {},
    "grouped": {"kv": 2},
    "one key head": {"kv": 1},
    "scale": {"scale": 0.4},
    "other value size": {"d_value": 24},
    "window": {"window": 5, "kv": 2},
    "window over blocks": {"window": 270},
    "window over all": {"window": T},
    "soft cap": {"softcap": 2.0, "kv": 2},
    "soft cap and window": {"softcap": 2.0, "window": 40},
    "learned sinks": {"sinks": True, "kv": 2},
    "learned sinks and window": {"sinks": True, "window": 40},
    "encoder": {"causal": False},
    "encoder with pads": {"causal": False, "pads": True, "kv": 2},
    "encoder with pads and soft cap": {"causal": False, "pads": True, "softcap": 2.0},
    "causal with pads": {"pads": True},
}


def case(name, dtype=torch.float32, t=T):
    """Inputs of `attention_with_lse`: two sequences, four heads."""
    recipe = dict(CASES[name])
    generator = torch.Generator().manual_seed(0)
    kv, d_value = recipe.pop("kv", 4), recipe.pop("d_value", 16)
    q, k, v = (
        (2 * torch.randn(2, heads, t, d, generator=generator)).to(dtype) for heads, d in ((4, 16), (kv, 16), (kv, d_value))
    )
    how = {"scale": recipe.pop("scale", 0.25), "causal": recipe.pop("causal", True)}
    if recipe.pop("sinks", False):
        how["sinks"] = torch.randn(4, generator=generator).to(dtype)
    if recipe.pop("pads", False):
        how["key_mask"] = torch.arange(t) < torch.tensor([[t], [t - 7]])
    return q, k, v, how | recipe


def softmax(q, k, v, *, scale, causal, window=None, softcap=None, sinks=None, key_mask=None):
    """Output, pattern and log-sum-exp by the textbook, in float64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    t = q.shape[2]
    scores = scale * q @ k.mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    gap = torch.arange(t)[:, None] - torch.arange(t)
    seen = (gap >= 0 if causal else gap == gap) & (gap < (t if window is None else window))
    seen = seen if key_mask is None else seen & key_mask[:, None, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)], -1)
    pattern = scores.softmax(-1)[..., :t]
    return pattern @ v, pattern, scores.logsumexp(-1)


def scores_and_truth(name, dtype=torch.float32):
    q, k, v, how = case(name, dtype)
    out, lse = attention_with_lse(q, k, v, **how)
    return out, Scores(q, k, lse, **how), softmax(q, k, v, **how)


@pytest.mark.classes  # at the corners, too: kernels of torch 2.6 know no grouped heads
@pytest.mark.parametrize("way", ["kernel", "older torch", "plain"])
@pytest.mark.parametrize("name", CASES)
def test_output_and_lse(name, way, monkeypatch):
    if way == "plain":
        monkeypatch.setattr(op, "_has_kernel", lambda q: False)
    if way == "older torch":
        monkeypatch.setattr(op, "installed", lambda package: (2, 6))
    out, scores, (expected, _, lse) = scores_and_truth(name)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.lse.double(), lse, atol=5e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_mass_is_a_column_of_the_pattern(name):
    _, scores, (_, pattern, _) = scores_and_truth(name)
    for keys in ([0, 0], [3, 200], [T - 8, 257]):
        for start, stop in ((0, T), (100, 280)):
            mass = scores.rows(start, stop).mass(torch.tensor(keys))
            expected = torch.stack([pattern[b, :, start:stop, k] for b, k in enumerate(keys)])
            torch.testing.assert_close(mass.double(), expected, atol=2e-6, rtol=1e-5)
            assert (mass[expected == 0] == 0).all()


@pytest.mark.parametrize("cut", [None, 7, 64])
@pytest.mark.parametrize("name", CASES)
def test_whole_rows(name, cut, monkeypatch):
    """Every cut gives the same rows, entropies and sums of rows, keys up to the block's last row alone."""
    if cut is not None:
        monkeypatch.setattr(rows_module, "ROWS", cut)
    _, scores, (_, pattern, _) = scores_and_truth(name)
    cuts = list(scores.cuts())
    assert cuts[0][0] == 0
    assert cuts[-1][1] == T
    assert all(a[1] == b[0] for a, b in itertools.pairwise(cuts))
    assert all(stop - start <= (cut or 256) for start, stop in cuts)
    for start, stop in cuts:
        rows, expected = scores.rows(start, stop), pattern[:, :, start:stop, : stop if scores.causal else None]
        found = rows.pattern()
        assert found.shape == expected.shape
        torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=1e-5)
        assert (found[expected == 0] == 0).all()
        torch.testing.assert_close(rows.entropy().double(), torch.special.entr(expected).sum(-1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(rows.row_sum().double(), expected.sum(-1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ["causal", "window", "learned sinks", "encoder with pads"])
def test_whole_rows_mend_an_inexact_log_sum_exp(name, monkeypatch):
    """As CUDA's kernels give them: off by some, more where scores are large."""
    _, scores, (_, pattern, lse) = scores_and_truth(name)
    monkeypatch.setattr(Scores, "exact", False)
    off = dataclasses.replace(scores, lse=(lse + 5e-4 * torch.sin(torch.arange(float(T)))).float())
    if name == "learned sinks":  # their share is told by the log-sum-exp itself
        off = dataclasses.replace(scores, lse=(lse + 1e-7).float())
    for start, stop in off.cuts():
        rows, expected = off.rows(start, stop), pattern[:, :, start:stop, : stop if off.causal else None]
        torch.testing.assert_close(rows.pattern().double(), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(rows.entropy().double(), torch.special.entr(expected).sum(-1), atol=1e-5, rtol=1e-5)


def test_what_is_wrong_is_not_mended(monkeypatch):
    """Else no row could miss its sum, and the proof of the engine would have nothing to see on a GPU."""
    _, scores, _ = scores_and_truth("causal")
    monkeypatch.setattr(Scores, "exact", False)
    off = dataclasses.replace(scores, lse=scores.lse + 0.01)
    assert float((off.rows(0, T).pattern().sum(-1) - 1).abs().min()) > 5e-3


def test_learned_sinks_take_a_share():
    _, scores, _ = scores_and_truth("learned sinks")
    assert (scores.rows(0, T).row_sum() < 0.999).any()


def test_a_score_that_overflows_exp_stays_unseen():
    """exp of a later key's score is infinite in float32, and must be no part of an earlier row."""
    q = torch.ones(1, 1, 4, 8)
    k = torch.zeros(1, 1, 4, 8)
    k[0, 0, 3] = 100.0
    _, lse = attention_with_lse(q, k, q, scale=1.0, causal=True)
    rows = Scores(q, k, lse, scale=1.0, causal=True).rows(0, 4)
    expected = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0], [1 / 3, 1 / 3, 1 / 3, 0], [0, 0, 0, 1]])
    torch.testing.assert_close(rows.pattern()[0, 0], expected)
    torch.testing.assert_close(rows.entropy()[0, 0], torch.tensor([0, 2.0, 3.0, 1.0]).log().clamp(min=0))
    assert rows.mass(torch.tensor([3])).tolist() == [[[0, 0, 0, 1]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal", "window", "soft cap", "learned sinks", "encoder with pads"])
def test_half_precision(name, dtype):
    """Scores and sums are float32 whatever the inputs; the output is rounded once or twice: two units in the last place."""
    out, scores, (expected, pattern, lse) = scores_and_truth(name, dtype)
    assert out.dtype == dtype
    assert scores.lse.dtype == scores.rows(0, T).pattern().dtype == torch.float32
    torch.testing.assert_close(scores.lse.double(), lse, atol=1e-4, rtol=0)
    torch.testing.assert_close(scores.rows(0, T).mass(torch.tensor([0, 0])).double(), pattern[..., 0], atol=1e-4, rtol=0)
    unit = torch.finfo(dtype).eps * expected.abs().max()
    assert float((out.double() - expected).abs().max()) < 2 * unit


class Largest(TorchDispatchMode):
    """Records the largest tensor that any operation gives, by the number of elements in its memory."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("name", ["causal", "window", "grouped", "learned sinks", "encoder", "encoder with pads"])
def test_mass_forms_nothing_that_grows_with_t_squared(name):
    t = 2048
    q, k, v, how = case(name, t=t)
    with Largest() as largest:
        _, lse = attention_with_lse(q, k, v, **how)
        rows = Scores(q, k, lse, **how).rows(0, t)
        rows.mass(torch.tensor([0, 1]))
        rows.row_sum()
    linear = q.numel()  # [batch, head, T, d]
    banded = 2 * 4 * 256 * (256 + 5)
    assert largest.size <= max(linear, banded)
    with Largest() as largest:
        rows.pattern()
    assert largest.size >= (t * t if name != "window" else t)  # so that the assertion above can fail


def test_blocks_of_whole_rows_are_bounded():
    q, k, v, how = case("grouped", t=2048)
    scores = Scores(q, k, attention_with_lse(q, k, v, **how)[1], **how)
    with Largest() as largest:
        for start, stop in scores.cuts():
            scores.rows(start, stop).pattern()
    assert largest.size * 4 <= 1.1 * rows_module.BYTES


@pytest.mark.parametrize(("tile", "square"), [(3_000, (23, 35)), (30_000, (40, 29)), (500_000, (64, 512))])
@pytest.mark.parametrize("name", CASES)
def test_sums_tile_by_tile(name, tile, square, monkeypatch):
    """Entropies and what keys receive, by rows of one head, by texts, and by heads of all texts at once."""
    monkeypatch.setattr(rows_module, "TILE", tile)
    monkeypatch.setattr(rows_module, "SQUARE", square)
    _, scores, (_, pattern, _) = scores_and_truth(name)
    assert list(scores.cuts(formed=False)) == [(0, T)]
    chosen = torch.rand(len(pattern), T, generator=torch.Generator().manual_seed(0)) < 0.7
    entropy, received = torch.special.entr(pattern).sum(-1), (pattern * chosen[:, None, :, None]).sum(2)
    both, alone, formed = (scores.rows(0, T) for _ in range(3))
    torch.testing.assert_close(both.received(chosen).double(), received, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(both.entropy().double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone.entropy().double(), entropy, atol=1e-5, rtol=1e-5)
    whole = formed.pattern()
    torch.testing.assert_close(formed.entropy().double(), entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(formed.received(chosen).double(), received, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(whole.double(), pattern, atol=2e-6, rtol=1e-5)


def test_tiles_are_small_and_made_once():
    q, k, v, how = case("grouped", t=2048)
    scores = Scores(q, k, attention_with_lse(q, k, v, **how)[1], **how)
    rows = scores.rows(0, 2048)
    with Largest() as largest:
        rows.received(torch.ones(len(q), 2048, dtype=torch.bool))
    assert 4 * largest.size <= 1.1 * rows_module.TILE
    with Largest() as largest:
        rows.entropy()
    assert largest.size == 0


@pytest.mark.parametrize("value", ["tf32", "ieee"])
@pytest.mark.parametrize("switch", ["old", "new", "all backends"])
def test_products_in_tf32_are_noticed(switch, value):
    """However the user asks for them; torch raises where its old switch is read after its new one was set."""
    products, everywhere = torch.backends.cuda.matmul, torch.backends
    try:
        if switch == "old":
            torch.set_float32_matmul_precision("high" if value == "tf32" else "highest")
        else:
            (products if switch == "new" else everywhere).fp32_precision = value
        assert in_tf32() == (value == "tf32")
    finally:
        torch.set_float32_matmul_precision("highest")
        products.fp32_precision = everywhere.fp32_precision = "none"


class Slowly:
    """What the GPU's kernel adds up, by the textbook."""

    @staticmethod
    def add_up(q, k, shift, *, over, scale, causal, window=None, key_mask=None):
        logs = scale * q.double() @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).double().mT - shift.double()[..., None]
        gap = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        seen = (gap >= 0 if causal else gap == gap) & (gap.abs() < (window or k.shape[2] + q.shape[2]))
        seen = seen if key_mask is None else seen & key_mask[:, None, None]
        shares = logs.exp().where(seen, 0)
        axis = -1 if over == "keys" else -2
        return shares.sum(axis).float(), (shares * logs).where(seen, 0).nan_to_num().sum(axis).float()


@pytest.mark.parametrize("name", CASES)
def test_sums_that_a_kernel_makes(name, monkeypatch):
    """Entropies and what keys receive: rows are not cut, and rounding of the log-sum-exps is mended, no more."""
    _, scores, (_, pattern, _) = scores_and_truth(name)
    if scores.softcap is not None or scores.bias is not None:
        assert scores.kernels is None
        return
    monkeypatch.setattr(rows_module.Scores, "kernels", Slowly)
    assert list(scores.cuts(formed=False)) == [(0, T)]
    assert len(list(scores.cuts())) > 1
    chosen = torch.rand(len(pattern), T, generator=torch.Generator().manual_seed(0)) < 0.7
    entropy, received = torch.special.entr(pattern).sum(-1), (pattern * chosen[:, None, :, None]).sum(2)
    for off, allowed in ((0.0, 1e-4), (1e-4, 1e-4), (0.1, None)):
        rows = dataclasses.replace(scores, lse=scores.lse + off).rows(0, T)
        if allowed is None:  # the proof of the engine must see it
            assert float((rows.entropy().double() - entropy).abs().max()) > 0.05
            assert float((rows.received(chosen).double() - received).abs().max()) > 0.05
            continue
        torch.testing.assert_close(rows.entropy().double(), entropy, atol=allowed, rtol=1e-5)
        torch.testing.assert_close(rows.received(chosen).double(), received, atol=allowed, rtol=1e-5)
