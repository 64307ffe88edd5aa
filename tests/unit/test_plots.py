"""Plots by the data on the Axes, never by pixels."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sinkscope import plots
from sinkscope.errors import SinkscopeError
from sinkscope.reports.drawing import labelled
from tests.synthetic import HOSTILE, causal_attention, mass, profile, report, uniform, words

TEXTS = {"short": words(10), "long": words(100), "middle": words(30)}


@pytest.fixture
def ax():
    return Figure().add_subplot()


@pytest.fixture
def frame():
    return report(TEXTS)[0]


def line(ax: Axes, label: str):
    return next(line for line in ax.lines if line.get_label() == label)


def colour_bar(ax: Axes) -> Axes:
    return next(other for other in ax.figure.axes if other is not ax)


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


class TestHeatmap:
    def test_cells_are_layer_by_head(self, frame, ax):
        drawn = plots.heatmap(frame, text="long", ax=ax)
        assert drawn is ax
        expected = mass(np.arange(4)[:, None], np.arange(3)[None, :], text=1)
        np.testing.assert_allclose(ax.images[0].get_array(), expected)
        assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "head")
        assert ax.get_title() == "toy\nsink_mass of key 0, long"

    def test_order_of_the_rows_does_not_matter(self, frame, ax):
        plots.heatmap(frame.sample(frac=1, random_state=0), text="long", ax=ax)
        np.testing.assert_allclose(ax.images[0].get_array()[:, 0], mass(np.arange(4), 0, text=1))

    def test_first_layer_is_on_top(self, frame, ax):
        plots.heatmap(frame, ax=ax)
        bottom, top = ax.get_ylim()
        assert bottom > top

    def test_colour_bar_says_metric_unit_and_null(self, frame, ax):
        plots.heatmap(frame, text="short", ax=ax)
        bar = colour_bar(ax)
        assert (bar.texts[0].get_text(), bar.get_ylabel()) == ("share of\nattention", "")
        null = uniform(10)[0]
        assert f"null {null:.3g}" in [tick.get_text() for tick in bar.get_yticklabels()]
        assert bar.lines[-1].get_ydata()[0] == pytest.approx(null)

    def test_a_null_above_every_value_is_still_on_the_scale(self, frame, ax):
        plots.heatmap(frame.assign(null=0.99), ax=ax)
        assert ax.images[0].get_clim() == (0.0, 0.99)

    def test_no_mark_where_layers_differ_in_their_null(self, frame, ax):
        plots.heatmap(frame.assign(null=frame["layer"].astype(float)), ax=ax)
        assert not any("null" in tick.get_text() for tick in colour_bar(ax).get_yticklabels())

    def test_no_null_no_mark(self, frame, ax):
        plots.heatmap(frame.assign(null=np.nan), ax=ax)
        assert not any("null" in tick.get_text() for tick in colour_bar(ax).get_yticklabels())

    def test_ticks_are_thinned_and_name_their_layer(self, ax):
        frame = report(TEXTS, layers=64, heads=64)[0]
        plots.heatmap(frame[frame["layer"].isna() | (frame["layer"] >= 4)], ax=ax)
        labels = [tick.get_text() for tick in ax.get_yticklabels()]
        assert labels[:3] == ["4", "9", "14"]
        assert max(len(labels), len(ax.get_xticks())) <= 16

    def test_of_several_keys_the_first_is_drawn(self, frame, ax):
        other = frame[frame["metric"] == "sink_mass"].assign(key=7, value=99.0)
        plots.heatmap(pd.concat([other, frame], ignore_index=True), ax=ax)
        assert ax.images[0].get_array().max() < 1
        assert "of key 0" in ax.get_title()

    def test_the_scale_can_be_given(self, frame, ax):
        plots.heatmap(frame, ax=ax, vmin=0.2, vmax=2.0)
        assert ax.images[0].get_clim() == (0.2, 2.0)
        assert not any("null" in tick.get_text() for tick in colour_bar(ax).get_yticklabels() if frame["null"].max() < 0.2)


class TestProgression:
    def test_mean_over_heads_and_null(self, frame, ax):
        plots.progression(frame, ax=ax)
        mean = line(ax, "toy")
        np.testing.assert_array_equal(mean.get_xdata(), np.arange(4))
        np.testing.assert_allclose(mean.get_ydata(), mass(np.arange(4), head=1, text=1))  # the middle of each
        null = np.mean([uniform(len(tokens))[0] for tokens in TEXTS.values()])
        np.testing.assert_allclose(line(ax, "uniform attention").get_ydata(), null)
        assert (ax.get_title(), ax.get_ylabel()) == ("sink_mass by layer, mean of heads", "share of attention")

    def test_band_is_the_range_of_the_texts(self, frame, ax):
        plots.progression(frame, ax=ax)
        assert "range of 3 texts" in legend(ax)
        edges = ax.collections[0].get_paths()[0].vertices
        at_layer_0 = edges[edges[:, 0] == 0][:, 1]
        assert (at_layer_0.min(), at_layer_0.max()) == pytest.approx((mass(0, 1, 0), mass(0, 1, 2)))

    def test_one_text_has_no_band(self, ax):
        plots.progression(report({"a": words(10)})[0], ax=ax)
        assert legend(ax) == ["toy", "uniform attention"]
        assert not ax.collections

    def test_without_rows_for_all_it_takes_the_mean(self, frame, ax):
        plots.progression(frame[frame["text"] != "all"], ax=ax)
        np.testing.assert_allclose(line(ax, "toy").get_ydata(), mass(np.arange(4), 1, 1))

    def test_no_null_no_line(self, frame, ax):
        plots.progression(frame.assign(null=np.nan), ax=ax)
        assert "uniform attention" not in legend(ax)

    def test_a_second_curve_has_its_own_colour_name_and_null(self, frame, ax):
        other = report({label: words(7) for label in TEXTS}, model="other")[0]
        plots.progression(frame, ax=ax)
        plots.progression(frame.assign(value=frame["value"] / 2), ax=ax, label="half")
        plots.progression(other, ax=ax)
        names = ["toy", "half", "other"]
        assert len({line(ax, name).get_color() for name in names}) == 3
        assert legend(ax) == [
            "toy", "range of 3 texts", "uniform attention", "half", "other", "uniform attention, other"
        ]  # fmt: skip
        assert line(ax, "uniform attention, other").get_color() == line(ax, "other").get_color()

    def test_the_legend_is_below_the_axis(self, frame):
        figure = Figure(layout="constrained")
        drawn = plots.progression(frame, ax=figure.add_subplot())
        figure.draw_without_rendering()
        assert drawn.get_legend().get_window_extent().y1 < drawn.xaxis.label.get_window_extent().y0


class TestCompare:
    def test_one_scale_and_a_name_for_each(self, frame):
        other = report(TEXTS, layers=5, model="other")[0]
        other["value"] *= 2
        all_of_it = (other["metric"] == "sink_mass") & (other["text"] == "all")
        *maps, curves = plots.compare([frame, other])
        try:
            assert len({ax.images[0].get_clim() for ax in maps}) == 1
            assert maps[0].images[0].get_clim()[1] == pytest.approx(other[all_of_it]["value"].max())
            assert [ax.get_title().split("\n")[0] for ax in maps] == ["toy", "other"]
            assert {"toy", "other"} <= set(legend(curves))
        finally:
            plt.close(curves.figure)

    def test_of_one_model_they_are_numbered_and_names_can_be_given(self, frame):
        for reports, names in (([frame, frame], ["toy (1)", "toy (2)"]), ({"a": frame, "b": frame}, ["a", "b"])):
            *maps, curves = plots.compare(reports, "row_entropy", text="long")
            assert [ax.get_title() for ax in maps] == [f"{name}\nrow_entropy of key 0, long" for name in names]
            plt.close(curves.figure)
        with pytest.raises(SinkscopeError, match="at least two reports, got 1"):
            plots.compare([frame])


class TestPositions:
    def test_averages_layers_of_the_longest_text(self, frame, ax):
        plots.positions(frame, ax=ax)
        assert ax.get_title() == "toy\nposition_profile, long"
        expected = np.mean([profile(100, mass(layer, 1, text=1)) for layer in range(4)], axis=0)
        np.testing.assert_allclose(line(ax, "mean of layers").get_ydata(), expected)
        np.testing.assert_allclose(line(ax, "uniform attention").get_ydata(), uniform(100))

    def test_position_0_is_marked_and_named(self, frame, ax):
        plots.positions(frame, text="short", ax=ax)
        first = np.mean([mass(layer, 1, 0) for layer in range(4)])
        marker = next(line for line in ax.lines if line.get_marker() == "o")
        assert (marker.get_xdata()[0], marker.get_ydata()[0]) == pytest.approx((0, first))
        assert ax.texts[0].get_text() == f"position 0: {first:.3g}"

    @pytest.mark.parametrize(("text", "scale"), [("long", "symlog"), ("short", "linear")])
    def test_long_texts_are_logarithmic(self, frame, ax, text, scale):
        plots.positions(frame, text=text, ax=ax)
        assert ax.get_xscale() == scale

    @pytest.mark.parametrize(("lengths", "chosen"), [((10, 10), "mean of texts"), ((10, 11), "b")])
    def test_a_mean_only_of_texts_of_one_length(self, ax, lengths, chosen):
        frame = report({label: words(n) for label, n in zip("ab", lengths, strict=True)})[0]
        rows = frame[frame["metric"] == "position_profile"]
        everything = rows.groupby(["metric", "layer", "key"], as_index=False)[["value", "null"]].mean()
        plots.positions(pd.concat([frame, everything.assign(text="all")]), ax=ax)
        assert ax.get_title() == f"toy\nposition_profile, {chosen}"


class TestDistribution:
    def test_every_head_is_counted_once(self, frame, ax):
        plots.distribution(frame, ax=ax)
        assert sum(bar.get_height() for bar in ax.patches) == 4 * 3
        assert "12 heads" in legend(ax)

    def test_null_is_a_line(self, frame, ax):
        plots.distribution(frame, text="short", ax=ax)
        assert ax.lines[0].get_xdata()[0] == pytest.approx(uniform(10)[0])

    def test_null_that_differs_is_a_span(self, frame, ax):
        plots.distribution(frame.assign(null=frame["layer"].astype(float)), ax=ax)
        span = next(patch for patch in ax.patches if patch.get_label() == "uniform attention")
        assert (span.get_x(), span.get_width()) == (0, 3)


class TestAttention:
    def test_pairs_that_are_not_there_stay_blank(self, ax):
        plots.attention(causal_attention(6), words(6), ax=ax)
        cells = ax.images[0].get_array()
        assert cells[4, 0] == pytest.approx(0.6)
        assert cells[4, 2] == pytest.approx(0.1)
        np.testing.assert_array_equal(cells.mask, ~np.tri(6, dtype=bool))

    def test_zeros_after_the_query_are_blank_and_others_are_not(self, ax):
        query, key = (axis.ravel() for axis in np.indices((4, 4)))
        value = np.where((key <= query) & (key > query - 2), 0.5, 0.0)  # causal, with a window of two
        plots.attention(pd.DataFrame({"query": query, "key": key, "value": value}), words(4), ax=ax)
        cells = ax.images[0].get_array()
        np.testing.assert_array_equal(cells.mask, ~np.tri(4, dtype=bool))
        assert cells[3, 0] == 0

    def test_labels_are_visible_short_and_never_mathematics(self, ax):
        tokens = [*HOSTILE, " the"]
        plots.attention(causal_attention(len(tokens)), tokens, ax=ax)
        labels = [tick.get_text() for tick in ax.get_xticklabels()]
        assert labels[2] == "$\\frac{$"
        assert labels[4:7] == ["⟨U+202E⟩e…", "⟨U+0000⟩", "↵"]
        assert labels[-1] == "·the"
        assert all(len(label) <= 10 and label.isprintable() for label in labels)
        ax.figure.canvas.draw()  # raises where a label is read as mathematics

    def test_labels_are_thinned(self, ax):
        plots.attention(causal_attention(64), words(64), ax=ax)
        assert list(ax.get_xticks()) == list(range(0, 64, 5))

    @pytest.mark.parametrize(
        ("attrs", "title"),
        [
            ({}, "attention"),
            ({"layer": None, "head": None}, "attention, mean of heads and layers"),
            ({"layer": 18, "head": None}, "attention, layer 18, mean of heads"),
            ({"layer": None, "head": 7}, "attention, head 7, mean of layers"),
            ({"model": "m", "layer": 18, "head": 7}, "m\nattention, layer 18, head 7"),
        ],
    )
    def test_the_title_says_of_which_layer_and_head(self, ax, attrs, title):
        frame = causal_attention(6)
        frame.attrs = attrs
        assert plots.attention(frame, words(6), ax=ax).get_title() == title

    def test_too_few_tokens(self, ax):
        with pytest.raises(SinkscopeError, match="position 5, but there are 3 tokens"):
            plots.attention(causal_attention(6), words(3), ax=ax)


DRAW = [plots.heatmap, plots.progression, plots.positions, plots.distribution]


@pytest.mark.parametrize("draw", DRAW)
def test_unknown_metric_names_the_nearest_and_all(frame, draw, ax):
    with pytest.raises(SinkscopeError, match=r"(?s)unknown metric 'sink_maas'.*Available: ") as error:
        draw(frame, metric="sink_maas", ax=ax)
    right = "position_profile" if draw is plots.positions else "sink_mass"
    assert right in str(error.value)


@pytest.mark.parametrize("draw", [plots.heatmap, plots.positions, plots.distribution])
def test_unknown_text_lists_the_texts(frame, draw, ax):
    with pytest.raises(SinkscopeError, match=r"unknown text 'sort'; did you mean 'short'\?"):
        draw(frame, text="sort", ax=ax)


@pytest.mark.parametrize("draw", DRAW)
def test_legible_at_column_width(frame, draw):
    drawn = draw(frame)
    try:
        assert drawn.figure.get_size_inches()[0] == 3.5
        words = [drawn.title, drawn.xaxis.label, drawn.yaxis.label, *drawn.get_xticklabels(), *drawn.get_yticklabels()]
        words += drawn.texts + (drawn.get_legend().get_texts() if drawn.get_legend() else [])
        assert min(word.get_fontsize() for word in words) >= 7
    finally:
        plt.close(drawn.figure)


@pytest.mark.parametrize("draw", DRAW)
def test_the_frame_stays_as_it_was(frame, draw, ax):
    before = frame.copy()
    draw(frame, ax=ax)
    pd.testing.assert_frame_equal(frame, before)


class TestFigures:
    def test_all_that_can_be_drawn(self, frame):
        before = plt.get_fignums()
        figures = plots.figures(frame, causal_attention(6), words(6))
        assert set(figures) == {"heatmap", "progression", "positions", "distribution", "attention"}
        assert plt.get_fignums() == before  # pyplot never hears of them

    def test_what_is_absent_is_left_out(self, frame):
        assert set(plots.figures(frame[frame["metric"] == "position_profile"])) == {"positions"}
        assert plots.figures(frame[frame["metric"] == "sink_positions"]) == {}

    def test_without_sink_mass_the_first_metric_of_heads(self, frame):
        figures = plots.figures(frame[frame["metric"] == "row_entropy"])
        assert figures["heatmap"].axes[0].get_title().startswith("toy\nrow_entropy")

    def test_hostile_labels_are_drawn_as_they_are(self, tmp_path):
        frame = report({"$\\frac{$_": words(10), "_hidden": words(12)})[0]
        for stem, figure in plots.figures(frame).items():
            figure.savefig(tmp_path / f"{stem}.png")


def study_table():
    rows = [
        ("m", "with", "loss", 2.0, 1.5, 2.5, np.nan, "measured"),
        ("m", "without", "loss", 3.0, 2.0, 4.0, 1.0, "measured"),
    ]
    rows += [("other", "with", "loss", 9.0, np.nan, np.nan, np.nan, "code"), ("m", "with", "rate", 0.1, 0, 1, 0, "measured")]
    return pd.DataFrame(rows, columns=["model", "case", "quantity", "value", "low", "high", "null", "evidence"])


def test_estimates_show_ours_chance_and_what_was_published(ax):
    plots.estimates(study_table(), "loss", unit="nats", ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["with", "without"]
    assert ax.get_xlabel() == "loss (nats)"
    ours, theirs = (next(line for line in ax.lines if line.get_marker() == m) for m in ("o", "s"))
    chance = next(line for line in ax.lines if line.get_label() == "chance")
    assert ours.get_xdata().tolist() == [2.0, 3.0]
    assert theirs.get_xdata().tolist() == [9.0]
    assert chance.get_xdata()[1] == 1.0
    (bars,) = ax.collections
    assert [sorted(path[:, 0]) for path in bars.get_segments()] == [[1.5, 2.5], [2.0, 4.0]]
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(named) == ["chance", "m, 95% interval", "other (published)"]


def test_estimates_of_several_models_name_them(ax):
    table = pd.concat([study_table(), study_table().assign(model="n")])
    plots.estimates(table, "rate", ax=ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["m, with", "n, with"]
    with pytest.raises(SinkscopeError, match="did you mean 'rate'"):
        plots.estimates(table, "rat", ax=ax)


def test_a_unit_belongs_to_a_threshold_and_a_key():
    assert labelled("sink_rate@0.3") == "sink_rate@0.3 (share of heads)"
    assert labelled("sink_mass[key=[SEP]]") == "sink_mass[key=[SEP]] (share of attention)"


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, sinkscope; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
