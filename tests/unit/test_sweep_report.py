"""A sweep's report, of runs made by arithmetic: table, pictures, files, page, and its costs beside a measurement."""

import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from scipy import stats

import sinkscope as ss
from sinkscope.reports import page
from sinkscope.reports.sweep import Row, SweepReport
from sinkscope.results import Run
from tests.synthetic import report, words

LABELS = ["a", "b", "c"]
HEADS = [(layer, head, None) for layer in range(4) for head in range(3)]


def cost(text, place, share=1.0):
    """A difference in nats that depends on all: most heads cost little, one helps, one costs much."""
    layer, head, position = (part or 0 for part in place)
    large = {(1, 2): 3.0, (2, 0): -0.2}.get((layer, head), 0.0) if position == 0 else 0.0
    return share * (large + 0.01 * (layer - head + position + 1) * (1 + LABELS.index(text)))


def run(text, name, delta):
    clean = np.linspace(2, 3, 40)
    rest = {"kl": abs(delta) / 2, "agreement": 0.5, "sink_mass": np.nan, "sink_position": -1, "sink_token": ""}
    return Run.of(text, name, np.arange(1, 41), clean + delta + 0.1 * np.sin(np.arange(40)), clean, **rest)


def swept(labels=LABELS, places=HEADS, over="heads", placebo=1):
    runs, rows = [], {label: [] for label in labels}
    for label in labels:
        for place in places:
            names = [f"edit{place}", *(f"placebo{place}{seed}" for seed in range(placebo))]
            runs += [run(label, name, cost(label, place, 0.1 * i if i else 1.0)) for i, name in enumerate(names)]
            rows[label].append(Row(place, names[0], tuple(names[1:])))
    about = {
        "model": "toy",
        "engine": "flash",
        "engine_why": "",
        "bos": "",
        "dtype": "float32",
        "device": "cpu",
        "sinkscope": "0",
    }
    about |= {"layers": [0, 1, 2, 3], "texts": [{"label": label, "n_tokens": 41} for label in labels]}
    about["arguments"] = {"edit": "zero_value(keys=[0])", "over": over, "placebo": placebo}
    return SweepReport.assemble(runs, rows, about)


def test_means_and_intervals_are_across_texts():
    found = swept()
    row = found.summary().set_index(["layer", "head"]).loc[(3, 1)]
    wobble = 0.1 * np.sin(np.arange(40)).mean()
    deltas = np.array([cost(text, (3, 1, None)) for text in LABELS]) + wobble
    assert row["delta_loss"] == pytest.approx(deltas.mean())
    error = deltas.std(ddof=1) / np.sqrt(3)
    assert row["std_error"] == pytest.approx(error)
    assert (row["low"], row["high"]) == pytest.approx(stats.t.interval(0.95, 2, deltas.mean(), error))
    other = np.array([cost(text, (3, 1, None), 0.1) for text in LABELS]) + wobble
    assert row["placebo_delta_loss"] == pytest.approx(other.mean())
    assert (row["placebo_low"], row["placebo_high"]) == pytest.approx(
        stats.t.interval(0.95, 2, other.mean(), other.std(ddof=1) / np.sqrt(3))
    )
    assert row["tokens"] == 120
    assert "across texts" in found.about["interval"]
    assert "position" not in found.summary()
    assert len(found.summary("b")) == 12
    with pytest.raises(ss.SinkscopeError, match="unknown text"):
        found.summary("d")


def test_one_text_has_intervals_over_its_blocks():
    found = swept(["b"])
    single = run("b", "x", cost("b", (0, 0, None)))
    row = found.summary().iloc[0]
    assert row["std_error"] == single.error
    assert "blocks of the one text" in found.about["interval"]
    pd.testing.assert_frame_equal(found.summary("b"), found.summary())


def test_top_and_what_is_printed():
    found = swept()
    top = found.top(3)
    assert top[["layer", "head"]].iloc[0].tolist() == [1, 2]
    assert top["delta_loss"].is_monotonic_decreasing
    shown = str(found)
    assert "SweepReport: toy, zero_value(keys=[0]) at 12 heads, 3 texts of 41 tokens" in shown
    assert "2 more: sweep.summary() has all" in shown
    assert "placebo" in shown
    assert "placebo" not in str(swept(placebo=0))


def test_notes_say_what_chance_would_do():
    many = swept(places=[(layer, head, None) for layer in range(10) for head in range(3)])
    rows = many.summary()
    apart = int(((rows["low"] > 0) | (rows["high"] < 0)).sum())
    other = int(((rows["placebo_low"] > 0) | (rows["placebo_high"] < 0)).sum())
    said = f"{apart} of 30 intervals exclude zero; about 2 would if nothing had changed. Of the placebo's 30, {other} do"
    assert said in many.about["notes"]
    idle = swept(places=[(0, 0, None), (0, 1, None)])
    assert idle.about["notes"] == ["the edit changed nothing at 1 of 2 heads"]  # (0, 1) costs nothing


def test_the_map_is_centred_on_zero():
    found, ax = swept(), Figure().add_subplot()
    assert found.heatmap(ax=ax) is ax
    (image,) = ax.images
    expected = found.summary().pivot(index="layer", columns="head", values="delta_loss")
    np.testing.assert_allclose(image.get_array(), expected)
    assert image.norm.vmin == -image.norm.vmax == -expected.abs().to_numpy().max()
    assert isinstance(image.norm, SymLogNorm)  # of twelve heads one costs ten times what most do
    assert image.cmap(image.norm(0.0))[:3] == pytest.approx(image.cmap(0.5)[:3], abs=0.02)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")
    other = Figure().add_subplot()
    found.heatmap(placebo=True, ax=other)
    assert (other.images[0].norm.vmin, other.images[0].norm.vmax) == (image.norm.vmin, image.norm.vmax)
    by_text = Figure().add_subplot()
    found.heatmap("kl", text="b", ax=by_text)
    assert by_text.images[0].get_array()[1, 2] == pytest.approx(abs(cost("b", (1, 2, None))) / 2)
    with pytest.raises(ss.SinkscopeError, match="unknown value"):
        found.heatmap("loss")
    with pytest.raises(ss.SinkscopeError, match="no placebo was run"):
        swept(placebo=0).heatmap(placebo=True)


@pytest.mark.parametrize(("over", "axis"), [("layers", "layer"), ("positions", "position")])
def test_without_heads_it_is_a_curve_with_its_interval(over, axis):
    places = [(i, None, None) if over == "layers" else (None, None, i) for i in range(5)]
    found, ax = swept(places=places, over=over), Figure().add_subplot()
    found.heatmap(ax=ax)
    rows = found.summary()
    curve = next(line for line in ax.lines if line.get_label() == "the edit")
    np.testing.assert_allclose(curve.get_xydata(), rows[[axis, "delta_loss"]].astype(float))
    dashed = next(line for line in ax.lines if line.get_label() == "its placebo")
    np.testing.assert_allclose(dashed.get_ydata(), rows["placebo_delta_loss"])
    assert len(ax.collections) == 1
    assert (ax.get_xlabel(), ax.get_ylabel()) == (axis, "difference in loss (nats per token)")


@pytest.mark.parametrize("places", [HEADS, [(i, None, None) for i in range(3)], [(None, None, i) for i in range(3)]])
def test_files_survive_a_round_trip(places, tmp_path):
    over = "heads" if places is HEADS else "layers" if places[0][0] is not None else "positions"
    found = swept(places=places, over=over)
    found.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"sweep.csv", "sweep.parquet", "summary.json", "costs.png", "report.html"}
    again = ss.load_report(tmp_path)
    assert isinstance(again, SweepReport)
    pd.testing.assert_frame_equal(again.frame, found.frame)
    assert (again.about, again.json(), str(again)) == (found.about, found.json(), str(found))
    table = pd.read_csv(tmp_path / "sweep.csv")
    np.testing.assert_allclose(table["delta_loss"], found.frame["delta_loss"])
    (tmp_path / "sweep.parquet").write_bytes(b"x")
    with pytest.raises(ss.SinkscopeError, match=r"sweep\.parquet is damaged"):
        ss.load_report(tmp_path)


def test_the_page_has_every_number_of_the_map():
    found = swept()
    data = json.loads(found.json())
    assert (data["kind"], data["over"], data["rows"], data["columns"]) == ("sweep", "heads", [0, 1, 2, 3], [0, 1, 2])
    for name, column in (("delta", "delta_loss"), ("placebo_high", "placebo_high")):
        expected = found.summary("b").pivot(index="layer", columns="head", values=column)
        np.testing.assert_allclose(data["cells"]["b"][name], expected, rtol=5e-3, atol=1e-12)
    assert data["scales"]["delta"]["most"] == pytest.approx(found.summary()["delta_loss"].abs().max(), rel=5e-3)
    assert (data["top"][0]["row"], data["top"][0]["column"]) == (1, 2)
    assert "costs most at layer 1, head 2" in data["sentences"][0]
    assert "| layer | head |" in found.markdown()
    assert "costs most at layer 1, head 2" in found.page()


def test_beside_a_measurement():
    frame, summary, meta = report({label: words(41) for label in LABELS})
    measured, found = ss.SinkReport(frame, summary, meta | {"model": "toy"}), swept()
    both = found.beside(measured)
    name = "cost[zero_value(keys=[0])]"
    rows = both.frame[(both.frame["metric"] == name) & (both.frame["text"] == "all")]
    np.testing.assert_allclose(rows["value"], found.summary()["delta_loss"])
    np.testing.assert_allclose(rows["null"], found.summary()["placebo_delta_loss"])
    assert both.frame.dtypes.equals(measured.frame.dtypes)
    data = page.measured(both.frame, both.totals, both.about)
    assert data["names"][name] == f"{name} (nats per token)"
    assert data["scales"][name]["most"] == pytest.approx(3.0, abs=0.1)
    ax = both.heatmap(name, ax=Figure().add_subplot())
    assert ax.images[0].norm.vmin == -ax.images[0].norm.vmax
    with pytest.raises(ss.SinkscopeError, match="must be of one model"):
        found.beside(ss.SinkReport(frame, summary, meta | {"model": "other"}))
    with pytest.raises(ss.SinkscopeError, match="no text in common"):
        swept(["a"]).beside(ss.SinkReport(frame[frame["text"] == "b"], summary, meta | {"model": "toy"}))
    with pytest.raises(ss.SinkscopeError, match="over='heads'"):
        swept(places=[(0, None, None)], over="layers").beside(measured)
