"""What a metric sees: the closed forms of a block."""

import math

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.block import Block, PatternRows
from tests import oracles


def block(pattern, *, start=0, lengths=None, keys=None, dtype=torch.float64, **how):
    """A block of one pattern `[query, key]`, one head, for every sequence."""
    n = len(lengths or [1])
    rows = torch.as_tensor(np.asarray(pattern), dtype=dtype).expand(n, 1, -1, -1)
    lengths = torch.tensor(lengths or [start + rows.shape[2]])
    keys = torch.tensor(keys or [0] * n)
    return Block(0, start, PatternRows(rows), rows.shape[2], lengths, keys, **how)


def planted(t, score):
    scores = torch.zeros(t, t, dtype=torch.float64)
    scores[:, 0] = score
    return scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf).softmax(-1)


@pytest.mark.parametrize("score", [-2.0, 0.0, 3.0, 10.0])
def test_a_score_on_key_0_gives_the_closed_form(score):
    expected = [math.exp(score) / (math.exp(score) + i) for i in range(12)]
    assert block(planted(12, score)).mass[0, 0].tolist() == pytest.approx(expected, abs=1e-12)


def test_uniform_rows_have_the_entropy_of_the_keys_they_see():
    got = block(oracles.uniform(30)).entropy[0, 0]
    assert got.tolist() == pytest.approx([math.log(i + 1) for i in range(30)], abs=1e-12)


def test_zero_attention_adds_nothing_to_the_entropy():
    assert block([[1.0, 0.0], [0.5, 0.5]]).entropy[0, 0].tolist() == pytest.approx([0, math.log(2)])


@pytest.mark.parametrize("key", [0, 2, 3, 9])
def test_mass_is_the_column_or_nothing_where_the_key_lies_beyond_it(key):
    pattern = np.arange(16.0).reshape(4, 4)
    expected = pattern[:, key] if key < 4 else np.zeros(4)
    assert block(pattern, lengths=[12], keys=[key]).mass[0, 0].tolist() == expected.tolist()


def test_each_sequence_has_its_own_key_and_at_looks_elsewhere():
    pattern = np.arange(9.0).reshape(3, 3)
    two = block(pattern, lengths=[3, 3], keys=[0, 2])
    assert two.mass[:, 0].tolist() == [[0, 3, 6], [2, 5, 8]]
    assert two.at(torch.tensor([1, 1])).mass[1, 0].tolist() == [1, 4, 7]
    assert two.mass[1, 0].tolist() == [2, 5, 8]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 3), (False, None)])
@pytest.mark.parametrize("key", [0, 4])
def test_sees_key_is_the_definition(causal, window, key):
    start, stop = 2, 9
    part = block(np.zeros((stop - start, stop)), start=start, keys=[key], lengths=[9], causal=causal, window=window)
    expected = [oracles.sees(i, key, causal=causal, window=window) for i in range(start, stop)]
    assert part.sees_key[0].tolist() == expected


@pytest.mark.parametrize("causal", [True, False])
def test_positions_count_from_the_start_of_the_text(causal):
    part = block(np.zeros((2, 6)), start=3, lengths=[4, 6], causal=causal)
    assert part.queries.tolist() == [3, 4]
    assert part.valid.tolist() == [[True, False], [True, True]]
    assert part.n_visible.tolist() == ([[4, 5], [4, 5]] if causal else [[4, 4], [6, 6]])
    assert part.distance.tolist() == [[3, 2, 1, 0, 1, 2], [4, 3, 2, 1, 0, 1]]


@pytest.mark.parametrize(("dtype", "seen"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_low_precision_is_summed_in_float32(dtype, seen):
    rows = torch.full((1, 1, 1, 300), 1 / 300, dtype=dtype)
    part = Block(0, 299, PatternRows(rows), 1, torch.tensor([300]), torch.tensor([0]))
    assert part.pattern.dtype == part.mass.dtype == part.row_sum.dtype == seen
    assert float(part.row_sum) == pytest.approx(300 * float(rows[0, 0, 0, 0]), abs=1e-5)  # bfloat16 would give 1.0 or 0.5


def test_row_sum_shows_what_a_learned_sink_takes():
    assert block([[0.5, 0.0], [0.25, 0.5]]).row_sum[0, 0].tolist() == [0.5, 0.75]


def test_an_activation_that_was_not_asked_for_is_named():
    part = block([[1.0]], activations={"residual": torch.zeros(1, 1, 4)})
    assert part.residual.shape == (1, 1, 4)
    with pytest.raises(ss.SinkscopeError, match=r"no activation 'mlp.hook_post'.*needs='mlp.hook_post'.*has: residual"):
        part["mlp.hook_post"]
