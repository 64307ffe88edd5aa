"""One edit at every place: equal to `evaluate` of each alone, what is shared is run once, and what can't be shared is run."""

import inspect
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr, t

import sinkscope as ss
from sinkscope import sweeps
from sinkscope.capture import prefix, scored, together
from sinkscope.capture.each import Each
from sinkscope.capture.plans import plan
from sinkscope.edit import Edit
from sinkscope.interventions import (
    DropTokens,
    EditActivation,
    MeanHead,
    QuantizeKV,
    ReplaceToken,
    ReplaceValue,
    ScaleAttention,
    ScaleOutput,
    SelfOnly,
    ZeroAttention,
    ZeroHead,
    ZeroValue,
)
from sinkscope.metrics.across import SIGNED, t_interval
from sinkscope.models import adapt
from sinkscope.models.versions import check_bridge
from sinkscope.testing import tiny_hf_model
from sinkscope.tokens import TextTokens, Tokens
from tests.conftest import fingerprint
from tests.model.compare import TL4, novel

pytestmark = pytest.mark.classes
on_39 = pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
TEXTS = {f"text {i}": torch.randint(3, 60, (n,), generator=torch.Generator().manual_seed(i)) for i, n in enumerate((44, 37))}
NUMBERS = ["tokens", "loss", "delta_loss", "kl", "std_error", "low", "high", "top1_agreement"]
ACTIVATION = EditActivation(4.0, positions=[0, 2], dims=[3, 5], layers=1)


def same_as_evaluate(model, texts, edit, over="heads", **how):
    """Every row, and its placebo's, against `evaluate` of all these edits, each of which runs whole passes alone."""
    report = ss.sweep(model, texts, edit, over, **how)
    names = report.frame["intervention"].unique().tolist()
    placebos = [str(ss.interventions.parse(name).placebo()) for name in names] if "placebo_kl" in report.summary() else []
    alone = ss.evaluate(model, texts, [*names, *placebos])
    one = alone.frame.merge(alone.details, on=["text", "intervention"]).set_index(["text", "intervention"])
    rows = report.frame.set_index(["text", "intervention"])
    for name in NUMBERS:
        np.testing.assert_allclose(rows[name], one[name].loc[rows.index], atol=1e-5, err_msg=name)
    if placebos:
        index = pd.MultiIndex.from_tuples([(text, placebos[names.index(name)]) for text, name in rows.index])
        for name in ("delta_loss", "kl", "low", "high"):
            np.testing.assert_allclose(rows[f"placebo_{name}"], one[name].loc[index], atol=1e-5, err_msg=name)
    assert report.frame["delta_loss"].abs().max() > 1e-3
    return report


@pytest.mark.parametrize(
    ("family", "edit"),
    [
        ("gpt2", ZeroHead()),
        ("llama", ScaleAttention([0, 2], 0.3)),
        ("gpt_oss", ss.MaskKeys([0, 2])),
        ("bloom", ZeroAttention([0, 2])),
        ("bloom", ZeroHead()),
    ],
    ids=str,
)
def test_every_head_equals_evaluate_of_it_alone(tiny, family, edit):
    model = tiny(family)
    before = fingerprint(model)
    report = same_as_evaluate(model, TEXTS, edit)
    assert fingerprint(model) == before
    assert len(report.summary()) == model.cfg.n_layers * model.cfg.n_heads
    assert "proved equal" in report.about["shared"]


@on_39
def test_every_head_of_a_hooked_transformer(hooked):
    report = same_as_evaluate(hooked("llama"), TEXTS, ss.MaskKeys(0))
    assert report.about["engine"] == "hooks"
    assert "proved equal" in report.about["shared"]


@pytest.mark.parametrize(
    ("edit", "over", "how"),
    [
        (ZeroAttention(0) & ss.MaskKeys(3), "heads", {}),
        (ss.MaskKeys(0, layers=[1, 2], heads=[3]), "heads", {}),
        (ss.Window(7), "layers", {}),
        (ss.SinkWindow(7, sinks=2), "layers", {}),
        (ZeroValue(0), "heads", {}),
        (MeanHead(heads=[1]), "layers", {}),
        (ReplaceValue(0, by="donor", layers=[0, 2], heads=[0, 3]), "heads", {}),
        (QuantizeKV(4), "layers", {}),
        (SelfOnly(3), "positions", {"positions": [3, 0]}),
        (ScaleOutput(0, 0.5, layers=1), "positions", {"positions": [3, 0]}),
        (ss.MaskKeys(0, layers=[1]), "positions", {"positions": [30, 0, 7]}),
        (DropTokens(0), "positions", {"positions": [0, 5]}),
        (ReplaceToken(0, 9), "positions", {"positions": [0, 5]}),
        (ACTIVATION, "positions", {"positions": [0, 9]}),
    ],
    ids=str,
)
def test_other_edits_and_other_places(llama, edit, over, how):
    if over == "heads" and str(edit).startswith(("zero_value", "replace_value")):
        check_bridge()  # where heads share values, they are one at a HookedTransformer's hook_v
    report = same_as_evaluate(llama, TEXTS, edit, over, **how)
    if "positions" in how:
        assert report.summary()["position"].tolist() == how["positions"]
    assert (
        set(report.summary().columns) & {"layer", "head", "position"}
        == {
            "heads": {"layer", "head"},
            "layers": {"layer"},
            "positions": {"position"},
        }[over]
    )


def test_a_plain_model_and_all_positions(llama):
    report = ss.sweep(tiny_hf_model("llama"), list(TEXTS.values()), ss.MaskKeys(0), "positions")
    expected = ss.sweep(llama, list(TEXTS.values()), ss.MaskKeys(0), "positions")
    columns = ["text", "position", "intervention", *NUMBERS]
    pd.testing.assert_frame_equal(report.frame[columns], expected.frame[columns], atol=1e-5, rtol=0)
    long = report.frame[report.frame["text"] == "text 0"]
    assert long["position"].tolist() == list(range(43))  # the last predicts nothing
    whole = report.summary().set_index("position")
    alone = long.set_index("position").loc[40]
    assert whole.loc[40, "delta_loss"] == alone["delta_loss"]  # of the one text that has it
    assert (whole.loc[40, "low"], whole.loc[40, "high"]) == (alone["low"], alone["high"])
    assert report.frame["placebo_kl"].isna().all()


def counted(model):
    """Count how often each layer runs, and on how many texts at once."""
    calls = []
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda m, args, out, layer=layer: calls.append((layer, args[0].shape[0])))
    return calls


def test_what_is_shared_is_run_once(monkeypatch):
    model = tiny_hf_model("llama")
    calls = counted(model)
    monkeypatch.setattr(sweeps, "starts", lambda adapter, capture, sequence, firsts: {first: first for first in firsts})
    ss.sweep(model, [TEXTS["text 0"]], ss.MaskKeys(0), placebo=False)
    runs = calls[-(3 + 3 + 2 + 1) :]  # after proofs of the engine
    assert runs == [(0, 1), (1, 1), (2, 1), (0, 4), (1, 4), (2, 4), (1, 4), (2, 4), (2, 4)]
    monkeypatch.setitem(together.TOKENS, "cpu", 44 * 3)
    ss.sweep(model, [TEXTS["text 0"]], ss.MaskKeys(0, layers=[2]), placebo=False)
    assert calls[-5:] == [(0, 1), (1, 1), (2, 1), (2, 3), (2, 1)]


@pytest.mark.parametrize("needs", ["an earlier layer", "its own input twice"])
def test_a_layer_that_needs_more_than_the_one_before_is_found_out(needs):
    """Layer 2 of this model takes something that layer 1 has left for it: what begins with layer 2 must run layer 1."""
    model = tiny_hf_model("llama")
    first, second = (layer.mlp for layer in model.model.layers[1:])
    left = []
    first.register_forward_hook(lambda m, args, out: left.append(out * 0.5))
    if needs == "an earlier layer":
        second.register_forward_hook(lambda m, args, out: out + left.pop())
    else:
        second.register_forward_hook(lambda m, args, out: out + (left.pop() if left else 0))
    report = same_as_evaluate(model, TEXTS, ss.MaskKeys(0))
    assert "but for 1 of 3 layers" in report.about["shared"]
    assert not left


def test_hooks_of_the_users_on_a_layer_do_what_they_did():
    """Steering after layer 0, once and not once more when the layer hands out what it gave."""
    model = tiny_hf_model("llama")
    model.model.layers[0].register_forward_hook(lambda m, args, out: out + 1)
    report = same_as_evaluate(model, TEXTS, ss.MaskKeys(0))
    assert "but for" not in report.about["shared"]


def test_each_asks_every_edit_whatever_an_engine_asks():
    """An answer by layer that `Each` would not give for each text would be lost without a word."""
    asked = {
        name
        for name, method in vars(Edit).items()
        if inspect.isfunction(method) and "layer" in inspect.signature(method).parameters
    }
    alone = {"reach", "cache", "held", "unrotated", "mlp"}  # of windows, caches and neurons, which are run alone
    assert asked - alone <= vars(Each).keys()
    assert not Each.fits(ss.Window(4))
    assert not Each.fits(ss.MaskKeys(0) & DropTokens(1))
    assert not Each.fits(QuantizeKV(4))
    assert Each.fits(ss.MaskKeys(0) & ACTIVATION)


def test_edits_of_several_layers_in_one_batch(bridge_of):
    edits = (ss.MaskKeys(0, layers=1), ZeroAttention(2, heads=1), ZeroValue(1, layers=[0, 2]), ZeroValue(0, heads=[1]))
    edits += (ACTIVATION, ScaleAttention(0, 0.5, heads=2), ZeroHead(layers=1, heads=[0]), ScaleOutput([1], 2.0))
    adapter, ids = adapt(bridge_of("llama")), TEXTS["text 0"]
    text = TextTokens("a", ids, ("",) * len(ids))
    with plan(adapter, Tokens((text,), ""), edits) as capture:
        batch = prefix.batch_of(text, len(edits), adapter)
        at_once = capture.copies(batch, Each(of=edits), lambda: None, 0)
        alone = [capture.copies(prefix.batch_of(text, 1, adapter), edit, lambda: None, 0)[0] for edit in edits]
    torch.testing.assert_close(at_once, torch.stack(alone), atol=1e-4, rtol=1e-5)


def test_placebos(llama):
    report = ss.sweep(llama, TEXTS, ss.MaskKeys(0, layers=1), placebo=3)
    seeds = (str(ss.MaskKeys(0, layers=[1], heads=[2]).placebo(seed)) for seed in range(20))
    drawn = list(dict.fromkeys(seeds))[:3]  # seeds 0 and 1 draw the same
    alone = ss.evaluate(llama, TEXTS, drawn).frame
    deltas = alone[alone["text"] == "text 0"].set_index("intervention")["delta_loss"].loc[drawn]
    row = report.frame[(report.frame["text"] == "text 0") & (report.frame["head"] == 2)].iloc[0]
    assert row["placebo_delta_loss"] == pytest.approx(deltas.mean(), abs=1e-6)
    short = ss.sweep(llama, [TEXTS["text 0"][:20]], ss.MaskKeys(0, layers=1))
    assert short.frame["placebo_kl"].isna().all()  # position 31 does not fit
    assert any("placebo" in note for note in short.about["notes"])
    assert ss.sweep(llama, TEXTS, ss.MaskKeys(0, layers=1), placebo=False).frame["placebo_kl"].isna().all()
    one = ss.sweep(llama, [TEXTS["text 0"]], ss.MaskKeys(0, layers=1, heads=2), placebo=3).summary().iloc[0]
    half = t.ppf(0.975, 2) * deltas.std(ddof=1) / np.sqrt(3)
    assert one["placebo_high"] - one["placebo_low"] == pytest.approx(2 * half, abs=1e-5)


@pytest.mark.parametrize(
    ("edit", "over", "how", "message"),
    [
        ("window(8)", "heads", {}, "takes no heads=, so it can't be swept over heads; over='layers' can"),
        ("mask_keys(0)", "head", {}, "did you mean 'heads'"),
        ("mask_keys(0)", "heads", {"positions": [1]}, "positions= belongs to over='positions'"),
        ("mask_keys(0)", "positions", {"positions": [99]}, "positions are 0 to 43"),
        ("mask_keys(0)", "positions", {"positions": []}, "give at least one"),
        ("mask_keys(0)", "positions", {"positions": [-1]}, "counted from 0"),
        ("mask_keys(0)", "positions", {"placebo": True}, "every one of the positions is the others' placebo"),
        ("window(8)", "layers", {"placebo": True}, "there is no placebo for it"),
        ("zero_head()", "heads", {"placebo": True}, "every one of the heads is the others' placebo"),
        ("mask_keys(0)", "heads", {"placebo": -1}, "placebo=-1"),
        ("mask_keys(0)", "heads", {"score_from": 50}, "the first one scored can be"),
        ("mask_keys(0, layers=[7])", "heads", {}, "those with attention are 0 to 2"),
        ("mask_key(0)", "heads", {}, "did you mean 'mask_keys'"),
        ("drop_tokens(0)", "layers", {}, "whole model|input|layers"),
    ],
)
def test_bad_input_is_said_before_anything_runs(llama, edit, over, how, message):
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.sweep(llama, TEXTS, edit, over, **how)


def test_a_text_beyond_the_context(llama):
    with pytest.raises(ss.SinkscopeError, match="takes at most 128"):
        ss.sweep(llama, [torch.arange(3, 303) % 60], ss.MaskKeys(0))


def test_the_bar_counts_everything_in_small_steps(llama, monkeypatch):
    steps, totals = [], []

    @contextmanager
    def bar(show, total, what, unit="layer"):
        totals.append(total)
        yield steps.append

    monkeypatch.setattr(sweeps, "bar", bar)
    monkeypatch.setattr(scored, "NUMBERS", 0)  # of so small a vocabulary and so short texts,
    monkeypatch.setattr(scored, "ROWS", 128)  # logits would be made all at once
    for over in ("heads", "layers", "positions"):
        steps.clear()
        ss.sweep(llama, TEXTS, ss.MaskKeys(0), over, progress=True)
        assert sum(steps) == totals[-1]
        assert max(steps) <= totals[-1] / 10
    ss.sweep(llama, iter(TEXTS.values()), ss.MaskKeys(0), "positions", progress=True)
    assert totals[-1] is None


def test_a_killed_sweep_goes_on(llama, monkeypatch, tmp_path):
    monkeypatch.setattr(together, "RUNS", 4)
    whole, parts, run = ss.sweep(llama, TEXTS, ss.MaskKeys(0)), [], together.Together.scored

    def dies(self, clean, routes, *rest):
        parts.append([route.name for route in routes])
        if len(parts) == 3:
            raise KeyboardInterrupt
        return run(self, clean, routes, *rest)

    monkeypatch.setattr(together.Together, "scored", dies)
    with pytest.raises(KeyboardInterrupt):
        ss.sweep(llama, TEXTS, ss.MaskKeys(0), resume=tmp_path)
    again = ss.sweep(llama, TEXTS, ss.MaskKeys(0), resume=tmp_path)
    pd.testing.assert_frame_equal(again.frame, whole.frame)
    assert parts[3] == parts[2]
    names = [name for part in parts[:2] + parts[3:] for name in part]
    assert len(names) == 2 * len(set(names))  # two texts, no run twice


def test_rank_correlation(llama):
    report, measured = ss.sweep(llama, TEXTS, ss.MaskKeys(0)), ss.measure(llama, TEXTS, ["sink_mass"])
    by_text = []
    for text in TEXTS:
        ours = report.frame[report.frame["text"] == text].set_index(["layer", "head"])["delta_loss"]
        rows = measured.frame.query("text == @text and metric == 'sink_mass'").set_index(["layer", "head"])["value"]
        by_text.append(spearmanr(ours.to_numpy(float), rows.loc[ours.index].to_numpy(float)).statistic)
    found = report.rank_correlation(measured)
    assert found.value == pytest.approx(np.mean(by_text))
    error = np.std(by_text, ddof=1) / np.sqrt(2)
    assert found[1:3] == pytest.approx(t_interval(np.mean(by_text), error, 2, SIGNED))
    assert found.said == "t, logit, 2 texts"
    with pytest.raises(ss.SinkscopeError, match="over='heads'"):
        ss.sweep(llama, TEXTS, ss.MaskKeys(0), "layers").rank_correlation(measured)
    with pytest.raises(ss.SinkscopeError, match="no text has both"):
        report.rank_correlation(ss.measure(llama, {"other": TEXTS["text 0"]}, ["sink_mass"]))


@pytest.mark.model
def test_some_heads_of_smollm2(smollm2):
    report = same_as_evaluate(smollm2, [novel(64)], ZeroHead(layers=[2, 20], heads=[1, 5]))
    assert len(report.summary()) == 4
