"""The oracle against values worked out by hand, or in closed form."""

import math

import numpy as np
import pytest

from tests import oracles

PER_HEAD = [
    "sink_mass",
    "sink_mass_excess",
    "visible_sink_mass",
    "received",
    "last_row_share",
    "row_entropy",
    "normalized_row_entropy",
    "effective_keys",
    "row_deficit",
    "sink_rate@0.3",
    "sink_rate@0.8",
    "visible_sink_rate@0.3",
    "visible_sink_rate@0.8",
]
PER_KEY = ["position_profile", "received_profile"]
PER_MODEL = ["sink_strength", "first_to_rest_ratio", "layer_progression"]


def harmonic(n):
    return sum(1 / j for j in range(1, n + 1))


def one_head(rows):
    """One layer, one head."""
    return np.array(rows, dtype=float)[None, None]


def planted(T, score):
    """Causal softmax of a score on key 0 and 0 elsewhere, by the definition of softmax."""
    pattern = np.zeros((T, T))
    for i in range(T):
        weights = [math.exp(score)] + [1.0] * i
        for k in range(i + 1):
            pattern[i, k] = weights[k] / sum(weights)
    return pattern


def two_tokens():
    """Query 1 gives 3/4 to key 0."""
    return one_head([[1, 0], [0.75, 0.25]])


# --- shapes and names ---------------------------------------------------------------------------------------


def test_names_shapes_and_dtype():
    layers, heads, T = 3, 2, 5
    pattern = np.broadcast_to(oracles.uniform(T), (layers, heads, T, T)).astype(np.float32)
    got = oracles.reference(pattern)
    assert set(got) == {*PER_HEAD, *PER_KEY, *PER_MODEL, "layer_series", "sink_share_of_heads"}
    for name in PER_HEAD:
        assert got[name].shape == (layers, heads)
        assert got[name].dtype == np.float64
    for name in PER_KEY:
        assert got[name].shape == (layers, heads, T)
        assert got[name].dtype == np.float64
    for name in PER_MODEL:
        assert isinstance(got[name], float)
    assert got["layer_series"].shape == (layers,)
    assert got["sink_share_of_heads"].shape == (T,)


def test_thresholds_name_the_rates():
    got = oracles.reference(two_tokens(), eps=(0.25, 0.875, 1.0))
    assert {name for name in got if "rate" in name} == {
        f"{kind}@{eps}" for kind in ("sink_rate", "visible_sink_rate") for eps in ("0.25", "0.875", "1")
    }
    assert got["sink_rate@0.25"] == 1
    assert got["sink_rate@0.875"] == 0  # received is exactly 7/8: the comparison is strict
    assert got["visible_sink_rate@0.875"] == 0
    assert got["sink_rate@1"] == 0


# --- two tokens by hand -------------------------------------------------------------------------------------


def test_two_tokens():
    got = oracles.reference(two_tokens())
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # 0.5623 nats
    expected = {
        "sink_mass": 0.875,  # (1 + 3/4) / 2
        "sink_mass_excess": 0.25,  # 3/4 - 1/2, row 1 alone
        "visible_sink_mass": 0.875,
        "received": 0.875,
        "last_row_share": 0.75,
        "row_entropy": h / 2,
        "normalized_row_entropy": h / math.log(2),
        "effective_keys": (1 + math.exp(h)) / 2,
        "row_deficit": 0.0,
        "sink_rate@0.3": 1.0,
        "sink_rate@0.8": 1.0,
        "visible_sink_rate@0.3": 1.0,
        "visible_sink_rate@0.8": 1.0,
        "sink_strength": 0.875,  # 1.75 of 2
        "first_to_rest_ratio": 7.0,  # 7/8 over 1/8
        "layer_progression": 0.0,
    }
    for name, value in expected.items():
        assert np.asarray(got[name]).item() == pytest.approx(value, abs=1e-15), name
    assert h == pytest.approx(0.5623351446188083)
    np.testing.assert_allclose(got["position_profile"][0, 0], [0.875, 0.125])
    np.testing.assert_allclose(got["received_profile"][0, 0], [0.875, 0.25])
    np.testing.assert_allclose(got["layer_series"], [0.875])
    np.testing.assert_array_equal(got["sink_share_of_heads"], [1, 0])


def test_two_tokens_with_another_key():
    got = oracles.reference(two_tokens(), key=1)
    assert got["sink_mass"] == 0.125  # over both queries
    assert got["sink_mass_excess"] == -0.25  # 1/4 - 1/2
    assert got["visible_sink_mass"] == 0.25  # over query 1 alone
    assert got["received"] == 0.25
    assert got["last_row_share"] == 0.25
    assert got["sink_strength"] == 0.125
    assert got["first_to_rest_ratio"] == pytest.approx(1 / 7)


def test_two_tokens_in_both_directions():
    got = oracles.reference(one_head([[0.5, 0.5], [0.75, 0.25]]), key=1, causal=False)
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert got["sink_mass"] == got["visible_sink_mass"] == got["received"] == 0.375
    assert got["sink_mass_excess"] == -0.125  # the mean of 0 and -1/4
    assert got["normalized_row_entropy"] == pytest.approx((1 + h / math.log(2)) / 2)
    np.testing.assert_allclose(got["received_profile"], got["position_profile"])


def test_three_tokens_key_one_leaves_out_the_queries_before_it():
    got = oracles.reference(one_head([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.25, 0.25]]), key=1)
    assert got["sink_mass"] == 0.25  # 3/4 over three queries
    assert got["received"] == got["visible_sink_mass"] == 0.375  # 3/4 over two
    assert got["sink_mass_excess"] == pytest.approx(((0.5 - 1 / 2) + (0.25 - 1 / 3)) / 2)


def test_three_tokens_last_key():
    got = oracles.reference(one_head([[1, 0, 0], [0.5, 0.5, 0], [0.25, 0.25, 0.5]]), key=2)
    assert got["sink_mass_excess"] == pytest.approx(0.5 - 1 / 3)  # query 2 alone
    assert got["received"] == got["visible_sink_mass"] == got["last_row_share"] == 0.5
    assert got["sink_mass"] == pytest.approx(0.5 / 3)


def test_share_of_heads_is_strict_and_keeps_its_own_threshold():
    got = oracles.reference(one_head([[1, 0], [0.7, 0.3]]), eps=(0.1,))
    np.testing.assert_array_equal(got["sink_share_of_heads"], [1, 0])


# --- closed forms -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 2, 3, 10, 64])
def test_uniform_attention(T):
    got = oracles.reference(one_head(oracles.uniform(T)))
    entropies = [math.log(i + 1) for i in range(T)]
    assert got["sink_mass"] == pytest.approx(harmonic(T) / T)
    assert got["received"] == pytest.approx(harmonic(T) / T)
    assert got["visible_sink_mass"] == pytest.approx(harmonic(T) / T)
    assert got["sink_strength"] == pytest.approx(harmonic(T) / T)
    assert got["last_row_share"] == pytest.approx(1 / T)
    assert got["row_entropy"] == pytest.approx(sum(entropies) / T)
    assert got["effective_keys"] == pytest.approx((T + 1) / 2)
    assert got["row_deficit"] == pytest.approx(0, abs=1e-15)
    tails = [harmonic(T) - harmonic(k) for k in range(T)]  # sum over i >= k of 1/(i+1)
    np.testing.assert_allclose(got["position_profile"][0, 0], [tails[k] / T for k in range(T)])
    np.testing.assert_allclose(got["received_profile"][0, 0], [tails[k] / (T - k) for k in range(T)])
    if T > 1:
        assert got["normalized_row_entropy"] == pytest.approx(1)
        assert got["sink_mass_excess"] == pytest.approx(0, abs=1e-15)
        m = harmonic(T) / T
        assert got["first_to_rest_ratio"] == pytest.approx(m * (T - 1) / (1 - m))


@pytest.mark.parametrize("i", [0, 1, 4, 30])
def test_entropy_of_a_uniform_row(i):
    assert oracles.entropy(oracles.uniform(31)[i]) == pytest.approx(math.log(i + 1))


def test_entropy_of_a_row_that_lacks_mass():
    # Two quarters, the other half on a learned sink logit: 2 * (1/4) log 4, not renormalised.
    assert oracles.entropy([0.25, 0.25, 0.0]) == pytest.approx(0.5 * math.log(4))


@pytest.mark.parametrize("score", [-2.0, 0.0, 1.5, 8.0])
def test_planted_sink(score):
    T = 17
    c = math.exp(score)
    mass = [c / (c + i) for i in range(T)]
    pattern = planted(T, score)
    np.testing.assert_allclose(pattern[:, 0], mass)
    got = oracles.reference(one_head(pattern))
    assert got["sink_mass"] == pytest.approx(sum(mass) / T)
    assert got["received"] == pytest.approx(sum(mass) / T)
    assert got["last_row_share"] == pytest.approx(mass[-1])
    assert got["sink_mass_excess"] == pytest.approx(sum(mass[i] - 1 / (i + 1) for i in range(1, T)) / (T - 1), abs=1e-15)
    # Entropy of a softmax is log Z minus the mean score: Z = c + i, and only key 0 has a score.
    entropies = [math.log(c + i) - mass[i] * score for i in range(T)]
    assert got["row_entropy"] == pytest.approx(sum(entropies) / T)
    assert got["effective_keys"] == pytest.approx(sum(math.exp(h) for h in entropies) / T)
    assert got["normalized_row_entropy"] == pytest.approx(sum(entropies[i] / math.log(i + 1) for i in range(1, T)) / (T - 1))


def test_uniform_in_both_directions():
    T = 5
    got = oracles.reference(one_head(oracles.uniform(T, causal=False)), key=3, causal=False)
    for name in ("sink_mass", "visible_sink_mass", "received", "last_row_share", "sink_strength"):
        assert got[name] == pytest.approx(1 / T), name
    assert got["sink_mass_excess"] == pytest.approx(0, abs=1e-15)
    assert got["row_entropy"] == pytest.approx(math.log(T))
    assert got["normalized_row_entropy"] == pytest.approx(1)
    assert got["effective_keys"] == pytest.approx(T)
    assert got["first_to_rest_ratio"] == pytest.approx(1)


def test_everything_on_the_first_key():
    T = 4
    pattern = np.zeros((T, T))
    pattern[:, 0] = 1
    got = oracles.reference(one_head(pattern))
    assert got["sink_mass"] == got["sink_strength"] == got["effective_keys"] == 1
    assert got["row_entropy"] == got["normalized_row_entropy"] == 0
    assert got["first_to_rest_ratio"] == math.inf
    np.testing.assert_array_equal(got["sink_share_of_heads"], [1, 0, 0, 0])


def test_identity_is_seen_by_received_at_the_last_key_only():
    got = oracles.reference(one_head(np.eye(4)))
    np.testing.assert_allclose(got["position_profile"][0, 0], [0.25] * 4)
    np.testing.assert_allclose(got["received_profile"][0, 0], [1 / 4, 1 / 3, 1 / 2, 1])
    np.testing.assert_array_equal(got["sink_share_of_heads"], [0, 1, 1, 1])


def test_row_deficit():
    got = oracles.reference(one_head(0.75 * oracles.uniform(6)))
    assert got["row_deficit"] == pytest.approx(0.25)
    assert got["sink_strength"] == pytest.approx(harmonic(6) / 6)  # a share of what attention there is


# --- windows ------------------------------------------------------------------------------------------------


def test_a_window_changes_only_the_visible_statistics():
    T, window = 6, 2
    pattern = one_head(oracles.uniform(T, window=window))
    # Rows: [1], [1/2 1/2], then key 0 is out of sight.
    with_window = oracles.reference(pattern, windows=[window])
    without = oracles.reference(pattern)
    assert with_window["visible_sink_mass"] == 0.75
    assert without["visible_sink_mass"] == with_window["sink_mass"] == 0.25
    assert with_window["visible_sink_rate@0.3"] == 1
    assert without["visible_sink_rate@0.3"] == with_window["sink_rate@0.3"] == 0
    for name in set(without) - {"visible_sink_mass", "visible_sink_rate@0.3"}:
        np.testing.assert_array_equal(with_window[name], without[name], err_msg=name)
    # Rows 2..5 hold nothing on key 0, and the null of the excess knows of no window.
    assert without["sink_mass_excess"] == pytest.approx((0 - 1 / 3 - 1 / 4 - 1 / 5 - 1 / 6) / 5)


def test_windows_belong_to_layers():
    pattern = np.stack([oracles.uniform(6, window=w)[None] for w in (2, None, 1)])
    got = oracles.reference(pattern, windows=[2, None, 1])
    np.testing.assert_allclose(got["visible_sink_mass"][:, 0], [0.75, harmonic(6) / 6, 1])
    np.testing.assert_allclose(got["sink_mass"][:, 0], [0.25, harmonic(6) / 6, 1 / 6])


def test_visible_mass_of_a_late_key_in_a_window():
    # Key 3 is seen by queries 3, 4, 5 of 0..6, each of which sees three keys.
    pattern = one_head(oracles.uniform(7, window=3))
    got = oracles.reference(pattern, key=3, windows=[3])
    assert got["visible_sink_mass"] == pytest.approx(1 / 3)
    assert got["sink_mass"] == pytest.approx(1 / 7)
    assert got["received"] == pytest.approx(1 / 4)


# --- across layers and heads --------------------------------------------------------------------------------


def test_model_level_numbers():
    # Two tokens; head (layer, head) gives x to key 0 in row 1, so its sink mass is (1 + x) / 2.
    x = np.array([[0.0, 0.2], [0.4, 0.4], [0.6, 1.0], [0.8, 1.0]])
    pattern = np.array([[[[1, 0], [v, 1 - v]] for v in layer] for layer in x])
    got = oracles.reference(pattern)
    np.testing.assert_allclose(got["sink_mass"], (1 + x) / 2)
    np.testing.assert_allclose(got["layer_series"], [0.55, 0.7, 0.9, 0.95])
    assert got["layer_progression"] == pytest.approx(0.4)  # 4 // 3 = 1 layer at either end
    assert got["sink_strength"] == pytest.approx(0.775)
    assert got["first_to_rest_ratio"] == pytest.approx(0.775 / 0.225)
    np.testing.assert_allclose(got["sink_share_of_heads"], [1, 5 / 8])  # 1 - x > 0.3 in five heads
    np.testing.assert_array_equal(got["sink_rate@0.8"], [[0, 0], [0, 0], [0, 1], [1, 1]])


def test_layer_progression_over_thirds_of_seven_layers():
    x = np.array([0.0, 0.1, 0.5, 0.5, 0.5, 0.8, 1.0])
    pattern = np.array([[[[1, 0], [v, 1 - v]]] for v in x])
    got = oracles.reference(pattern)
    assert got["layer_progression"] == pytest.approx((0.9 - 0.05) / 2)


def test_sink_strength_weighs_by_the_attention_there_is():
    full = np.array([[1, 0], [1, 0]])
    pattern = np.stack([full, 0.5 * np.eye(2)])[:, None]
    got = oracles.reference(pattern)
    assert got["sink_strength"] == pytest.approx(2.5 / 3)
    assert got["first_to_rest_ratio"] == pytest.approx(0.625 / 0.375)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 2, 2), {}, "layer, head, T, T"),
        ((1, 1, 2, 3), {}, "layer, head, T, T"),
        ((1, 1, 2, 2), {"key": 2}, "key 2 lies outside"),
        ((1, 1, 2, 2), {"key": -1}, "key -1 lies outside"),
        ((1, 1, 2, 2), {"windows": [None, 1]}, "2 windows for 1 layers"),
        ((1, 1, 2, 2), {"windows": [0]}, "own position, got 0"),
        ((1, 1, 2, 2), {"windows": [1], "causal": False}, "causal attention only"),
    ],
)
def test_bad_input_is_refused(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        oracles.reference(np.ones(shape), **arguments)


# --- the null -----------------------------------------------------------------------------------------------


def test_uniform_pattern():
    np.testing.assert_array_equal(oracles.uniform(3), [[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    np.testing.assert_array_equal(oracles.uniform(3, window=2), [[1, 0, 0], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]])
    np.testing.assert_array_equal(oracles.uniform(2, causal=False), np.full((2, 2), 0.5))


@pytest.mark.parametrize("T", [2, 10, 33])
@pytest.mark.parametrize("key", [0, 1])
def test_null_of_causal_attention(T, key):
    tail = harmonic(T) - harmonic(key)
    expected = {
        "sink_mass": tail / T,
        "sink_mass_excess": 0,
        "visible_sink_mass": tail / (T - key),
        "received": tail / (T - key),
        "last_row_share": 1 / T,
        "row_entropy": math.lgamma(T + 1) / T,
        "normalized_row_entropy": 1,
        "effective_keys": (T + 1) / 2,
        "row_deficit": 0,
        "position_profile": tail / T,
        "received_profile": tail / (T - key),
        "sink_strength": tail / T,
        "layer_series": tail / T,
        "layer_progression": 0,
        "first_to_rest_ratio": (tail / T) * (T - 1) / (1 - tail / T),
        "sink_share_of_heads": float(tail / (T - key) > 0.3),
    }
    for name, value in expected.items():
        assert oracles.null(name, T, key=key) == pytest.approx(value, abs=1e-14), name


def test_null_of_attention_in_both_directions():
    for name in ("sink_mass", "visible_sink_mass", "received", "last_row_share", "sink_strength"):
        assert oracles.null(name, 8, key=5, causal=False) == pytest.approx(1 / 8), name
    assert oracles.null("first_to_rest_ratio", 8, causal=False) == pytest.approx(1)
    assert oracles.null("row_entropy", 8, causal=False) == pytest.approx(math.log(8))


def test_null_respects_the_window_in_visible_names_only():
    T, window = 12, 4
    # Key 0 is seen by queries 0..3, which see 1..4 keys.
    assert oracles.null("visible_sink_mass", T, window=window) == pytest.approx(harmonic(4) / 4)
    # Key 5 is seen by queries 5..8, all with a full window.
    assert oracles.null("visible_sink_mass", T, key=5, window=window) == pytest.approx(1 / 4)
    for name in ("sink_mass", "received", "row_entropy", "effective_keys", "sink_mass_excess"):
        assert oracles.null(name, T, window=window) == oracles.null(name, T), name
    assert oracles.null("visible_sink_rate", T, window=window, eps=0.5) == 1  # 0.5208
    assert oracles.null("visible_sink_rate", T, eps=0.5) == 0  # 0.2586
    assert oracles.null("sink_rate", T, window=window, eps=0.25) == 1


def test_null_of_a_rate():
    # H_9 / 9 = 0.3143, H_10 / 10 = 0.2929
    assert oracles.null("sink_rate", 9) == oracles.null("sink_rate@0.3", 9) == 1
    assert oracles.null("sink_rate", 10) == oracles.null("sink_rate@0.3", 10) == 0
    assert oracles.null("sink_rate@0.8", 9) == oracles.null("sink_rate", 9, eps=0.8) == 0
    assert oracles.null("sink_rate@0.29", 10, eps=0.8) == 1  # the threshold in the name counts


def test_null_is_none_where_there_is_none():
    assert oracles.null("value_drain", 8) is None
    assert oracles.null("sink_mass_excess", 1) is None
    assert oracles.null("normalized_row_entropy", 1) is None
    assert oracles.null("first_to_rest_ratio", 1) is None
    with pytest.raises(ValueError, match="sink_mas"):
        oracles.null("sink_mas", 8)


# --- across texts -------------------------------------------------------------------------------------------


def test_consistency_by_hand():
    """On the scale of log odds, whose slope at m is 1 / (m (1 - m)); t(0.975, 2) = 4.302653 from tables."""
    got = oracles.consistency([0.2, 0.3, 0.4])  # mean 0.3, std 0.1
    way = 4.302653 * 0.1 / math.sqrt(3) / (0.3 * 0.7)
    low, high = (1 / (1 + 0.7 / 0.3 * math.exp(sign * way)) for sign in (1, -1))
    assert got == pytest.approx({"std": 0.1, "cv": 1 / 3, "low": low, "high": high}, rel=1e-6)


def test_consistency_of_two_texts():
    got = oracles.consistency([0.4, 0.6])  # std = 0.1 * sqrt(2), error 0.1; t(0.975, 1) = tan(0.475 pi)
    way = math.tan(0.475 * math.pi) * 0.1 / 0.25
    low, high = (1 / (1 + math.exp(sign * way)) for sign in (1, -1))
    assert got == pytest.approx({"std": 0.1 * math.sqrt(2), "cv": 0.2 * math.sqrt(2), "low": low, "high": high})


def test_consistency_at_the_edges():
    assert oracles.consistency([0.5, 0.5, 0.5]) == {"std": 0, "cv": 0, "low": 0.5, "high": 0.5}
    assert oracles.consistency([-1, 1])["cv"] == math.inf
    assert math.isnan(oracles.consistency([0, 0])["cv"])
    assert all(math.isnan(value) for value in oracles.consistency([0.5]).values())
    assert all(math.isnan(value) for value in oracles.consistency([]).values())


def test_standard_error():
    assert oracles.standard_error([1, 2, 3]) == pytest.approx(1 / math.sqrt(3))
    assert oracles.standard_error([2, 4, 4, 4, 5, 5, 7, 9]) == pytest.approx(math.sqrt(32 / 7 / 8))
    assert math.isnan(oracles.standard_error([1]))
