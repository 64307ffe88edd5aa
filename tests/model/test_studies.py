"""Studies: numbers known in advance on planted models, numbers of other libraries, and words that follow from the numbers."""

import itertools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import studies
from sinkscope.metrics.across import POSITIVE, SHARE, t_interval
from sinkscope.studies import conflict, mixing, toy
from sinkscope.studies.massive import _say as say_massive
from sinkscope.studies.report import COLUMNS, Estimate, StudyReport, published, tabulate
from sinkscope.studies.start import bos as run_bos
from sinkscope.studies.streaming import PLACEBO, _say
from sinkscope.studies.texts import long_text, pieces
from sinkscope.studies.training import CASES, emerges
from sinkscope.testing import planted_sink, tiny_hf_model
from tests.model.compare import novel

IDS = torch.randint(3, 60, (80,), generator=torch.Generator().manual_seed(2))
#: Half of these heads pay more than 0.3 to BOS over 24 tokens.
SCORES = ((0.0, 1.0, 4.0, 6.0),)


def words(n, seed=0):
    """Text for the tokenizer of tiny models, one token per character."""
    letters = "abcdefghijklmnopqrstuvwxyz. "
    drawn = np.random.default_rng(seed).integers(len(letters), size=n)
    return "a" + "".join(letters[i] for i in drawn)


def alpha(score, tokens, at=0):
    """What a planted sink at position `at` receives."""
    return np.mean([math.exp(score) / (math.exp(score) + i) for i in range(at, tokens)])


# --- what all share ------------------------------------------------------------------------------------------------------


def test_an_estimate_is_the_t_interval():
    values = [0.2, 0.5, 0.3, math.nan]
    given = np.array(values[:3])
    got = Estimate.of(values, null=0.1)
    assert got.value == pytest.approx(given.mean())
    assert got[1:3] == pytest.approx(t_interval(given.mean(), given.std(ddof=1) / math.sqrt(3), 3))
    assert (got.null, str(Estimate.of([0.5]))) == (0.1, "0.5")
    assert math.isnan(Estimate.of([]).value)


def test_every_published_figure_has_its_source_and_how_it_was_read():
    rows = pd.concat([published(name) for name in studies.STUDIES])
    assert len(rows) == 119
    assert rows["source"].str.len().min() > 20
    assert set(rows["evidence"]) == {"transcription", "code", "secondary"}  # none from memory
    assert rows["value"].notna().all()
    assert list(rows.columns) == COLUMNS


def test_a_study_is_found_by_its_name():
    for name in studies.STUDIES:
        assert callable(studies.find(name))
        assert getattr(studies, studies.find(name).__name__) is studies.find(name)
    with pytest.raises(ss.SinkscopeError, match="did you mean 'streaming-llm'"):
        studies.find("streaming-lm")


def test_what_is_saved(tmp_path):
    table = tabulate("bos", "<b>m", [("BOS first", "perplexity", Estimate(3.0, 2.0, 4.0, 1.0), "T = 8")])
    picture = {"one": lambda *, ax: ax.plot([0, 1])}
    report = StudyReport("bos", "is it?", table, "yes <i>", "it & is", {"texts": [], "model": "m"}, picture)
    path = report.save(tmp_path)
    assert {p.name for p in path.iterdir()} == {
        "study.csv",
        "study.parquet",
        "study.txt",
        "study.html",
        "study.json",
        "one.png",
    }
    pd.testing.assert_frame_equal(pd.read_parquet(path / "study.parquet"), table)
    assert json.loads((path / "study.json").read_text())["verdict"] == "yes <i>"
    page = (path / "study.html").read_text()
    assert "3 (2 to 4) | 1" in page
    assert "yes &lt;i&gt;" in page
    assert "<b>m" not in page
    assert report.estimate("BOS first", "perplexity") == (3.0, 2.0, 4.0, 1.0)
    with pytest.raises(KeyError):
        report.estimate("no BOS", "perplexity")  # published, not ours


def test_pieces_of_one_text(tiny):
    model = ss.models.adapt(tiny("llama"))
    cut = pieces(model, {"t": words(2000)}, count=5, size=20)
    assert [len(s) for s in cut.sequences] == [20] * 5
    assert [s.label for s in cut.sequences] == [f"t {i}" for i in range(5)]
    assert all(int(s.ids[0]) == 1 for s in cut.sequences)  # BOS, the model's convention
    assert len({tuple(s.ids.tolist()) for s in cut.sequences}) == 5
    assert not any(int(s.ids[0]) == 1 for s in pieces(model, words(2000), count=5, size=20, bos=False).sequences)
    assert [len(s) for s in pieces(model, IDS, count=9, size=20).sequences] == [20] * 4
    assert [len(s) for s in pieces(model, [IDS, IDS[:30]], count=9, size=20).sequences] == [20, 20]
    short = pieces(model, words(30), count=5, size=20)  # too short for three: as one text
    assert [len(s) for s in short.sequences] == [20]
    assert len(next(iter(long_text().values()))) > 300_000


# --- first-token ---------------------------------------------------------------------------------------------------------


def test_first_token_is_what_was_planted(tmp_path):
    model, texts = planted_sink(SCORES), {"a": words(30), "b": words(30, 1)}
    report = studies.first_token(model, texts)
    t = 32
    mass = np.mean([alpha(c, t) for c in SCORES[0]])
    assert report.estimate("natural", "sink_mass").value == pytest.approx(mass, abs=1e-5)
    assert report.estimate("natural", "sink_mass").null == pytest.approx(sum(1 / i for i in range(1, t + 1)) / t)
    assert report.estimate("natural", "largest_layer").value == pytest.approx(mass, abs=1e-5)
    assert report.estimate("natural", "sink_strength").value == pytest.approx(mass, abs=1e-5)
    assert report.estimate("natural", "first_to_rest_ratio").value == pytest.approx(mass / ((1 - mass) / (t - 1)), rel=1e-4)
    assert report.table[report.table["model"] == "gpt2"]["value"].tolist() == [0.694, 0.994, 20.4, 0.7, 0.317]
    assert {"measurements.csv", "report.html", "study.html", "progression.png"} <= {
        p.name for p in report.save(tmp_path).iterdir()
    }


# --- sink-rate -----------------------------------------------------------------------------------------------------------


def test_sink_rate_is_what_was_planted():
    """Without BOS attention is uniform, with BOS two heads of four sink; absolute positions play no part in that model."""
    report = studies.sink_rate(planted_sink(SCORES), words(3000), sequences=6, tokens=24)
    null = sum(1 / i for i in range(1, 25)) / 24
    for case in ("natural", "repeated token"):
        assert report.estimate(case, "sink_rate@0.3").value == 0
        assert report.estimate(case, "received").value == pytest.approx(null, abs=1e-5)
        assert report.estimate(case, "received").null == pytest.approx(null)
    assert report.estimate("natural, BOS first", "sink_rate@0.3") == pytest.approx((0.5, 0.5, 0.5, 0.0))
    expected = np.mean([alpha(c, 24) for c in SCORES[0]])
    assert report.estimate("natural, BOS first", "received").value == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_repeated_token_marks_nothing_where_positions_are_relative(tiny, family):
    report = studies.sink_rate(tiny(family), words(3000), sequences=4, tokens=24)
    gap = report.estimate("repeated token", "state_difference").value
    if family == "llama":
        assert gap < 1e-5
        assert "nothing marks the first token" in report.said
    else:
        assert gap > 0.1
        assert "positions tell the tokens apart" in report.said


@pytest.mark.model
def test_smollm2_on_a_repeated_token(smollm2):
    """What is exact: equal hidden states, so that a row depends on distances alone. (Uniform it need not be.)"""
    report = studies.sink_rate(smollm2, None, sequences=6)
    assert report.estimate("repeated token", "sink_rate@0.3").value == 0
    assert report.estimate("natural", "sink_rate@0.3").low > 0.5
    assert report.estimate("repeated token", "state_difference").value < 1e-4
    ids = torch.full((64,), 504)
    attention = ss.attention_map(smollm2, ids, layer=5, head=2).pivot(index="query", columns="key", values="value").to_numpy()
    for i, distance in itertools.product((20, 40, 62), (1, 7, 19)):  # A[i, i-d] / A[i, i] is the same in every row
        one, two = (attention[row, row - distance] / attention[row, row] for row in (i, i + 1))
        assert one == pytest.approx(two, rel=1e-3)


# --- non-first -----------------------------------------------------------------------------------------------------------


def test_a_planted_sink_is_found_where_it_is():
    """BOS stands at position 7: the first token gets its even share, and one position per text is a secondary sink."""
    rows = []
    for seed in range(4):
        row = torch.randint(3, 60, (48,), generator=torch.Generator().manual_seed(seed))
        row[7] = 1
        rows.append(row)
    report = studies.non_first(planted_sink(((5.0, 5.0), (0.0, 6.0))), rows, tokens=48)
    assert report.estimate("secondary sinks", "positions_per_text").value == 1
    assert "the strongest is position 7" in report.said
    first = [np.mean([1 / (i + 1) if i < 7 else 1 / (math.exp(c) + i) for i in range(48)]) for c in (5, 5, 0, 6)]
    assert report.estimate("first token", "received").value == pytest.approx(np.mean(first), abs=1e-5)


def test_no_secondary_sink_is_a_finding():
    report = studies.non_first(planted_sink(SCORES), words(3000), sequences=4, tokens=48)
    assert report.estimate("secondary sinks", "positions_per_text").value == 0
    assert "No position after the first is a sink" in report.said


def test_sep_in_an_encoder(tiny):
    report = studies.non_first(tiny("bert"), {"t": words(2000)}, sequences=4, tokens=40)
    frame = ss.measure(
        tiny("bert"), pieces(ss.models.adapt(tiny("bert")), {"t": words(2000)}, count=4, size=40), key=-1
    ).frame
    rows = frame[(frame["metric"] == "sink_mass") & (frame["text"] != "all")]
    n = rows["layer"].max() + 1
    middle = rows[(rows["layer"] >= n // 2 - 1) & (rows["layer"] < n * 5 // 6)]
    assert report.estimate("[SEP], middle layers", "attention_to_class").value == pytest.approx(
        middle["value"].mean(), abs=1e-6
    )
    shares = report.ours[report.ours["quantity"] == "attention_to_class"].set_index("case")["value"]
    assert shares.drop("[SEP], middle layers").sum() == pytest.approx(1, abs=1e-5)


# --- bos -----------------------------------------------------------------------------------------------------------------


def test_bos_carries_the_sink_and_no_loss():
    """The planted heads write nothing: without BOS the sink is gone and the loss is what it was."""
    report = run_bos(planted_sink(SCORES), words(3000), sequences=5, tokens=24)
    assert report.estimate("no BOS", "delta_loss") == pytest.approx((0, 0, 0, math.nan), abs=1e-5, nan_ok=True)
    assert report.estimate("BOS first", "sink_rate@0.3").value == 0.5
    assert report.estimate("no BOS", "sink_rate@0.3").value == 0
    assert report.verdict.startswith("No dependence of the loss on BOS was found")
    assert report.verdict.endswith("the first token is no longer the sink.")
    assert len(report.table[report.table["evidence"] == "code"]) == 16


def test_bos_needs_one(tiny):
    with pytest.raises(ss.SinkscopeError, match="has no BOS token"):
        studies.bos(tiny("bert"), words(900))
    with pytest.raises(ss.SinkscopeError, match="do not begin with BOS"):
        studies.bos(tiny("llama"), [IDS, IDS.flip(0)])


def test_perplexities_are_of_the_same_tokens(tiny):
    """Without BOS the first token can't be scored: it counts in no case."""
    model, text = tiny("llama"), {"t": words(3000)}
    report = studies.bos(model, text, sequences=4, tokens=30)
    sample = pieces(ss.models.adapt(model), text, count=4, size=30, bos=True)
    losses = []
    for s in sample.sequences:
        with torch.no_grad():
            logits = tiny_hf_model("llama")(input_ids=s.ids[None]).logits[0].double().log_softmax(-1)
        scored = [-float(logits[i - 1, s.ids[i]]) for i in range(2, 30)]
        losses.append(scored)
    placebo = next(e for e in report.reports[""].interventions if e not in ("none", "drop_tokens(positions=[0])"))
    gone = int(re.findall(r"\d+", placebo)[0])
    mean = np.mean([np.mean([x for i, x in enumerate(row, start=2) if i != gone]) for row in losses])
    assert report.estimate("BOS first", "perplexity").value == pytest.approx(math.exp(mean), rel=1e-3)


# --- massive-activations -------------------------------------------------------------------------------------------------


def test_massive_activations_planted(tmp_path):
    """Where one is planted by hand, the study finds it, and its rows are what `evaluate` and `measure` say."""
    from tests.model.test_evaluate import IDS as TEXT
    from tests.model.test_evaluate import planted

    model, ids = planted(), TEXT.clone()
    ids[ids == 5], ids[17] = 6, 5
    other = ids.flip(0)
    other[other == 5], other[17] = 6, 5
    report = studies.massive_activations(model, [ids, other], ratio=500)
    assert list(dict.fromkeys(report.ours["case"])) == [
        "unedited",
        "set to zero",
        "set to mean",
        "placebo: other dimensions zeroed",
    ]
    assert "in 2 of them after layer 0: dimension 3 of token 17" in report.said
    edit = ss.interventions.EditActivation(0.0, layers=0, positions=17, dims=3)
    again = ss.evaluate(model, [ids, other], edit).summary().set_index("intervention").loc[str(edit)]
    assert report.estimate("set to zero", "delta_loss")[:3] == pytest.approx(again[["delta_loss", "low", "high"]].tolist())
    plain = ss.measure(model, [ids, other], ["sink_mass"]).intervals().iloc[0]
    assert report.estimate("unedited", "sink_mass")[:3] == pytest.approx(plain[["value", "low", "high"]].tolist(), abs=1e-6)
    assert abs(report.estimate("set to zero", "sink_mass").value - plain["value"]) > 1e-6
    rates = [report.estimate(case, "sink_rate@0.3").value for case in ("set to zero", "unedited")]
    assert report.estimate("set to zero", "sink_rate_change").value == pytest.approx(rates[0] - rates[1])
    report.save(tmp_path)
    assert (tmp_path / "study.txt").read_text().strip() == report.said


def test_no_massive_activation_is_a_finding(tiny):
    report = studies.massive_activations(tiny("llama"), [IDS])
    assert "has no massive activation: the largest is" in report.said
    assert set(report.ours["case"]) == {"unedited"}
    assert report.verdict == "No massive activation: there is nothing to edit."


def test_a_placebo_may_be_located_later():
    from tests.model.test_evaluate import IDS as TEXT
    from tests.model.test_evaluate import planted

    model, ids = planted(), TEXT.clone()
    ids[ids == 5], ids[17] = 6, 5
    edit = ss.interventions.EditActivation(0.0, ratio=500)
    assert edit.placebo(3).located(model, ids) == edit.located(model, ids).placebo(3)
    assert str(edit.placebo(3)) == "edit_activation(to=0.0, ratio=500, decoy=3)"
    assert ss.interventions.parse(str(edit.placebo(3))) == edit.placebo(3)


def test_words_of_massive_activations_follow_the_numbers():
    def value(lost, rate):
        cases = ("unedited", "set to zero", "set to mean", "placebo: other dimensions zeroed")
        rows = {(case, "delta_loss"): Estimate(0.0, -0.1, 0.1) for case in cases}
        rows |= {(case, "sink_rate@0.3"): Estimate(0.5, 0.45, 0.55) for case in cases}
        change = Estimate(rate.value - 0.5, rate.low - 0.5, rate.high - 0.5)
        rows |= {("set to zero", "sink_rate@0.3"): rate, ("set to zero", "sink_rate_change"): change}
        return rows | {("set to zero", "delta_loss"): lost}

    sample = ss.tokenize(None, [[1, 2, 3]])
    found = [ss.interventions.EditActivation(0.0, layers=1, positions=0, dims=4)]
    verdict, said = say_massive("m", sample, value(Estimate(3, 2, 4), Estimate(0.1, 0.05, 0.2)), found, "")
    assert verdict == "Set to zero, 1 of them cost 3 nats (to their mean, 0); heads with a sink go from 0.50 to 0.10."
    assert "null result" not in said
    assert "not that they make the sink" in said
    verdict, said = say_massive("m", sample, value(Estimate(0.05, 0.01, 0.09), Estimate(0.5, 0.4, 0.6)), found, "")
    assert verdict.startswith("Set to zero, no cost of them is shown (to their mean, 0); no fall of the sink rate is shown")
    assert "null result" in said


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_hangs_on_its_massive_activation(smollm2):
    report = studies.massive_activations(smollm2, {"a novel": novel(2000)}, sequences=4, tokens=128)
    zeroed = report.estimate("set to zero", "delta_loss")
    assert zeroed.value > 5
    assert zeroed.low > 0  # four pieces differ
    assert report.estimate("set to zero", "sink_rate_change").high < 0
    assert abs(report.estimate("set to mean", "delta_loss").value) < 0.1
    assert abs(report.estimate("placebo: other dimensions zeroed", "delta_loss").value) < 0.1
    assert "dimension 507 of token 0" in report.said


@pytest.mark.model
def test_the_located_place_is_where_one_looks(smollm2):
    """The residual stream itself, by a torch hook on Hugging Face's layer."""
    ids, seen = pieces(ss.models.adapt(smollm2), None, count=3, size=64).sequences[0].ids, []
    layer = smollm2.original_model.model.layers[11]
    handle = layer.register_forward_hook(lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out)[0]))
    try:
        with torch.no_grad():
            smollm2.original_model.base_model(input_ids=ids[None])
    finally:
        handle.remove()
    size = seen[0].reshape(len(ids), -1).abs()
    assert divmod(int(size.argmax()), size.shape[1]) == (0, 507)
    assert size.max() / size.median() > 1000


# --- streaming-llm -------------------------------------------------------------------------------------------------------


def test_the_regimes_are_what_they_say(tiny, tmp_path):
    report = studies.streaming_llm(tiny("llama"), "so it goes " * 8, budget=12, recompute=True)
    assert list(dict.fromkeys(report.ours["case"])) == [
        "dense",
        "window",
        "1 sink",
        "2 sinks",
        "4 sinks",
        "8 sinks",
        PLACEBO,
        "line breaks",
        "cache positions",
        "re-computation",
    ]
    again = ss.evaluate(tiny("llama"), "so it goes " * 8, ["window(size=12)", "sink_window(size=12, sinks=2)"], score_from=24)
    expected = again.summary().set_index("intervention")
    for case, edit in (("window", "window(size=12)"), ("2 sinks", "sink_window(size=12, sinks=2)")):
        got = report.estimate(case, "delta_loss")
        assert got[:3] == pytest.approx(expected.loc[edit, ["delta_loss", "low", "high"]].tolist(), abs=1e-6)
    report.save(tmp_path)
    assert len(pd.read_csv(tmp_path / "study.csv")) == len(report.table)
    assert {"effects.csv", "loss.png", "report.html", "study.html"} <= {p.name for p in tmp_path.iterdir()}


def test_absolute_positions_have_no_cache_positions(tiny):
    report = studies.streaming_llm(tiny("gpt2"), "so it goes " * 8, budget=12)
    assert "cache positions" not in set(report.ours["case"])


def windows(window, low, one=5.0):
    rows = {("dense", "perplexity"): Estimate(10), ("window", "perplexity"): Estimate(window)}
    rows |= {("4 sinks", "perplexity"): Estimate(one), ("1 sink", "delta_loss"): Estimate(math.log(1.1))}
    lost = Estimate(math.log(window / 10), low, 9)
    return rows | {("window", "delta_loss"): lost, (PLACEBO, "delta_loss"): lost}


def test_words_follow_the_numbers():
    text = {"label": "t", "n_tokens": 9}
    verdict, said = _say("m", 64, text, windows(10.1, -0.1))
    assert "no collapse was found" in said
    assert verdict.startswith("No collapse")
    verdict, said = _say("m", 64, text, windows(1000.0, 1.0, one=10.0))
    assert "100 times as much" in said
    assert "undoes 98%, and keeping four later ones instead 0%" in said
    assert "collapses less than Llama-2-7B, Llama-2-13B." in said
    assert verdict == "Evicting the first token costs 4.61 nats; keeping it alone undoes 98%, four later ones 0%."


def test_bad_calls(tiny):
    with pytest.raises(ss.SinkscopeError, match="more than 8 keys"):
        studies.streaming_llm(tiny("llama"), [IDS], budget=8)
    with pytest.raises(ss.SinkscopeError, match="one long text"):
        studies.streaming_llm(tiny("llama"), [IDS, IDS], budget=12)
    with pytest.raises(ss.SinkscopeError, match="at least 24 are needed"):
        studies.over_mixing(tiny("llama"), [IDS[:20]])
    with pytest.raises(ss.SinkscopeError, match="a text of 32 tokens: more than 32 are needed"):
        studies.non_first(tiny("llama"), [IDS], tokens=32)


@pytest.mark.model
@pytest.mark.slow
def test_smollm2_collapses_and_one_token_undoes_it(smollm2):
    report = studies.streaming_llm(smollm2, {"a novel": novel(640)}, budget=128, max_tokens=640)
    delta = report.ours[report.ours["quantity"] == "delta_loss"].set_index("case")["value"]
    assert delta["window"] > 0.5
    assert delta[["1 sink", "2 sinks", "4 sinks", "8 sinks", "cache positions", "line breaks"]].max() < 0.5 * delta["window"]
    assert delta[PLACEBO] > 0.8 * delta["window"]
    assert "undoes" in report.said


# --- over-mixing ---------------------------------------------------------------------------------------------------------


def test_spread_is_hugging_faces(tiny):
    """The intact run against hidden states of a fresh Hugging Face model; removal is the same texts without token 0."""
    texts = [torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(s)) for s in range(3)]
    report = studies.over_mixing(tiny("llama"), texts, changes=4, seed=5)
    generator, network, seen = torch.Generator().manual_seed(5), tiny_hf_model("llama"), []
    for block in network.model.layers:
        block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    expected = {mixing.INTACT: [], mixing.REMOVED: []}
    for ids in texts:
        batch, places = mixing._changes(ids, 4, generator)
        assert (batch[1:] != batch[0]).sum(1).tolist() == [1] * 4
        for case, start in ((mixing.INTACT, 0), (mixing.REMOVED, 1)):
            seen.clear()
            with torch.no_grad():
                network(input_ids=batch[:, start:])
            of_layers = []
            for h in seen:
                by_distance = {}
                for row, place in enumerate((places - start).tolist(), start=1):
                    for t in range(place + 1, h.shape[1]):
                        change = float((h[row, t] - h[0, t]).norm() / h[0, t].norm())
                        by_distance.setdefault(t - place, []).append(change)
                of_layers.append(np.mean([np.mean(v) for v in by_distance.values()]))
            expected[case].append(np.mean(of_layers))
    for case, values in expected.items():
        assert report.estimate(case, "spread")[:3] == pytest.approx(Estimate.of(values, bounds=POSITIVE)[:3], rel=1e-4)


def test_heads_that_write_nothing_spread_nothing():
    texts = [IDS[:40], IDS[40:]]
    report = studies.over_mixing(planted_sink(SCORES), texts, changes=3)
    for case in (mixing.INTACT, mixing.MASKED, mixing.LATE, mixing.REMOVED, mixing.PLACEBO):
        assert report.estimate(case, "spread").value == 0


def test_relative_positions_cannot_tell_masked_from_removed(tiny):
    report = studies.over_mixing(tiny("llama"), [IDS[:40], IDS[40:]], changes=3)
    masked, removed = (report.estimate(case, "spread") for case in (mixing.MASKED, mixing.REMOVED))
    assert masked[:3] == pytest.approx(removed[:3], rel=1e-4)
    late, intact = (report.estimate(case, "spread").value for case in (mixing.LATE, mixing.INTACT))
    assert abs(late - intact) > 1e-6


# --- semantic-conflict ---------------------------------------------------------------------------------------------------


def test_the_sentences_match():
    assert len(conflict.GROUPS) >= 8
    for frame, phrases in conflict.GROUPS:
        assert len({len(p.split()) for p in phrases}) == 1
        assert len(set(phrases)) == len(conflict.LEVELS) == 3
        assert frame.count("{}") == 1


def test_rank_correlation_and_its_permutations():
    values = np.array([[1.0, 2.0, 3.0], [6.0, 5.0, 4.0], [1.0, 3.0, 2.0], [2.0, 2.0, 2.0]])
    np.testing.assert_allclose(conflict.rank_correlations(values), [1, -1, 0.5, 0])
    values = np.array([[0.1, 0.2, 0.3], [0.3, 0.5, 0.4], [0.2, 0.3, 0.9]])
    observed = conflict.rank_correlations(values).mean()
    every = [
        conflict.rank_correlations(np.array(rows)).mean()
        for rows in itertools.product(*(itertools.permutations(row) for row in values.tolist()))
    ]
    exact = np.mean(np.abs(every) >= observed - 1e-9)
    assert conflict.permutation_p(values, 4000, np.random.default_rng(0)) == pytest.approx(exact, abs=0.02)


def test_conflict_where_words_can_not_matter():
    """On the planted model the sink depends on the length alone, and the sentences of a group have one length."""
    report = studies.semantic_conflict(planted_sink(SCORES), permutations=200)
    assert report.estimate("strong minus none", "sink_mass_excess")[:3] == pytest.approx((0, 0, 0), abs=1e-6)
    assert len(report.reports[""].texts) == 3 * len(conflict.GROUPS)
    lengths = [t["n_tokens"] for t in report.reports[""].about["texts"]]
    assert all(len(set(lengths[i : i + 3])) == 1 for i in range(0, len(lengths), 3))


# --- emergence -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_emergence_says_what_training_said():
    """A few steps, to see that the table is the history's last row; what grows in longer runs is the next test's."""
    report = studies.emergence(steps=4, seeds=2)
    for case, how in CASES.items():
        runs = [toy.train(toy.BigramBackcopy(), steps=4, seed=seed, every=1, **how).iloc[-1] for seed in range(2)]
        got = report.estimate(case, "sink_mass")
        assert got[:3] == pytest.approx(Estimate.of([run["sink_mass"] for run in runs], bounds=SHARE)[:3], abs=1e-4)
        assert got.null == pytest.approx(sum(1 / i for i in range(2, 65)) / 63)
        assert report.estimate(case, "value_drain").value == pytest.approx(
            np.mean([r["value_drain"] for r in runs]), abs=1e-4
        )


@pytest.mark.slow
def test_a_sink_grows_with_softmax_and_not_in_the_controls():
    """The first token gets most of every row where rows must sum to one; its weight stays small where they need not."""
    last = {
        case: toy.train(toy.BigramBackcopy(), steps=250, every=250, **CASES[case]).iloc[-1]
        for case in ("softmax", "learned sink", "sigmoid", "relu")
    }
    assert last["softmax"]["sink_mass"] > 0.5
    assert last["softmax"]["sink_mass_other"] > 10 * last["softmax"]["sink_mass_trigger"]  # active at triggers, else dormant
    assert last["softmax"]["value_drain"] < 0.5
    for control in ("learned sink", "sigmoid", "relu"):
        assert last[control]["sink_weight"] < 0.2
        assert last[control]["value_drain"] > last["softmax"]["value_drain"]


def test_when_a_sink_emerges():
    run = pd.DataFrame({"step": [0, 10, 20, 30], "null": [0.06] * 4})
    for mass, step in (([0.2, 0.1, 0.3, 0.4], 20), ([0.4, 0.3, 0.3, 0.4], 0), ([0.1, 0.1, 0.1, 0.4], 30)):
        assert emerges(run.assign(sink_mass=mass)) == step
    assert math.isnan(emerges(run.assign(sink_mass=[0.4, 0.4, 0.4, 0.1])))


def test_checkpoints_are_measured_one_by_one():
    """From no sink to a planted one: the numbers are `measure`'s and `evaluate`'s."""
    models = {0: planted_sink(((0.0, 0.0),)), 100: planted_sink(((4.0, 6.0),)), 50: planted_sink(((0.0, 0.1),))}
    report = studies.emergence(text=words(3000), checkpoints=models, sequences=3, tokens=24)
    assert list(dict.fromkeys(report.ours["case"])) == ["step 0", "step 50", "step 100"]
    assert report.estimate("step 100", "sink_mass").value == pytest.approx((alpha(4, 24) + alpha(6, 24)) / 2, abs=1e-5)
    assert report.estimate("step 0", "sink_rate@0.3").value == 0
    sample = pieces(ss.models.adapt(models[100]), words(3000), count=3, size=24)
    loss = ss.evaluate(models[100], sample, ss.interventions.Intervention()).summary().set_index("intervention").loc["none"]
    assert report.estimate("step 100", "perplexity").value == pytest.approx(math.exp(loss["loss"]), rel=1e-6)
    assert report.verdict == "The sink has emerged by step 100."
    with pytest.raises(ss.SinkscopeError, match="checkpoints are loaded by name"):
        studies.emergence(planted_sink(SCORES), checkpoints=[1, 2])


def test_checkpoints_by_step_are_revisions_of_the_name(monkeypatch):
    asked = []
    models = {"step0": planted_sink(((0.0, 0.0),)), "step8": planted_sink(((4.0, 6.0),))}
    load = lambda name: asked.append(name) or models[name.partition("@")[2]]  # noqa: E731
    monkeypatch.setattr("sinkscope.studies.training.load_model", load)
    report = studies.emergence("lab/toy", words(3000), checkpoints=[8, 0], sequences=3, tokens=24)
    assert asked == ["lab/toy@step0", "lab/toy@step8"]
    assert set(report.ours["model"]) == {"lab/toy"}


def test_a_revision_reaches_the_loaders(monkeypatch):
    from transformers import AutoConfig

    asked = []

    def give(name, **how):
        asked.append((name, how))
        raise OSError("not here")

    monkeypatch.setattr("sinkscope.models.load._hub_can_answer", lambda name: True)
    monkeypatch.setattr(AutoConfig, "from_pretrained", give)
    with pytest.raises(ss.SinkscopeError, match="lab/toy@step8"):
        ss.load_model("lab/toy@step8")
    assert asked == [("lab/toy", {"revision": "step8", "trust_remote_code": False})]


# --- architectures -------------------------------------------------------------------------------------------------------


def test_models_beside_each_other(tiny):
    models = {"planted": planted_sink(SCORES), "tiny": tiny("llama")}
    report = studies.architectures(models, words(3000), sequences=4, tokens=24)
    assert report.estimate("trained", "sink_rate@0.3", "planted").value == 0.5
    alone = ss.measure(tiny("llama"), pieces(ss.models.adapt(tiny("llama")), words(3000), count=4, size=24), ["sink_mass"])
    assert report.estimate("trained", "sink_mass", "tiny").value == pytest.approx(alone.summary("all")["value"].item())
    assert report.estimate("untrained", "sink_rate@0.3", "planted").value == 0
    with pytest.raises(ss.SinkscopeError, match="two models of one name"):
        studies.architectures(tiny("llama"), words(900), also=[tiny("llama")])


# --- all -----------------------------------------------------------------------------------------------------------------


def test_every_study_in_one_directory_and_only_once(tiny, tmp_path, monkeypatch):
    model, text = tiny("bert"), {"t": words(3000)}
    page = studies.run_all(model, text, tmp_path, only=["non-first", "bos"])
    shown = page.read_text()
    assert 'href="non-first/study.html"' in shown
    assert "has no BOS token" in shown  # not run, with the reason
    assert (tmp_path / "non-first" / "study.html").is_file()
    ran = []
    find = studies.find
    monkeypatch.setattr("sinkscope.studies.everything.find", lambda name: lambda *a: ran.append(name) or find(name)(*a))
    studies.run_all(model, text, tmp_path, only=["non-first"])
    assert ran == []
    studies.run_all(model, {"t": words(3001)}, tmp_path, only=["non-first"])
    assert ran == ["non-first"]
    (tmp_path / "non-first" / "study.json").unlink()  # as a killed run leaves it
    studies.run_all(model, {"t": words(3001)}, tmp_path, only=["non-first"])
    assert ran == ["non-first"] * 2


def test_a_kill_leaves_no_mark_of_another_run(tiny, tmp_path, monkeypatch):
    """Killed between a study's last file and its mark: the folder must not pass for the run that was there before."""
    before = {"t": words(3000)}
    studies.run_all(tiny("bert"), before, tmp_path, only=["non-first"])

    def killed(path, fill):
        raise KeyboardInterrupt

    monkeypatch.setattr("sinkscope.studies.everything.write", killed)
    with pytest.raises(KeyboardInterrupt):
        studies.run_all(tiny("bert"), {"t": words(3001)}, tmp_path, only=["non-first"])
    assert (tmp_path / "non-first" / "study.json").is_file()
    assert not (tmp_path / "non-first" / "run.txt").exists()


def test_ids_without_bos_are_not_called_bos_first(tiny):
    report = studies.sink_rate(tiny("llama"), IDS, sequences=4, tokens=20)
    assert "natural, BOS first" not in set(report.ours["case"])
    with pytest.raises(ss.SinkscopeError, match="these texts begin with BOS"):
        studies.sink_rate(tiny("llama"), [[1, 5, 6, 7], [1, 8, 9, 4]])
