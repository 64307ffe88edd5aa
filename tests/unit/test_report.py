"""The report: its tables, what it says in words, its files, and reports side by side."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import sinkscope as ss
from sinkscope.attention import attention_map
from sinkscope.metrics import BUILT_IN
from sinkscope.metrics.observer import keys_of
from sinkscope.reports import files, words
from sinkscope.reports.compare import lengths_differ, side_by_side
from sinkscope.testing import tiny_hf_model
from tests import oracles
from tests.conftest import TEXTS, attempt, play, table, total
from tests.synthetic import HOSTILE

COLUMNS = ["model", "text", "metric", "layer", "head", "key", "value", "std_error", "null", "tokens"]
SUMMARY = ["text", "metric", "value", "std_error", "null"]


@pytest.fixture(scope="module")
def report(llama):
    return ss.measure(llama, TEXTS)


@pytest.fixture(scope="module")
def saved(report, llama, tmp_path_factory):
    from dataclasses import replace

    shown = replace(report, attention=attention_map(llama, TEXTS["b"]))
    return shown, shown.save(tmp_path_factory.mktemp("reports") / "new" / "report")


# --- tables ------------------------------------------------------------------------------------------------------------


def test_the_columns_are_the_contracts(report):
    assert list(report.frame.columns) == COLUMNS
    assert list(report.summary().columns) == SUMMARY
    assert {str(report.frame[c].dtype) for c in ("layer", "head", "key", "tokens")} == {"Int64"}
    assert set(report.frame["model"]) == {"tiny-llama"}


def test_there_is_one_row_per_place(report):
    assert not report.frame.duplicated(["text", "metric", "layer", "head", "key"]).any()
    assert not report.summary().duplicated(["text", "metric"]).any()
    assert report.frame["value"].notna().all()


@pytest.mark.parametrize(
    ("metric", "has"),
    [
        ("sink_mass", {"layer", "head", "key"}),
        ("row_entropy", {"layer", "head"}),
        ("layer_progression", {"layer", "key"}),
        ("sink_strength", {"key"}),
        ("position_profile", {"layer", "key"}),
    ],
)
def test_columns_that_do_not_apply_are_empty(report, metric, has):
    rows = report.frame[report.frame["metric"] == metric]
    for column in ("layer", "head", "key"):
        assert rows[column].notna().all() if column in has else rows[column].isna().all()


def test_each_texts_rows_hold_its_length_and_all_holds_the_sum(report):
    lengths = {label: len(text) + 1 for label, text in TEXTS.items()}
    for label, n in (lengths | {"all": sum(lengths.values())}).items():
        assert set(report.frame.loc[report.frame["text"] == label, "tokens"]) == {n}
    assert [t["n_tokens"] for t in report.about["texts"]] == list(lengths.values())


@pytest.mark.parametrize("metric", ["sink_mass", "sink_rate@0.3", "row_entropy", "layer_progression", "sink_strength"])
def test_all_is_the_mean_over_texts_with_its_standard_error(report, metric):
    each = np.array([table(report, metric, label) for label in TEXTS])
    np.testing.assert_allclose(table(report, metric, "all"), each.mean(0), atol=1e-12)
    expected = np.apply_along_axis(oracles.standard_error, 0, each)
    np.testing.assert_allclose(table(report, metric, "all", "std_error"), expected, atol=1e-12)
    nulls = np.array([table(report, metric, label, "null") for label in TEXTS])
    np.testing.assert_allclose(table(report, metric, "all", "null"), nulls.mean(0), atol=1e-12)
    assert np.isnan(table(report, metric, "a", "std_error")).all()


def test_positions_average_over_the_texts_that_reach_them(report):
    each = {label: table(report, "position_profile", label) for label in TEXTS}
    overall, error = table(report, "position_profile", "all"), table(report, "position_profile", "all", "std_error")
    for k in range(max(p.shape[1] for p in each.values())):
        there = [p[:, k] for p in each.values() if p.shape[1] > k]
        np.testing.assert_allclose(overall[:, k], np.mean(there, 0), atol=1e-12)
        np.testing.assert_allclose(error[:, k], [oracles.standard_error(x) for x in zip(*there, strict=True)], atol=1e-12)


@pytest.mark.parametrize("metric", ["sink_mass", "sink_rate@0.8", "first_to_rest_ratio", "sink_positions"])
def test_the_summary_is_per_text_first_then_across(report, metric):
    each = [total(report, metric, label) for label in TEXTS]
    assert total(report, metric, "all") == pytest.approx(np.mean(each), abs=1e-12)
    assert total(report, metric, "all", "std_error") == pytest.approx(oracles.standard_error(each), abs=1e-12)
    nulls = [total(report, metric, label, "null") for label in TEXTS]
    assert total(report, metric, "all", "null") == pytest.approx(np.mean(nulls), abs=1e-12)
    if metric == "sink_mass":
        assert each == pytest.approx([table(report, metric, label).mean() for label in TEXTS])


def test_one_text_has_no_standard_error(llama):
    one = ss.measure(llama, "so it goes")
    assert one.frame["std_error"].isna().all()
    assert one.summary()["std_error"].isna().all()
    assert one.intervals()["low"].isna().all()


def test_consistency_is_about_the_texts(report):
    expected = oracles.consistency(total(report, "sink_mass", label) for label in TEXTS)
    got = {part: total(report, f"consistency@{part}", "all") for part in expected}
    assert got == pytest.approx(expected)


def test_intervals_are_students_on_a_scale_that_holds_what_is_possible(report):
    """By the delta method: of a share on the logit scale, of a ratio on the log scale; entropies end at log T."""
    rows = report.intervals().set_index("metric")
    t = stats.t.ppf(0.975, len(TEXTS) - 1)
    m, error, low, high = rows.loc["sink_mass", ["value", "std_error", "low", "high"]]
    assert [math.log(x / (1 - x)) for x in (low, high)] == pytest.approx(
        [math.log(m / (1 - m)) + way * t * error / (m * (1 - m)) for way in (-1, 1)]
    )
    m, error, low, high = rows.loc["first_to_rest_ratio", ["value", "std_error", "low", "high"]]
    assert [math.log(x) for x in (low, high)] == pytest.approx([math.log(m) + way * t * error / m for way in (-1, 1)])
    ends = rows[["low", "high"]].dropna()
    tokens = np.mean([len(text) + 1 for text in TEXTS.values()])
    for metric, (least, most) in {"effective_keys": (1, tokens), "row_entropy": (0, math.log(tokens))}.items():
        assert least < ends.loc[metric, "low"] < rows.loc[metric, "value"] < ends.loc[metric, "high"] < most
    assert ends["low"].min() >= -1
    assert rows.loc["sink_mass", "interval"] == f"t, logit, {len(TEXTS)} texts"
    assert rows.loc["first_to_rest_ratio", "interval"] == f"t, log, {len(TEXTS)} texts"


def test_a_missing_interval_says_why(llama, report):
    one = ss.measure(llama, "so it goes", ["sink_mass", "consistency"]).intervals().set_index("metric")
    assert set(one["interval"]) == {"none: one text"}
    rows = report.intervals().set_index("metric")
    assert rows.loc["consistency@cv", "interval"] == "none: about the texts together"
    totals = report.totals.copy()
    some = (totals["metric"] == "sink_mass") & totals["text"].isin(list(TEXTS)[1:])
    totals.loc[some, "value"] = np.nan
    totals.loc[(totals["metric"] == "sink_mass") & (totals["text"] == "all"), "std_error"] = np.nan
    row = ss.SinkReport(report.frame, totals, report.about).intervals().set_index("metric").loc["sink_mass"]
    assert row["interval"] == "none: one of 3 texts"


def test_a_report_without_a_number_has_a_page(llama, tmp_path):
    @ss.metric(needs="mass")
    def nothing(block):
        return block.mass * np.nan

    report = ss.measure(llama, TEXTS, nothing)
    for same in (report, ss.load_report(report.save(tmp_path))):
        assert same.intervals()["value"].isna().all()
        assert "nothing" in same.page()


def test_a_metric_of_ones_own_keeps_to_its_unit(llama):
    @ss.metric(needs="mass", unit="share of attention")
    def mine(block):
        return block.mass

    @ss.metric(needs="mass")
    def plain(block):
        return block.mass

    rows = ss.measure(llama, TEXTS, [mine, plain]).intervals().set_index("metric")
    assert [said.split(", ")[1] for said in rows["interval"]] == ["logit", "plain"]


def test_rates_are_named_with_their_threshold(report):
    assert {"sink_rate@0.3", "sink_rate@0.8"} <= set(report.summary()["metric"]) & set(report.frame["metric"])
    assert "sink_rate" not in set(report.summary()["metric"])


def test_summary_of_one_text_and_of_none(report):
    assert set(report.summary("b")["text"]) == {"b"}
    with pytest.raises(ss.SinkscopeError, match=r"unknown text in this report 'd'.*Available: a, all, b, c"):
        report.summary("d")


def test_about_says_what_ran(report):
    about = report.about
    assert {"model", "engine", "engine_why", "dtype", "device", "bos", "torch", "transformers"} <= about.keys()
    assert about["arguments"]["key"] == [0]
    assert about["arguments"]["max_tokens"] is None
    assert about["texts"][1]["tokens"] == ["<bos>", *"so it goes"]


# --- looking at it -------------------------------------------------------------------------------------------------------


def test_top_gives_the_strongest_heads(report):
    top = report.top("sink_mass", 3, text="b")
    mass = table(report, "sink_mass", "b")
    assert top["value"].tolist() == sorted(mass.ravel(), reverse=True)[:3]
    assert all(mass[r.layer, r.head] == r.value for r in top.itertuples())
    assert len(report.top(n=5)) == 5
    with pytest.raises(ss.SinkscopeError, match="unknown metric in this report 'sinkmass'; did you mean 'sink_mass'"):
        report.top("sinkmass")


def test_compare_puts_two_reports_side_by_side(report, tiny):
    other = ss.measure(tiny("gpt2"), TEXTS, ["sink_mass", "row_entropy"])
    both = report.compare(other).set_index("metric")
    assert set(both.index) == {"sink_mass", "row_entropy"}
    for metric, row in both.iterrows():
        assert row["value"] == total(report, metric, "all")
        assert row["value_other"] == total(other, metric, "all")
        assert row["difference"] == pytest.approx(row["value_other"] - row["value"])


def test_the_same_texts_are_compared_pair_by_pair(report, tiny):
    """A paired t interval of the differences, text by text; of shares on the logit scale of -1 to 1."""
    other = ss.measure(tiny("gpt2"), TEXTS, ["sink_mass", "first_to_rest_ratio"])
    both = report.compare(other).set_index("metric")
    for metric, row in both.iterrows():
        change = [total(other, metric, label) - total(report, metric, label) for label in TEXTS]
        m, error, t = np.mean(change), stats.sem(change), stats.t.ppf(0.975, 2)
        ends = [row["low"], row["high"]]
        if metric == "first_to_rest_ratio":
            assert ends == pytest.approx([m - t * error, m + t * error])
        else:
            assert np.arctanh(ends) == pytest.approx([np.arctanh(m) + way * t * error / (1 - m**2) for way in (-1, 1)])
        assert row["interval"].startswith("paired, ")
        assert row["note"] == ""


def test_other_texts_are_compared_as_two_samples_and_it_is_said(llama, report):
    shorter = {label: text[:5] for label, text in TEXTS.items()}
    for texts, word in ((shorter, "other texts of the same labels"), (["so it goes", "and on"], "other texts")):
        other = ss.measure(llama, texts, ["first_to_rest_ratio"])
        row = report.compare(other).iloc[0]
        values = [
            r.totals[(r.totals["metric"] == "first_to_rest_ratio") & (r.totals["text"] != "all")]["value"].tolist()
            for r in (other, report)
        ]
        welch = stats.ttest_ind(*values, equal_var=False).confidence_interval(0.95)
        assert (row["low"], row["high"]) == pytest.approx((welch.low, welch.high))
        assert "not paired (Welch)" in row["interval"]
        assert row["note"].startswith(f"{word}; chance differs: ")
        assert "lengths differ (here: " in lengths_differ({"here": report, "there": other})
    assert lengths_differ({"here": report, "there": report}) == ""


def test_texts_of_unequal_length_are_said_to_be(llama, report):
    assert "note: the texts have " in str(report)
    assert report.about["notes"][0].startswith(f"the texts have {min(map(len, TEXTS.values())) + 1} to ")
    assert ss.measure(llama, {"a": "so it goes", "b": "so it runs"}, ["sink_mass"]).about["notes"] == []


def test_metrics_without_a_number_say_so(llama):
    @ss.metric
    def nowhere(block):
        return block.mass * float("nan")

    @ss.metric(needs="mass")
    def partly(block):
        return block.mass * torch.tensor([1.0, 1.0, 1.0, float("nan")])[:, None]

    @ss.metric
    def by_key(block):
        return block.pattern

    report = ss.measure(llama, "so it goes", [nowhere, partly, by_key, "sink_mass"])
    assert report.about["notes"] == [
        "nowhere is NaN for every head: it has no number",
        "partly is NaN for 3 of 12 heads, in some text or all: its means leave them out",
        "by_key gives a number for every key: it is in .frame and top(), and has no row in the summary",
    ]
    assert "note: nowhere is NaN for every head" in str(report)


def test_the_repr_is_what_is_printed(report):
    assert repr(report) == str(report)
    assert len(repr(report).splitlines()) <= 3


def test_a_notebook_shows_the_page_in_a_frame(report):
    import html

    shown = report.show(height=300)
    assert len(repr(shown)) < 100
    inner = shown._repr_html_()
    assert html.escape(report.page()) in inner
    assert "height: 300px" in inner


def test_what_says_the_same_is_folded(report):
    names = [name for name, _ in words.folded(report.intervals())]
    assert "sink_mass = visible_sink_mass = received = sink_strength" in names
    assert sum(name.count("=") + 1 for name in names) == len(report.intervals())


def test_side_by_side_keeps_what_only_one_has(report, tiny):
    other = ss.measure(tiny("gpt2"), TEXTS, ["sink_mass"])
    both = side_by_side({"x": other, "y": report})
    assert list(both.columns)[:5] == ["x", "x null", "y", "y null", "y - x"]
    assert both.loc["sink_mass", "y"] == total(report, "sink_mass", "all")
    assert math.isnan(both.loc["row_entropy", "x"])
    with pytest.raises(ss.SinkscopeError, match="at least two reports, got 1"):
        side_by_side({"x": other})


def test_sink_positions_come_with_their_tokens():
    first, last = np.zeros((2, 2, 3, 6, 6))
    first[..., 0], first[..., 2] = 0.5, 0.4
    last[0, 0, 5, 5] = 0.9  # one head of six
    found = play([first, last], ["sink_positions"]).sink_positions()
    assert list(found.columns) == ["text", "key", "token", "share_of_heads"]
    assert found["key"].tolist() == [0, 2, 5]
    assert found["token"].tolist() == ["0", "1", "1"]
    assert found["share_of_heads"].tolist() == pytest.approx([1, 1, 1 / 6])
    assert len(play([first, last], ["sink_positions"]).sink_positions(text="text 1")) == 1


def test_sink_positions_must_have_been_measured(tiny):
    with pytest.raises(ss.SinkscopeError, match="'sink_positions'"):
        ss.measure(tiny("gpt2"), "so it goes", ["sink_mass"]).sink_positions()


def test_several_keys_are_told_apart(llama):
    report = ss.measure(llama, TEXTS, ["sink_mass", "row_entropy", "sink_strength", "consistency"], key=[0, -1])
    names = set(report.summary()["metric"])
    tagged = {f"{m}[key={k}]" for m in ("sink_mass", "sink_strength", "consistency@cv") for k in (0, -1)}
    assert tagged | {"row_entropy"} <= names
    for key in (0, -1):
        alone = ss.measure(llama, TEXTS, ["sink_mass", "consistency"], key=key)
        for name in ("sink_mass", "consistency@cv"):
            assert total(report, f"{name}[key={key}]", "all") == pytest.approx(total(alone, name, "all"))
    rows = report.frame[(report.frame["metric"] == "sink_mass") & (report.frame["text"] == "b")]
    assert sorted(rows["key"].unique()) == [0, len(TEXTS["b"])]
    assert len(report.frame[(report.frame["metric"] == "row_entropy") & (report.frame["text"] == "b")]) == 12


def test_several_keys_whose_places_differ_are_told_apart_over_all_texts(llama):
    report = ss.measure(llama, TEXTS, ["sink_mass"], key=["t", -1, 0])
    rows = report.frame[report.frame["text"] == "all"]
    assert set(rows["metric"]) == {"sink_mass", "sink_mass[key=t]", "sink_mass[key=-1]"}
    alone = ss.measure(llama, TEXTS, ["sink_mass"], key=-1)
    mine = table(report, "sink_mass[key=-1]", "all")
    np.testing.assert_allclose(mine, table(alone, "sink_mass", "all"))
    assert report.heatmap("sink_mass[key=-1]").get_title() == "tiny-llama\nsink_mass[key=-1], mean of texts"
    there = report.to_xarray()
    np.testing.assert_allclose(there["sink_mass[key=-1]"].sel(text="all"), mine)
    assert "sink_mass[key=t]" in report.page()
    report = ss.measure(llama, TEXTS, ["sink_mass"], key=["t", -1])  # neither has one place
    assert set(report.figures()) == {"heatmap", "progression", "distribution"}
    with pytest.raises(ss.SinkscopeError, match=r"unknown metric 'sink_mass'; did you mean 'sink_mass\[key=t\]'"):
        report.heatmap()


def test_several_keys_of_any_type(llama):
    one, other = (ss.measure(llama, "so it goes", ["sink_mass"], key=keys) for keys in ([0, 3], np.array([0, 3])))
    pd.testing.assert_frame_equal(one.frame, other.frame)
    three = np.int64(3)
    report = ss.measure(llama, "so it goes", ["sink_mass"], key=three, max_tokens=three + 1)
    assert json.dumps(report.about)
    assert set(report.frame["key"]) == {3}
    for bad in (True, 1.0, None, [0, None], []):
        with pytest.raises(ss.SinkscopeError, match="key="):
            keys_of(bad)


def test_an_interval_counts_the_texts_that_have_the_number():
    """A text of one layer's NaN: of three texts two have the number, and Student's t has one degree of freedom."""
    report = play([np.full((1, 1, 3, 3), 1 / 3) for _ in range(3)], ["sink_mass"])
    totals = report.totals.copy()
    totals.loc[totals["text"] == "text 0", "value"] = np.nan
    totals.loc[totals["text"] == "all", "std_error"] = 0.01
    row = ss.SinkReport(report.frame, totals, report.about).intervals().iloc[0]
    m = row["value"]
    wide = math.log(row["high"] / (1 - row["high"])) - math.log(m / (1 - m))
    assert wide == pytest.approx(12.706 * 0.01 / (m * (1 - m)), abs=1e-3)


def test_it_compares_with_its_like(llama):
    with pytest.raises(ss.SinkscopeError, match="not with a EffectReport"):
        ss.measure(llama, "so it goes", ["sink_mass"]).compare(ss.evaluate(llama, "so it goes", "window(size=4)"))


def test_sink_positions_at_another_threshold(llama):
    report = ss.measure(llama, TEXTS, [BUILT_IN["sink_positions"].at(0.01)])
    assert len(report.sink_positions()) > 0
    with pytest.raises(ss.SinkscopeError, match="sink positions are a text's"):
        report.sink_positions(text="all")


def test_a_directory_holds_one_kind_of_report(llama, tmp_path):
    first = ss.measure(llama, TEXTS, ["sink_mass"])
    second = ss.evaluate(llama, "so it goes", "window(size=4)")
    alone = {}
    for report in (first, second):
        report.save(tmp_path / "alone")
        alone[type(report)] = {p.name for p in (tmp_path / "alone").iterdir()}
        shutil.rmtree(tmp_path / "alone")
    for report in (first, second, first):
        report.save(tmp_path / "one")
        assert {p.name for p in (tmp_path / "one").iterdir()} == alone[type(report)]


def test_a_key_at_another_place_in_each_text_has_no_position_in_all(tiny):
    report = ss.measure(tiny("bert"), TEXTS, ["sink_mass"], key="[SEP]")
    keys = report.frame.groupby("text")["key"].unique()
    assert {label: keys[label].tolist() for label in TEXTS} == {k: [len(t) + 1] for k, t in TEXTS.items()}
    assert report.frame.loc[report.frame["text"] == "all", "key"].isna().all()


@pytest.mark.parametrize("twice", [[0, 0], ["<bos>", "<bos>"]])
def test_a_key_given_twice_counts_once(llama, twice):
    once, doubled = (ss.measure(llama, TEXTS, ["sink_mass"], key=key) for key in (twice[:1], twice))
    pd.testing.assert_frame_equal(doubled.frame, once.frame)


def test_it_shows_itself_in_a_notebook_with_everything_escaped(llama):
    shown = ss.measure(llama, {"<b>x</b>": "so it goes"}, ["sink_mass"])._repr_html_()
    assert "sink_mass" in shown
    assert "<table" in shown
    assert "<b>x</b>" not in shown
    assert "attachShadow" in shown  # the page's fragment, which the page around it can't break


def test_the_attention_map_is_the_mean_over_layers_and_heads(llama):
    import torch

    ids = torch.tensor([llama.tokenizer("so it goes").input_ids])
    with torch.no_grad():
        pattern = torch.stack(tiny_hf_model("llama")(ids, output_attentions=True).attentions)[:, 0].numpy()
    for how, expected in [
        ({}, pattern.mean((0, 1))),
        ({"layer": 1}, pattern[1].mean(0)),
        ({"layer": 2, "head": 3}, pattern[2, 3]),
    ]:
        got = attention_map(llama, "so it goes", **how).pivot(index="query", columns="key", values="value")
        np.testing.assert_allclose(got, expected, atol=1e-6)
    title = ss.plots.attention(attention_map(llama, "so it goes", layer=2, head=3)).get_title()
    assert title == "tiny-llama\nattention, layer 2, head 3"
    for bad in ({"layer": 3}, {"head": 4}, {"head": -1}):
        with pytest.raises(ss.SinkscopeError, match="are 0 to"):
            attention_map(llama, "so it goes", **bad)


# --- words ---------------------------------------------------------------------------------------------------------------


def test_every_key_number_has_a_sentence_with_its_value(report):
    said = words.sentences(report.summary("all"), [0])
    assert list(said) == [name for name in words.KEY_NUMBERS if name != "sink_strength"]  # here it is the sink mass again
    assert f"{100 * total(report, 'sink_mass', 'all'):.0f}% of its attention to the first token" in said["sink_mass"]
    assert all(sentence.endswith(".") for sentence in said.values())


@pytest.mark.parametrize(("key", "name"), [(-1, "the last token"), (3, "position 3"), ("[SEP]", "[SEP]")])
def test_the_words_name_the_key(tiny, key, name):
    report = ss.measure(tiny("bert"), TEXTS, key=key)
    said = words.sentences(report.summary("all"), report.about["arguments"]["key"])
    assert name in said["sink_mass"]
    assert "first token" not in " ".join(said.values())


def test_with_several_keys_the_words_speak_of_the_first(llama):
    report = ss.measure(llama, TEXTS, key=[-1, 0])
    said = words.sentences(report.summary("all"), [-1, 0])
    assert f"{100 * total(report, 'sink_mass[key=-1]', 'all'):.1f}% of its attention to the last token" in said["sink_mass"]
    assert "consistency@cv" in said


def test_a_number_that_is_not_there_is_not_talked_about(llama):
    said = words.sentences(ss.measure(llama, "so it goes").summary("all"), [0])
    assert "consistency@cv" not in said
    assert "sink_mass" in said
    assert not any("nan" in sentence for sentence in said.values())


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (-0.25, "-0.250"),
        (18.255, "18.3"),
        (999.4, "999"),
        (999.9, "1,000"),
        (12345.6, "12,346"),
        (0.0, "0.000"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize("texts", [[list(range(5, 11)), list(range(5, 14))], [list(range(5, 11))]], ids=len)
def test_two_keys_at_one_position_are_one(llama, texts):
    report = ss.measure(llama, texts, ["sink_mass", "sink_rate"], key=[5, -1])
    assert not report.frame.duplicated(["text", "metric", "layer", "head", "key"]).any()
    assert set(report.frame.query("text == 'text 0'")["key"].dropna()) == {5}
    assert {"sink_mass[key=5]", "sink_mass[key=-1]"} <= set(report.summary()["metric"])
    pytest.importorskip("xarray")
    assert np.isfinite(report.to_xarray()["sink_mass"].sel(text="text 0").max())


# --- files ---------------------------------------------------------------------------------------------------------------


def test_the_directory_holds_what_the_contract_says(saved):
    report, directory = saved
    names = {p.name for p in directory.iterdir()}
    assert {"measurements.csv", "measurements.parquet", "summary.csv", "summary.parquet"} <= names
    assert {"summary.json", "report.html", "attention.csv", "attention.parquet"} <= names
    assert {f"{stem}.png" for stem in report.figures()} <= names
    assert not [name for name in names if name.startswith(".")]


def test_a_report_survives_the_round_trip(saved):
    report, directory = saved
    back = ss.load_report(directory)
    pd.testing.assert_frame_equal(back.frame, report.frame)
    pd.testing.assert_frame_equal(back.summary(), report.summary())
    pd.testing.assert_frame_equal(back.attention, report.attention)
    assert back.about == report.about
    assert back.attention.attrs == report.attention.attrs == {"model": "tiny-llama", "layer": None, "head": None}
    assert back.texts == list(TEXTS)


def test_the_csv_is_the_frame(saved):
    report, directory = saved
    lines = (directory / "measurements.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert lines[1].startswith("tiny-llama,a,sink_mass,0,0,0,0.")  # whole numbers, not 0.0
    read = pd.read_csv(directory / "measurements.csv").astype(dict.fromkeys(("layer", "head", "key", "tokens"), "Int64"))
    pd.testing.assert_frame_equal(read, report.frame, check_dtype=False)
    assert (directory / "summary.csv").read_text(encoding="utf-8").splitlines()[0] == ",".join(SUMMARY)


def test_json_is_strict(saved):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    about = json.loads((saved[1] / "summary.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert about["model"] == "tiny-llama"


@pytest.mark.parametrize("at", ["page", "figures"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_report_that_can_not_be_drawn_leaves_the_old_one_whole(report, tmp_path, monkeypatch, at, error):
    report.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(ss.SinkReport, at, lambda self: (_ for _ in ()).throw(error("disk")))
    with pytest.raises((error, ss.SinkscopeError)):
        report.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_table_that_can_not_be_written_leaves_no_half_file(report, tmp_path, monkeypatch):
    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", fail)
    with pytest.raises(ss.SinkscopeError, match=r"can't write .*measurements.parquet': No space left on device"):
        report.save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_saving_replaces_an_earlier_report_altogether(saved, llama, tmp_path):
    saved[0].save(tmp_path)
    smaller = ss.measure(llama, "so it goes", ["row_entropy"])
    smaller.save(tmp_path)
    back = ss.load_report(tmp_path)
    assert back.attention is None
    assert back.metrics == ["row_entropy"]
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    assert pictures == set(smaller.figures())


@pytest.mark.parametrize("name", ["summary.json", "measurements.parquet", "summary.parquet"])
def test_a_damaged_report_is_refused(report, tmp_path, name):
    report.save(tmp_path)
    (tmp_path / name).write_bytes(b"PAR1 {")
    with pytest.raises(ss.SinkscopeError, match="can't be read"):
        ss.load_report(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ss.SinkscopeError, match=r"can't be read|no finished report"):
        ss.load_report(tmp_path)


def test_hostile_labels_and_tokens_survive_and_are_escaped(llama, tmp_path):
    labels = [h for h in HOSTILE if h.isprintable() or h == "\n"] + ['a,"b"\n;c', "\x1b[31mred"]
    report = ss.measure(llama, dict.fromkeys(labels, "so it goes"))
    report.save(tmp_path)
    back = ss.load_report(tmp_path)
    assert back.texts == labels
    pd.testing.assert_frame_equal(back.frame, report.frame)
    read = pd.read_csv(tmp_path / "measurements.csv", lineterminator=None)
    shown = report.frame["text"].str.replace("\n", "\\n").str.replace("\x1b", "\\x1b")
    assert read["text"].tolist() == shown.tolist()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in page
    assert "<script>alert" not in page
    assert "\x1b" not in page


def test_a_label_that_utf8_can_not_write_is_saved_or_refused_in_our_words(llama, tmp_path):
    """File names that are not UTF-8 reach Python with lone surrogates in them."""
    got = attempt(lambda: ss.measure(llama, {"caf\udce9.txt": "so it goes"}, ["sink_mass"]).save(tmp_path))
    assert (tmp_path / "summary.json").exists() != isinstance(got, ss.SinkscopeError)
    assert not list(tmp_path.glob(".*"))


def test_check_writable(tmp_path):
    assert files.check_writable(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ss.SinkscopeError, match="can't write to the directory"):
            files.check_writable(bad)
