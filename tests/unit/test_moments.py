"""The accumulators: however the numbers come in, the result is numpy's."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sinkscope as ss
from sinkscope.block import Block, PatternRows
from sinkscope.metrics.accumulate import Moments, RowMean
from sinkscope.metrics.across import consistency, t_interval
from sinkscope.metrics.base import every_row, metric
from tests import oracles

numbers = st.floats(-1e3, 1e3, allow_subnormal=False)
columns = st.integers(1, 4).flatmap(
    lambda width: st.lists(st.lists(numbers | st.just(math.nan), min_size=width, max_size=width), min_size=1, max_size=12)
)


def merged(parts):
    first, *rest = parts
    for part in rest:
        first = first.merge(part)
    return first


def same(a, b):
    return np.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@given(columns, st.randoms())
def test_moments_are_numpys_in_any_order_and_grouping(rows, random):
    values = np.array(rows)
    parts = [Moments.of(row) for row in values]
    random.shuffle(parts)
    while len(parts) > 1:
        at = random.randrange(len(parts) - 1)
        parts[at : at + 2] = [parts[at].merge(parts[at + 1])]
    (got,) = parts
    for column, present in enumerate((~np.isnan(values)).T):
        kept = values[present, column]
        assert got.count[column] == len(kept)
        assert math.isclose(got.mean[column], kept.mean() if len(kept) else 0.0, rel_tol=1e-9, abs_tol=1e-9)
        assert same(got.std_error[column], oracles.standard_error(kept))


def test_moments_do_not_cancel_far_from_zero():
    values = 1e9 + np.array([0.0, 1.0, 2.0, 3.0])
    got = merged([Moments.of(np.asarray(v)) for v in values])
    assert float(got.std_error) == pytest.approx(values.std(ddof=1) / 2, rel=1e-9)


@given(st.lists(st.lists(numbers, min_size=1, max_size=6), min_size=1, max_size=6))
def test_texts_with_more_keys_leave_the_others_absent(rows):
    got = merged([Moments.of(np.array(row)) for row in rows])
    for k in range(max(map(len, rows))):
        there = [row[k] for row in rows if len(row) > k]
        assert got.count[k] == len(there)
        assert math.isclose(got.mean[k], np.mean(there), rel_tol=1e-9, abs_tol=1e-9)
        assert same(got.std_error[k], oracles.standard_error(there))


def test_merging_leaves_the_parts_alone():
    a, b = Moments.of(np.array([1.0])), Moments.of(np.array([3.0, 5.0]))
    a.merge(b)
    assert (a.mean.tolist(), b.mean.tolist(), a.count.tolist()) == ([1.0], [3.0, 5.0], [1.0])


# --- means over rows -------------------------------------------------------------------------------------------------


@metric(needs="mass")
def per_query(block):
    return block.mass


@metric(needs="pattern")
def per_key(block):
    return block.pattern


@metric(needs="mass", over=lambda block: block.queries[None, :] >= 3)
def late(block):
    return block.mass


METRICS = [per_query, per_key, late]
T, LENGTHS = 11, (11, 4, 2)


def blocks(cuts):
    """Random attention of three texts, cut before the rows in `cuts`; pads hold nonsense."""
    whole = torch.rand(3, 2, T, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tril()
    edges = sorted({0, T, *cuts})
    for start, stop in pairwise(edges):
        rows = PatternRows(whole[:, :, start:stop, :stop])
        yield Block(0, start, rows, stop - start, torch.tensor(LENGTHS), torch.tensor([0, 1, 1]))


def streamed(m, parts):
    mean = RowMean(m)
    for part in parts:
        mean.update(part)
    return mean


cuts = st.sets(st.integers(1, T - 1))


@pytest.mark.parametrize("m", METRICS, ids=lambda m: m.name)
@given(cuts=cuts, random=st.randoms())
def test_cutting_and_shuffling_rows_changes_nothing(m, cuts, random):
    parts = list(blocks(cuts))
    random.shuffle(parts)
    assert same(streamed(m, parts).mean(), streamed(m, blocks(())).mean())


@pytest.mark.parametrize("m", METRICS, ids=lambda m: m.name)
@given(cuts=cuts.filter(bool), random=st.randoms())
def test_merging_partial_sums_changes_nothing(m, cuts, random):
    parts = [streamed(m, [part]) for part in blocks(cuts)]
    random.shuffle(parts)
    sums = [part.sums.copy() for part in parts]
    assert same(merged([RowMean(m), *parts]).mean(), streamed(m, blocks(())).mean())
    assert all(np.array_equal(part.sums, before) for part, before in zip(parts, sums, strict=True))


def test_the_mean_is_over_the_chosen_real_rows_alone():
    whole = next(blocks(())).pattern.numpy()
    (means,) = streamed(late, blocks({5})).mean()
    assert same(means[0], whole[0, :, 3:, 0].mean(-1))
    assert same(means[1], whole[1, :, 3:4, 1].mean(-1))
    assert np.isnan(means[2]).all()


def test_counts_and_flags_are_averaged_as_numbers():
    flag = metric(needs="mass", name="flag")(lambda block: block.mass > 0.5)
    whole = next(blocks(())).pattern.numpy()
    assert same(streamed(flag, blocks({2, 7})).mean()[0, 0], (whole[0, :, :, 0] > 0.5).mean(-1))
    assert every_row(next(blocks(()))).all()


def test_a_mean_of_nothing_is_an_error():
    with pytest.raises(ss.SinkscopeError, match=r"per_query.*saw no block"):
        RowMean(per_query).mean()


# --- across texts ----------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_consistency_is_the_oracles(values):
    got, expected = consistency.fn(np.array(values)), oracles.consistency(values)
    assert got.keys() == expected.keys()
    assert all(same(got[part], expected[part]) for part in got)


def test_an_interval_needs_two_texts():
    assert all(math.isnan(bound) for bound in t_interval(0.5, 0.1, 1))
    assert t_interval(0.0, 1.0, 2) == pytest.approx((-12.7062, 12.7062), abs=1e-3)  # Student's t, one degree of freedom
