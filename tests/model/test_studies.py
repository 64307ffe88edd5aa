"""Studies: the protocol that they say, ours beside what was published, words that follow from the numbers."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.studies.report import published
from sinkscope.studies.streaming import _say
from tests.model.compare import novel

IDS = torch.randint(3, 60, (80,), generator=torch.Generator().manual_seed(2))


def test_the_regimes_are_what_they_say(tiny, tmp_path):
    report = ss.studies.streaming_llm(tiny("llama"), "so it goes " * 8, budget=12, recompute=True)
    ours = report.table[report.table["evidence"] == "measured"].set_index("regime")
    assert list(ours.index) == [
        "dense",
        "window",
        "1 sink",
        "2 sinks",
        "4 sinks",
        "8 sinks",
        "placebo: 4 later keys kept",
        "line breaks",
        "cache positions",
        "re-computation",
    ]
    again = ss.evaluate(tiny("llama"), "so it goes " * 8, ["window(size=12)", "sink_window(size=12, sinks=2)"], score_from=24)
    expected = again.summary().set_index("intervention")["perplexity"]
    np.testing.assert_allclose(ours.loc[["dense", "window", "2 sinks"], "perplexity"], expected)
    report.save(tmp_path)
    assert len(pd.read_csv(tmp_path / "study.csv")) == len(report.table)
    assert (tmp_path / "study.txt").read_text().strip() == report.said
    assert {"effects.csv", "loss.png", "report.html"} <= {p.name for p in tmp_path.iterdir()}


def test_absolute_positions_have_no_cache_positions(tiny):
    table = ss.studies.streaming_llm(tiny("gpt2"), "so it goes " * 8, budget=12).table
    assert "cache positions" not in set(table[table["evidence"] == "measured"]["regime"])


def test_every_published_figure_has_its_source():
    rows = published("streaming-llm")
    assert len(rows) == 25
    assert rows["source"].str.contains("arXiv").all()
    assert set(rows["evidence"]) <= {"transcription", "code"}
    assert not rows.isna().any().any()


def ours(window, low, one=5.0):
    rows = [("dense", 10, 0, 0), ("window", window, np.log(window / 10), low), ("1 sink", 11, np.log(1.1), 0)]
    rows += [("4 sinks", one, 0.05, 0), ("placebo: 4 later keys kept", window, np.log(window / 10), 0)]
    frame = pd.DataFrame(rows, columns=["regime", "perplexity", "delta_loss", "low"]).set_index("regime")
    return frame.assign(model="m", cache=64)


def test_words_follow_the_numbers():
    text = {"label": "t", "n_tokens": 9}
    none = _say(ours(10.1, -0.1), published("streaming-llm"), text)
    assert "no collapse was found" in none
    assert "undoes" not in none
    large = _say(ours(1000.0, 1.0, one=10.0), published("streaming-llm"), text)
    assert "100 times as much" in large
    assert "undoes 98%, and keeping four later ones instead 0%" in large
    assert "collapses less than Llama-2-7B, Llama-2-13B." in large


def test_bad_calls(tiny):
    with pytest.raises(ss.SinkscopeError, match="more than 8 keys"):
        ss.studies.streaming_llm(tiny("llama"), [IDS], budget=8)
    with pytest.raises(ss.SinkscopeError, match="one long text"):
        ss.studies.streaming_llm(tiny("llama"), [IDS, IDS], budget=12)
    with pytest.raises(ss.SinkscopeError, match="did you mean 'streaming-llm'"):
        ss.studies.find("streaming-lm")


@pytest.mark.model
def test_smollm2_collapses_and_one_token_undoes_it(smollm2):
    report = ss.studies.streaming_llm(smollm2, {"a novel": novel(1024)}, budget=128, max_tokens=1024)
    delta = report.table[report.table["evidence"] == "measured"].set_index("regime")["delta_loss"]
    assert delta["window"] > 0.5
    assert delta[["1 sink", "2 sinks", "4 sinks", "8 sinks", "cache positions", "line breaks"]].max() < 0.5 * delta["window"]
    assert delta["placebo: 4 later keys kept"] > 0.8 * delta["window"]
    assert "undoes" in report.said


# --- massive-activations ------------------------------------------------------------------------------------------


def test_massive_activations_planted(tmp_path):
    """Where one is planted by hand, the study finds it, and its rows are what `evaluate` and `measure` say."""
    from tests.model.test_evaluate import IDS as TEXT
    from tests.model.test_evaluate import planted

    model, ids = planted(), TEXT.clone()
    ids[ids == 5], ids[17] = 6, 5
    report = ss.studies.massive_activations(model, ids, ratio=500)
    ours = report.table[report.table["evidence"] == "measured"].set_index("regime")
    assert list(ours.index) == ["unedited", "set to zero", "set to mean", "placebo: other dimensions zeroed"]
    assert "after layer 0: dimension 3 of token 17" in report.said
    edit = ss.interventions.EditActivation(0.0, layers=0, positions=17, dims=3)
    assert ours.loc["set to zero", "delta_loss"] == pytest.approx(
        ss.evaluate(model, ids, edit).summary().set_index("intervention").loc[str(edit), "delta_loss"]
    )
    plain = ss.measure(model, ids, ["sink_mass"]).summary("all")["value"].item()
    assert ours.loc["unedited", "sink_mass"] == pytest.approx(plain, abs=1e-6)
    assert abs(ours.loc["set to zero", "sink_mass"] - plain) > 1e-6
    report.save(tmp_path)
    assert (tmp_path / "study.txt").read_text().strip() == report.said


def test_no_massive_activation_is_a_finding(tiny):
    report = ss.studies.massive_activations(tiny("llama"), [IDS])
    assert "has no massive activation: the largest is" in report.said
    assert report.table[report.table["evidence"] == "measured"]["regime"].tolist() == ["unedited"]


def test_published_massive_activations():
    rows = published("massive-activations")
    assert set(rows["evidence"]) == {"code"}
    assert rows["source"].str.contains("arXiv 2503.22329").all()
    assert rows.groupby("model")["regime"].apply(list).str[:2].tolist() == [["unedited", "set to zero"]] * 7


@pytest.mark.model
def test_smollm2_hangs_on_its_massive_activation(smollm2):
    report = ss.studies.massive_activations(smollm2, {"a novel": novel(512)}, max_tokens=512)
    ours = report.table[report.table["evidence"] == "measured"].set_index("regime")
    assert ours.loc["set to zero", "low"] > 5
    assert (
        ours.loc["set to zero", "sink_rate@0.3"] < ours.loc["unedited", "sink_rate@0.3"] - 0.1
    )  # layers up to 11 keep theirs
    assert abs(ours.loc["set to mean", "delta_loss"]) < 0.1
    assert abs(ours.loc["placebo: other dimensions zeroed", "delta_loss"]) < 0.1
    assert "dimension 507 of token 0" in report.said
