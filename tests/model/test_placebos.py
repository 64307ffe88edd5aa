"""Placebos beside edits, and tests of one against the other: by hand, by scipy's own, and where there is nothing to find."""

import itertools
import json

import numpy as np
import pytest
import torch
from scipy import stats

import sinkscope as ss
from sinkscope.interventions import EditActivation, ZeroHead
from sinkscope.reports.placebos import paired_p

TEXTS = {
    f"text {i}": torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(i)).index_fill(0, torch.tensor([0]), 1)
    for i in range(6)
}
EDITS = [ss.MaskKeys(0), ss.Window(6), ZeroHead(heads=[1], layers=[1])]


@pytest.fixture(scope="module")
def report(tiny):
    return ss.evaluate(tiny("llama"), TEXTS, EDITS, placebo=3)


def deltas(report, name):
    rows = report.frame[(report.frame["intervention"] == str(name)) & (report.frame["text"] != "all")]
    return rows["delta_loss"].to_numpy()


def placebos_of(report, edit):
    """Of the first seeds that draw something else; in text form."""
    names = list(dict.fromkeys(str(edit.placebo(seed)) for seed in range(12)))[:3]
    assert names == [placebo for placebo, of in report.about["placebos"].items() if of == str(edit)]
    return names


def test_placebos_are_run_beside_and_averaged(report, tiny):
    """Those of the first three seeds that differ; a window has none, which is said; curves are of the edits asked for."""
    assert report.interventions == ["none", *map(str, EDITS)]
    assert set(report.curves["intervention"]) == set(report.interventions)
    assert report.about["notes"] == ["window(size=6) has no placebo"]
    rows = report.summary().set_index("intervention")
    for edit in (EDITS[0], EDITS[2]):
        placebos = placebos_of(report, edit)
        alone = ss.evaluate(tiny("llama"), TEXTS, placebos)
        each = [deltas(report, placebo) for placebo in placebos]
        for placebo, found in zip(placebos, each, strict=True):
            np.testing.assert_array_equal(found, deltas(alone, placebo))
        row = rows.loc[str(edit)]
        assert row["placebos"] == 3
        assert row["placebo_delta_loss"] == pytest.approx(np.mean(each))
        assert row["placebo_std"] == pytest.approx(np.std(np.mean(each, 1), ddof=1))
        assert row["placebo_p"] == report.test(edit).p_value
    assert rows.loc["window(size=6)", "placebos"] == 0
    assert rows.loc[["none", "window(size=6)"], ["placebo_delta_loss", "placebo_std", "placebo_p"]].isna().all(axis=None)
    one = report.summary("text 2").set_index("intervention").loc[str(EDITS[0])]
    third = [deltas(report, placebo)[2] for placebo in placebos_of(report, EDITS[0])]
    assert one["placebo_delta_loss"] == pytest.approx(np.mean(third))
    assert np.isnan(one["placebo_p"])


def test_a_test_goes_through_all_ways_to_swap(report):
    """By hand: 2^6 signs of six differences; and any two edits."""
    found = report.test(EDITS[0], "window(size=6)")
    difference = deltas(report, EDITS[0]) - deltas(report, EDITS[1])
    ways = [np.mean(difference * signs) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p_value == pytest.approx(np.mean(np.abs(ways) >= abs(difference.mean()) - 1e-12))
    assert found.difference == pytest.approx(difference.mean())
    assert (found.texts, found.exact) == (6, True)
    assert str(found).endswith(f"p = {found.p_value:.2g} (paired permutation test, 6 texts)")
    assert report.test("window(size=6)", EDITS[0]).p_value == found.p_value
    mean = np.mean([deltas(report, placebo) for placebo in placebos_of(report, EDITS[0])], 0)
    assert report.test(EDITS[0]).difference == pytest.approx(np.mean(deltas(report, EDITS[0]) - mean))


def test_many_texts_are_sampled():
    """Where nothing is, p is no smaller than chance makes it, and near Student's; where something is, it is found."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 40))
    assert paired_p(x, y) == pytest.approx(stats.ttest_rel(x, y).pvalue, abs=0.03)
    assert paired_p(x, y) == paired_p(x, y)
    assert paired_p(x + 2, y) <= 2 / 9999
    assert paired_p(x, x) == 1


def test_the_page_and_the_words_show_placebos(report, tmp_path):
    shown = json.loads(report.json())["edits"]
    row = report.summary().set_index("intervention").loc[str(EDITS[0])]
    assert [edit["name"] for edit in shown] == report.interventions
    assert shown[1]["placebos"] == {
        "n": 3,
        "delta": pytest.approx(row["placebo_delta_loss"]),
        "std": pytest.approx(row["placebo_std"]),
        "p": pytest.approx(row["placebo_p"]),
    }
    assert shown[2]["placebos"] is None
    cell = f"{row['placebo_delta_loss']:+.3f} ± {row['placebo_std']:.3f}"
    assert f"{cell}, p={row['placebo_p']:.2g}" in str(report)
    assert f"<td>{cell}</td><td>{row['placebo_p']:.2g}</td>" in report.page()
    assert "| placebo | p |" in report.markdown()
    assert f"± {row['placebo_std']:.3g}" in report.markdown()
    report.save(tmp_path)
    again = ss.load_report(tmp_path)
    assert again.summary().equals(report.summary())
    assert again.test(EDITS[0]) == report.test(EDITS[0])


def test_without_placebos_nothing_is_shown_of_them(tiny):
    report = ss.evaluate(tiny("llama"), [TEXTS["text 0"]], EDITS[0])
    assert "placebos" not in report.summary()
    assert '<th scope="col">placebo</th>' not in report.page()
    one = ss.evaluate(tiny("llama"), [TEXTS["text 0"]], EDITS[0], placebo=True)
    row = one.summary().set_index("intervention").loc[str(EDITS[0])]
    assert row["placebos"] == 1
    assert np.isnan(row[["placebo_std", "placebo_p"]].astype(float)).all()
    asked = ss.evaluate(tiny("llama"), [TEXTS["text 0"]], [EDITS[0], EDITS[0].placebo()], placebo=True)
    assert asked.interventions == ["none", str(EDITS[0]), str(EDITS[0].placebo())]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda report, model: report.test("mask_keys(keys=[1])"), "did you mean 'mask_keys"),
        (lambda report, model: report.test("window(size=6)"), "has no placebo in this report"),
        (lambda report, model: ss.evaluate(model, TEXTS, EDITS[0], placebo=-1), "how many placebos"),
        (
            lambda report, model: ss.evaluate(model, [[1, 4, 5]], EDITS[0], placebo=True),
            r"positions are 0 to 2. It is a placebo of mask_keys\(keys=\[0\]\)",
        ),
        (
            lambda report, model: ss.evaluate(model, [TEXTS["text 0"]], EDITS[:2]).test(*EDITS[:2]),
            "at least two texts in which both .* there is one",
        ),
    ],
)
def test_what_cannot_be_tested(report, tiny, call, says):
    with pytest.raises(ss.SinkscopeError, match=says):
        call(report, tiny("llama"))


def test_a_placebo_that_is_located_later(tiny):
    edit = EditActivation(0.0, positions=[0], dims=[9], layers=[1])
    report = ss.evaluate(tiny("llama"), TEXTS, edit, placebo=2)
    assert report.summary().set_index("intervention").loc[str(edit), "placebos"] == 2
