"""Every built-in metric, end to end, against closed forms, against the oracle, and against itself in other batches."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import sinkscope as ss
from sinkscope.capture import source as held
from sinkscope.metrics import BUILT_IN, MECHANISM, available
from sinkscope.metrics import null as nulls
from sinkscope.testing import planted_sink, tiny_hf_model
from tests import oracles
from tests.conftest import Playback, play, table, total

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

PER_HEAD = [
    "sink_mass", "sink_mass_excess", "visible_sink_mass", "received", "last_row_share", "row_entropy",
    "normalized_row_entropy", "effective_keys", "row_deficit", "sink_rate@0.3", "sink_rate@0.8",
    "visible_sink_rate@0.3", "visible_sink_rate@0.8",
]  # fmt: skip
PROFILES = ["position_profile", "received_profile"]
MODEL_LEVEL = ["sink_strength", "first_to_rest_ratio", "layer_progression"]
EVERYTHING = [name for name in BUILT_IN if name not in MECHANISM]  # the others have tests of their own
# A run takes a tenth of a second, so that shrinking what failed would take minutes.
TEN, FIVE = (settings(max_examples=n, phases=[Phase.explicit, Phase.generate]) for n in (10, 5))


def close(got, expected, tol=1e-9):
    np.testing.assert_allclose(got, expected, atol=tol, rtol=tol)


def random_pattern(seed, *, t, layers=2, heads=2, kind="causal", window=None):
    """Random attention; some keys get exactly nothing; `deficit` rows lose a share to a learned sink."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(layers, heads, t, t)) * rng.uniform(0, 4, size=(layers, heads, 1, 1))
    scores[..., int(rng.integers(t))] += rng.uniform(0, 5)
    hidden = rng.random(scores.shape) < 0.1
    seen = np.array([[oracles.sees(i, k, causal=kind != "encoder", window=window) for k in range(t)] for i in range(t)])
    weights = np.exp(scores) * seen * ~(hidden & ~np.eye(t, dtype=bool))
    taken = np.exp(rng.normal(size=(layers, heads, 1, 1)) * 2) if kind == "deficit" else 0.0
    return weights / (weights.sum(-1, keepdims=True) + taken)


@st.composite
def patterns(draw, longest=40):
    """A pattern of one text, and the arguments that say what model it is of."""
    kind = draw(st.sampled_from(["causal", "deficit", "windowed", "encoder"]))
    window = draw(st.integers(1, 12)) if kind == "windowed" else None
    pattern = random_pattern(draw(st.integers(0, 2**32)), t=draw(st.integers(2, longest)), kind=kind, window=window)
    return pattern, {"causal": kind != "encoder", "windows": [window, window]}


def far_from_thresholds(expected):
    """Rounding may decide a threshold; don't ask it to."""
    alphas = np.concatenate([np.ravel(expected[n]) for n in ("received", "visible_sink_mass", "received_profile")])
    return bool((np.abs(np.subtract.outer(alphas, [0.3, 0.8])) > 1e-5).all())


def check(report, expected, text="text 0", tol=1e-9):
    """Compare a text's whole report with the oracle's numbers."""
    for name in PER_HEAD:
        close(table(report, name, text), expected[name], tol)
        close(total(report, name, text), expected[name].mean(), tol)
    for name in PROFILES:
        close(table(report, name, text), expected[name].mean(1), tol)
    for name in MODEL_LEVEL:
        close(total(report, name, text), expected[name], tol)
    close(table(report, "layer_progression", text), expected["layer_series"], tol)
    close(table(report, "head_profile", text), expected["position_profile"], tol)
    rows = report.frame[(report.frame["metric"] == "sink_positions") & (report.frame["text"] == text)]
    shares = {k: share for k, share in enumerate(expected["sink_share_of_heads"]) if share >= 0.1}
    assert dict(zip(rows["key"], rows["value"], strict=True)) == pytest.approx(shares)
    assert total(report, "sink_positions", text) == len(shares)


# --- closed forms ----------------------------------------------------------------------------------------------------


def harmonic(t):
    return sum(1 / j for j in range(1, t + 1))


@pytest.mark.parametrize("t", [2, 10, 40])
def test_uniform_attention_is_its_own_null(t):
    report = play([np.broadcast_to(oracles.uniform(t), (2, 3, t, t))])
    assert total(report, "sink_mass") == pytest.approx(harmonic(t) / t, abs=1e-6)
    assert total(report, "last_row_share") == pytest.approx(1 / t, abs=1e-6)
    assert total(report, "row_entropy") == pytest.approx(np.log(range(1, t + 1)).mean(), abs=1e-6)
    assert total(report, "effective_keys") == pytest.approx((t + 1) / 2, abs=1e-5)
    assert total(report, "normalized_row_entropy") == pytest.approx(1, abs=1e-6)
    assert total(report, "sink_strength") == pytest.approx(harmonic(t) / t, abs=1e-6)
    summary = report.summary("text 0")
    close(summary["value"], summary["null"])


@pytest.mark.parametrize("score", [0.0, 2.0, 6.0])
def test_a_planted_sink_has_the_closed_form(score):
    t = 20
    scores = np.where(np.arange(t) == 0, score, 0.0) + np.where(np.tri(t), 0, -np.inf)
    weights = np.exp(scores)
    report = play([(weights / weights.sum(-1, keepdims=True))[None, None]])
    mass = np.array([math.exp(score) / (math.exp(score) + i) for i in range(t)])
    assert total(report, "sink_mass") == pytest.approx(mass.mean(), abs=1e-6)
    excess = np.mean([mass[i] - 1 / (i + 1) for i in range(1, t)])
    assert total(report, "sink_mass_excess") == pytest.approx(excess, abs=1e-6)
    assert total(report, "first_to_rest_ratio") == pytest.approx(mass.mean() / ((1 - mass.mean()) / (t - 1)), rel=1e-5)


def test_the_planted_model_pays_what_was_planted():
    scores = ((0.0, 5.0), (-1.0, 2.0), (3.0, 8.0))
    report = ss.measure(planted_sink(scores), "an attention sink", ["sink_mass"], bos=True)
    t = report.about["texts"][0]["n_tokens"]
    expected = [[np.mean([math.exp(c) / (math.exp(c) + i) for i in range(t)]) for c in row] for row in scores]
    close(table(report, "sink_mass"), expected, 1e-5)


# --- the oracle ------------------------------------------------------------------------------------------------------


def test_the_oracle_covers_every_built_in_metric():
    covered = {n.partition("@")[0] for n in [*PER_HEAD, *PROFILES, *MODEL_LEVEL]}
    assert covered | {"head_profile", "query_profile", "sink_positions", "consistency"} == set(EVERYTHING)


@TEN
@given(patterns())
def test_every_metric_is_the_oracles(drawn):
    pattern, kind = drawn
    expected = oracles.reference(pattern, **kind)
    assume(far_from_thresholds(expected))
    check(play([pattern], EVERYTHING, **kind), expected)


@TEN
@given(patterns(), st.data())
def test_any_key_may_be_looked_at(drawn, data):
    pattern, kind = drawn
    t = pattern.shape[-1]
    key = data.draw(st.integers(-t, t - 1))
    expected = oracles.reference(pattern, key=key % t, **kind)
    assume(far_from_thresholds(expected))
    report = play([pattern], EVERYTHING, key=key, **kind)
    check(report, expected)
    rows = report.frame[report.frame["metric"].isin(["sink_mass", "layer_progression", "first_to_rest_ratio"])]
    assert set(rows["key"]) == {key % t}


@TEN
@given(patterns(), st.data())
def test_nulls_are_the_oracles(drawn, data):
    pattern, kind = drawn
    t = pattern.shape[-1]
    key = data.draw(st.sampled_from(sorted({0, min(3, t - 1), t - 1})))
    report = play([pattern], EVERYTHING, key=key, **kind)
    asked = {"key": key, "causal": kind["causal"], "window": kind["windows"][0]}
    for name in PER_HEAD:
        expected = oracles.null(name, t, **asked)
        close(table(report, name, column="null"), np.full(pattern.shape[:2], expected))
        close(total(report, name, column="null"), expected)
    for name in MODEL_LEVEL:
        close(total(report, name, column="null"), oracles.null(name, t, **asked))
    for name in PROFILES:
        expected = [oracles.null(name, t, **asked | {"key": k}) for k in range(t)]
        close(table(report, name, column="null"), np.tile(expected, (2, 1)))
    listed = sum(oracles.null("sink_share_of_heads", t, **asked | {"key": k}) for k in range(t))
    assert total(report, "sink_positions", column="null") == listed


def test_layers_with_and_without_a_window_have_nulls_of_their_own():
    t, windows = 20, [4, None]
    pattern = np.stack([random_pattern(1, t=t, layers=1, window=w)[0] for w in windows])
    report = play([pattern], EVERYTHING, windows=windows)
    check(report, oracles.reference(pattern, windows=windows))
    for layer, window in enumerate(windows):
        got = table(report, "visible_sink_mass", column="null")[layer]
        close(got, oracles.null("visible_sink_mass", t, window=window))
        close(table(report, "sink_mass", column="null")[layer], oracles.null("sink_mass", t))


@pytest.mark.parametrize(("engine", "key"), [("hooks", 0), ("hooks", 3), ("hooks", -1), ("flash", 0), ("flash", -1)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_tiny_models_against_hugging_faces_own_attentions(tiny, family, engine, key):
    model, texts = tiny(family), ["the quick brown fox", "so it goes"]
    report = ss.measure(model, texts, EVERYTHING, key=key, engine=engine)
    windows = [report.about["windows"].get(str(layer)) for layer in report.about["layers"]]
    for index, text in enumerate(texts):
        ids = torch.tensor([model.tokenizer(text).input_ids])
        with torch.no_grad():
            pattern = torch.cat(tiny_hf_model(family)(ids, output_attentions=True).attentions).numpy()
        causal = family != "bert"
        expected = oracles.reference(pattern, key=key % ids.shape[1], causal=causal, windows=windows)
        check(report, expected, f"text {index}", 1e-5)


# --- properties ------------------------------------------------------------------------------------------------------


@TEN
@given(patterns())
def test_mass_lies_between_nothing_and_the_row_sum(drawn):
    pattern, kind = drawn
    report = play([pattern], ["sink_mass", "row_deficit", "head_profile"], **kind)
    mass, held = table(report, "sink_mass"), 1 - table(report, "row_deficit")
    assert (mass >= 0).all()
    assert (mass <= held + 1e-6).all()
    close(table(report, "head_profile").sum(-1), held)


texts_of_attention = st.lists(st.tuples(st.integers(0, 2**32), st.integers(2, 14)), min_size=1, max_size=6)


@FIVE
@given(texts_of_attention, st.integers(1, 7), st.integers(1, 15), st.booleans())
def test_batches_and_blocks_of_rows_change_nothing(texts, batch_size, rows, causal):
    kind = "causal" if causal else "encoder"
    made = [random_pattern(seed, t=t, kind=kind) for seed, t in texts]
    whole = play(made, EVERYTHING, causal=causal, batch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held, "ROWS", rows)
        patch.setattr(nulls, "ROWS", rows)
        cut = play(made, EVERYTHING, causal=causal, batch_size=batch_size)
    pd.testing.assert_frame_equal(cut.frame, whole.frame, atol=1e-9, rtol=1e-9)
    pd.testing.assert_frame_equal(cut.summary(), whole.summary(), atol=1e-9, rtol=1e-9)


@FIVE
@given(texts_of_attention, st.randoms())
def test_the_order_of_texts_changes_only_the_order_of_rows(texts, random):
    made = {f"t{i}": random_pattern(seed, t=t) for i, (seed, t) in enumerate(texts)}
    order = list(made)
    random.shuffle(order)
    reports = []
    for labels in (list(made), order):
        model = Playback([made[label] for label in labels])
        reports.append(ss.measure(model, dict(zip(labels, model.ids, strict=True)), EVERYTHING))
    first, second = (r.frame.set_index(["text", "metric", "layer", "head", "key"]).sort_index() for r in reports)
    pd.testing.assert_frame_equal(first, second, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("pad", [0, 1, 2])  # an ordinary pad, BOS, EOS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "bert", "gpt_oss"])
def test_pads_change_nothing(tiny, family, side, pad):
    model, real = tiny(family), [[1, 7, 2, 9, 11, 4, 13], [1, 0, 8, 2]]
    ids, mask = torch.full((2, 10), pad), torch.zeros(2, 10, dtype=torch.long)
    for row, sequence in enumerate(real):
        place = slice(len(sequence)) if side == "right" else slice(10 - len(sequence), None)
        ids[row, place], mask[row, place] = torch.tensor(sequence), 1
    padded = ss.measure(model, ids, EVERYTHING, attention_mask=mask)
    alone = ss.measure(model, real, EVERYTHING, batch_size=1)
    pd.testing.assert_frame_equal(padded.frame, alone.frame, atol=1e-6, rtol=1e-6)  # effective_keys: relative
    pd.testing.assert_frame_equal(padded.summary(), alone.summary(), atol=1e-5, rtol=1e-6)


def test_a_threshold_is_applied_to_each_text_and_then_averaged():
    """Half the texts over 0.3 is a rate of a half, although the mean alpha, 0.35, is over 0.3 too."""
    a, b = np.zeros((2, 1, 1, 4, 4))
    a[..., 0], b[..., 0] = 0.6, 0.1
    report = play([a, b], ["sink_rate", "received"])
    assert total(report, "received", "all") == pytest.approx(0.35)
    assert total(report, "sink_rate@0.3", "all") == 0.5
    assert total(report, "sink_rate@0.8", "all") == 0.0


def test_a_threshold_is_a_strict_one_and_can_be_chosen():
    flat = np.full((1, 1, 4, 4), 0.5)
    report = play([flat], ["sink_rate@0.5", "sink_rate@0.49", "visible_sink_rate@0.25"])
    assert report.metrics == ["sink_rate@0.5", "sink_rate@0.49", "visible_sink_rate@0.25"]
    assert [total(report, m) for m in report.metrics] == [0, 1, 1]


def test_sink_positions_takes_a_threshold():
    pattern = random_pattern(5, t=12)
    report = play([pattern], ["sink_positions@0.5", "sink_positions"])
    alpha = oracles.reference(pattern)["received_profile"]
    for name, eps in (("sink_positions@0.5", 0.5), ("sink_positions", 0.3)):
        assert total(report, name) == ((alpha > eps).mean((0, 1)) >= 0.1).sum()


# --- the list of metrics ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_metric_says_in_one_line_what_it_is(name):
    doc = available()[name].doc
    assert 20 < len(doc) < 160
    assert doc.endswith((".", ";")) or ";" in doc


def test_the_default_is_everything_but_the_large_one():
    report = play([random_pattern(0, t=5)])
    assert {n.partition("@")[0] for n in report.metrics} == set(EVERYTHING) - {"head_profile", "query_profile", "consistency"}


@pytest.mark.parametrize("name", ["sink_strength", "layer_progression", "position_profile", "sink_positions"])
def test_a_derived_metric_alone_reports_itself_alone(name):
    assert play([random_pattern(0, t=8) * 0 + 0.5], [name]).metrics == [name]


@pytest.mark.parametrize("metrics", [["sink_mass", "consistency"], ["consistency"]])
def test_consistency_is_the_oracles(metrics):
    made = [random_pattern(seed, t=6) for seed in range(4)]
    expected = oracles.consistency(oracles.reference(p)["sink_mass"].mean() for p in made)
    rows = play(made, metrics).summary("all").set_index("metric")["value"]
    assert {part: rows.get(f"consistency@{part}") for part in expected} == pytest.approx(expected, rel=1e-9)
