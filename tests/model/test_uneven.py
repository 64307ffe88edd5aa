"""Layers with unequal numbers of heads (Laguna's): the heads that a layer has count, and no others."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.interventions import ZeroAttention, ZeroHead, ZeroValue
from sinkscope.testing import tiny_hf_model, tiny_model
from tests import oracles
from tests.conftest import fingerprint, total
from tests.model.compare import PER_HEAD, PROFILES, RATES, TL4, close, layers_of
from tests.model.test_gates import network, seen

pytestmark = pytest.mark.skipif(not TL4, reason="TransformerLens 3.9 does not know these models")
NAME, HEADS, WINDOWS = "LagunaForCausalLM", [4, 8, 4, 8], [8, None, 8, None]
PLACES = [(layer, head) for layer, n in enumerate(HEADS) for head in range(n)]
TEXTS = {"long": [1, *range(4, 24)], "short": [1, *range(30, 41)]}
WAYS = {"plain": (tiny_hf_model, "auto"), "flash": (tiny_model, "flash"), "hooks": (tiny_model, "hooks")}


def expected(ids) -> list[dict]:
    """What the slow oracle says of each layer of Hugging Face's own attention."""
    of = zip(layers_of(tiny_hf_model(NAME), ids), WINDOWS, strict=True)
    return [oracles.reference(layer.numpy()[None], windows=[window]) for layer, window in of]


def heads_of(report, metric, text, column="value") -> np.ndarray:
    """The numbers of the heads that there are, which must be those of the model."""
    rows = report.frame.query("metric == @metric and text == @text")
    assert list(zip(rows["layer"], rows["head"], strict=True)) == PLACES, metric
    return rows[column].to_numpy(float)


@pytest.mark.parametrize("way", WAYS)
def test_numbers_are_those_of_hugging_face_head_by_head(way):
    make, engine = WAYS[way]
    model = make(NAME)
    model(torch.tensor([[1, 5, 6]]))  # a bridge's norms note on their first run what they were given
    before = fingerprint(model)
    report = ss.measure(model, TEXTS, batch_size=2, engine=engine)
    assert fingerprint(model) == before
    assert report.about["engine"] == ("hooks" if way == "hooks" else "flash")
    assert (report.about["n_heads"], report.about["heads"]) == (8, {"0": 4, "1": 8, "2": 4, "3": 8})
    for text, ids in TEXTS.items():
        found = expected(ids)
        for name in PER_HEAD:
            values = np.concatenate([layer[name][0] for layer in found])
            close(heads_of(report, name, text), values, name)
            close(total(report, name, text), values.mean(), name)  # every head weighs the same
        for name in PROFILES:
            rows = report.frame.query("metric == @name and text == @text")
            close(rows["value"], np.concatenate([layer[name][0].mean(0) for layer in found]), name)
        for rate, of in RATES.items():
            above = np.concatenate([layer[of][0] for layer in found]) > 0.3
            np.testing.assert_array_equal(heads_of(report, f"{rate}@0.3", text), above)
            close(total(report, f"{rate}@0.3", text), above.mean(), rate)
        mass = np.concatenate([layer["sink_mass"][0] for layer in found])
        close(total(report, "sink_strength", text), mass.mean(), "sink_strength")
        close(total(report, "first_to_rest_ratio", text), mass.mean() / (1 - mass.mean()) * (len(ids) - 1), "ratio")
        series = [layer["sink_mass"].mean() for layer in found]
        close(total(report, "layer_progression", text), series[-1] - series[0], "layer_progression")
        shares = np.concatenate([layer["received_profile"][0] for layer in found])
        listed = {k: share for k, share in enumerate((shares > 0.3).mean(0)) if share >= 0.1}
        rows = report.frame.query("metric == 'sink_positions' and text == @text")
        assert dict(zip(rows["key"], rows["value"], strict=True)) == pytest.approx(listed)


def test_chance_is_a_mean_over_the_heads_that_there_are():
    report = ss.measure(tiny_hf_model(NAME), TEXTS, ["visible_sink_mass", "sink_strength", "received_profile"])
    by_layer = [oracles.null("visible_sink_mass", 21, window=window) for window in WINDOWS]
    nulls = np.repeat(by_layer, HEADS)
    close(heads_of(report, "visible_sink_mass", "long", "null"), nulls, "null")
    close(total(report, "visible_sink_mass", "long", "null"), nulls.mean(), "null")
    close(total(report, "sink_strength", "long", "null"), oracles.null("sink_mass", 21), "null")
    both = ss.measure(tiny_hf_model(NAME), TEXTS, ["visible_sink_mass"], where=ss.where.positions(10, None), compare=True)
    assert len(both.frame.query("text == 'all' and metric == 'visible_sink_mass[difference]'")) == len(PLACES)


def test_what_is_behind_attention_comes_from_the_heads_of_each_layer():
    report = ss.measure(network(NAME), [TEXTS["long"]], ["gate_mean", "sink_output_share", "value_drain"])
    calls = seen(network(NAME), TEXTS["long"])
    gates = [(call["written"] / call["z"]).mean((1, 2)) for call in calls]
    np.testing.assert_allclose(heads_of(report, "gate_mean", "text 0"), np.concatenate(gates), rtol=2e-4)
    shares = [
        call["weights"][:, :, 0]
        * (call["written"] / call["z"] * call["v"][:, :1]).norm(dim=-1)
        / call["written"].norm(dim=-1)
        for call in calls
    ]
    found = heads_of(report, "sink_output_share", "text 0")
    np.testing.assert_allclose(found, np.concatenate([s[:, 1:].mean(-1) for s in shares]), rtol=2e-4)
    assert len(report.frame.query("metric == 'value_drain' and text == 'text 0'")) == 2 * len(HEADS)  # key-value heads
    hooked = ss.measure(tiny_model(NAME), [TEXTS["long"]], ["value_drain", "matrix_entropy", "residual_norm"])
    assert hooked.frame["value"].notna().all()


def test_numbers_of_attention_at_hand_are_the_same():
    model = tiny_hf_model(NAME)
    report = ss.measure(model, [TEXTS["long"]])
    weights = model(input_ids=torch.tensor([TEXTS["long"]]), output_attentions=True).attentions
    windows = {layer: size for layer, size in enumerate(WINDOWS) if size}
    frame = ss.metrics.of_pattern(weights, windows=windows)
    ours = report.frame[report.frame["text"] == "text 0"]
    at = ["metric", "layer", "head", "key"]
    both = ours.merge(frame, on=at, suffixes=("", "_there"))
    assert len(both) == len(ours) == len(frame)
    np.testing.assert_allclose(both["value"], both["value_there"], atol=1e-5)
    np.testing.assert_allclose(both["null"], both["null_there"], atol=1e-9)


def test_a_report_has_no_cell_where_there_is_no_head(tmp_path):
    report = ss.measure(tiny_hf_model(NAME), TEXTS)
    assert len(report.top("sink_mass", 100)) == len(PLACES)
    cells = report.data()["cells"]["sink_mass"]["all"]["value"]
    assert [[value is None for value in row] for row in cells] == [[head >= n for head in range(8)] for n in HEADS]
    drawn = report.heatmap("sink_mass").collections or report.heatmap("sink_mass").images
    assert np.ma.masked_invalid(drawn[0].get_array()).mask.sum() == 4 * 8 - len(PLACES)
    kept = ss.load_report(report.save(tmp_path / "report"))
    pd.testing.assert_frame_equal(kept.frame, report.frame)
    assert kept.about["heads"] == {"0": 4, "1": 8, "2": 4, "3": 8}
    assert int(report.to_xarray()["sink_mass"].notnull().sum()) == len(PLACES) * 3


@pytest.mark.parametrize("per_text", [True, False])
def test_a_run_goes_on_where_it_was_stopped(tmp_path, per_text):
    def run(**how):
        return ss.measure(tiny_hf_model(NAME), TEXTS, ["sink_mass", "head_profile"], batch_size=1, per_text=per_text, **how)

    plain, first, again = run(), run(resume=tmp_path / "kept"), run(resume=tmp_path / "kept")
    for report in (first, again):
        pd.testing.assert_frame_equal(report.frame, plain.frame)
    assert len(plain.frame.query("text == 'all' and metric == 'sink_mass'")) == len(PLACES)


@pytest.mark.parametrize("make", [tiny_hf_model, tiny_model])
def test_watch_sees_the_same(make):
    model, ids = make(NAME), torch.tensor([TEXTS["long"]])
    with ss.watch(model, ["sink_mass", "row_entropy", "visible_sink_mass", "query_profile"]) as there:
        model(input_ids=ids) if make is tiny_hf_model else model(ids)
    report, found = ss.measure(model, [TEXTS["long"]], ["sink_mass", "row_entropy", "visible_sink_mass"]), there.report()
    label = found.texts[0]
    for name in ("sink_mass", "row_entropy", "visible_sink_mass"):
        close(heads_of(found, name, label), heads_of(report, name, "text 0"), name)
        close(total(found, name, label), total(report, name), name)
    series = there.series(by="head").query("metric == 'sink_mass'")
    assert list(zip(series["layer"], series["head"], strict=True)) == PLACES
    whole = there.series().query("metric == 'visible_sink_mass'")
    close(whole["value"], total(report, "visible_sink_mass"), "series")
    close(whole["null"], total(report, "visible_sink_mass", column="null"), "series")


def test_watch_sees_the_steps_of_a_generation():
    model = tiny_hf_model(NAME)
    with ss.watch(model, ["sink_mass"]) as there:
        made = model.generate(torch.tensor([TEXTS["short"]]), max_new_tokens=6, do_sample=False)
    report = ss.measure(model, [made[0, :-1].tolist()], ["sink_mass"])
    found = there.report()
    close(heads_of(found, "sink_mass", found.texts[0]), heads_of(report, "sink_mass", "text 0"), "generated")


def losses_without(heads: dict[int, list[int]]) -> np.ndarray:
    """Losses of Hugging Face's own model while the outputs of some heads are zeroed before the output projection."""
    model, ids = tiny_hf_model(NAME), torch.tensor([TEXTS["long"]])

    def zeroed(projection, args, of):
        out = args[0].clone().unflatten(-1, (-1, 8))
        out[:, :, of] = 0
        return (out.flatten(-2),)

    for layer, of in heads.items():
        model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(lambda m, args, of=of: zeroed(m, args, of))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logits.gather(1, ids[0, 1:, None])[:, 0].double().numpy()


@pytest.mark.parametrize("make", [tiny_hf_model, tiny_model])
def test_edits_are_made_in_heads_that_are_there(make):
    edits = [ZeroHead(heads=[6], layers=[1, 3]), ZeroHead(heads=[1]), ZeroHead()]
    report = ss.evaluate(make(NAME), [TEXTS["long"]], edits)
    every = [{1: [6], 3: [6]}, {layer: [1] for layer in range(4)}, {layer: list(range(n)) for layer, n in enumerate(HEADS)}]
    for edit, heads in zip(edits, every, strict=True):
        found = report.curves[report.curves["intervention"] == str(edit)]["loss"]
        np.testing.assert_allclose(found, losses_without(heads), atol=1e-5)
    mass = np.concatenate([layer["sink_mass"][0] for layer in expected(TEXTS["long"])]).mean()
    unedited = report.frame.query("intervention == 'none' and text == 'text 0'")
    close(unedited["sink_mass"], mass, "sink_mass")
    for use in (
        lambda m, e: ss.evaluate(m, [TEXTS["long"]], [e]),
        lambda m, e: ss.sweep(m, [TEXTS["long"]], e),
        lambda m, e: e.on(m).__enter__(),
    ):
        for edit in (ZeroHead(heads=[6]), ZeroHead(heads=[1]) & ss.MaskKeys(0, heads=[2, 6])):
            with pytest.raises(
                ss.SinkscopeError, match=r"heads \[6\]; the heads are 0 to 3; name layers= with more than the 4 of "
            ):
                use(make(NAME), edit)


def test_edits_of_some_heads_are_those_of_a_masked_softmax():
    """Of heads that share values too: the weights of key 0 are taken from the output."""
    edits = [ZeroAttention(0, heads=[5], layers=[1]), ZeroValue(0, heads=[5], layers=[1])]
    report = ss.evaluate(tiny_hf_model(NAME), [TEXTS["long"]], edits)
    first, second = (report.curves[report.curves["intervention"] == str(edit)]["loss"].to_numpy() for edit in edits)
    np.testing.assert_allclose(first, second, atol=1e-5)
    assert not np.allclose(first, losses_without({}), atol=1e-4)
    with ZeroHead(heads=[6], layers=[1, 3]).on(model := tiny_hf_model(NAME)):
        logits = model(input_ids=torch.tensor([TEXTS["long"]])).logits[0, :-1].detach().log_softmax(-1)
    live = -logits.gather(1, torch.tensor(TEXTS["long"])[1:, None])[:, 0].double().numpy()
    np.testing.assert_allclose(live, losses_without({1: [6], 3: [6]}), atol=1e-5)


def test_a_sweep_goes_over_the_heads_that_there_are(tmp_path):
    report = ss.sweep(tiny_hf_model(NAME), [TEXTS["long"]], ZeroHead())
    rows = report.frame.query("text == 'all'")
    assert list(zip(rows["layer"], rows["head"], strict=True)) == PLACES
    clean = losses_without({}).mean()
    for layer, head in ((0, 3), (1, 7), (2, 0), (3, 4)):
        (cost,) = rows.query("layer == @layer and head == @head")["delta_loss"]
        close(cost, losses_without({layer: [head]}).mean() - clean, "cost")
    kept = ss.load_report(report.save(tmp_path / "sweep"))
    assert len(kept.frame) == len(report.frame)


def test_whole_patterns_have_the_heads_that_there_are():
    model, ids = tiny_hf_model(NAME), TEXTS["short"]
    weights = layers_of(tiny_hf_model(NAME), ids)
    patterns = ss.attention_patterns(model, ids)
    for (layer, head), rows in patterns.groupby(["layer", "head"]):
        square = rows.pivot(index="query", columns="key", values="value").fillna(0).to_numpy()
        np.testing.assert_allclose(square, weights[layer][head].numpy(), atol=1e-5)
    assert sorted(patterns.groupby(["layer", "head"]).groups) == PLACES
    whole = ss.attention_map(model, ids)["value"].to_numpy().reshape(len(ids), -1)
    np.testing.assert_allclose(whole, torch.cat(weights).mean(0), atol=1e-5)
    some = ss.attention_map(model, ids, head=6)["value"].to_numpy().reshape(len(ids), -1)
    np.testing.assert_allclose(some, (weights[1][6] + weights[3][6]) / 2, atol=1e-5)
    with pytest.raises(ss.SinkscopeError, match="head=6: the heads are 0 to 3"):
        ss.attention_map(model, ids, layer=0, head=6)
    report = ss.measure(model, [ids], ["sink_mass"])
    shown = ss.reports.sink.SinkReport(report.frame, report.totals, report.about, None, patterns).data()["patterns"]
    from sinkscope.reports.page.pack import unpack

    held = unpack(shown["value"]).reshape(4, 8, -1)
    assert (np.isnan(held).all(-1) == [[head >= n for head in range(8)] for n in HEADS]).all()
    own = np.concatenate([w.numpy()[:, *np.tril_indices(len(ids))] for w in weights])
    np.testing.assert_allclose(held[tuple(zip(*PLACES, strict=True))], own, rtol=0.03, atol=2e-4)


def test_sinks_are_told_by_the_share_of_the_heads_that_there_are():
    shares = np.concatenate([layer["received_profile"][0] for layer in expected(TEXTS["long"])])
    eps = float(np.sort(shares[:, 0])[-3] - 1e-4)  # the first token is above it in 3 of 24 heads, which were 3 of 32
    flagged = (shares > eps).mean(0)
    mask = ss.sink_mask(tiny_hf_model(NAME), [TEXTS["long"]], by="attention", eps=eps)
    np.testing.assert_array_equal(mask.table()["position"], np.flatnonzero(flagged >= 0.1))
    close(mask.table()["attention"], flagged[flagged >= 0.1], "share")
    assert flagged[0] == 3 / 24


def test_studies_of_a_grid_of_heads_are_refused():
    with pytest.raises(ss.SinkscopeError, match=r"unequal numbers of heads.*ss\.sweep do"):
        ss.studies.find("inactive-heads")(tiny_hf_model(NAME), [TEXTS["long"]] * 4)
