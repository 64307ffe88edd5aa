"""Interventions: equal to slow loops that evict, to closed forms and identities; refused where they can't be made."""

import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.capture import edited, scored
from sinkscope.interventions import (
    AmplifyVariance,
    BiasScores,
    DropTokens,
    EditActivation,
    Intervention,
    MeanHead,
    MeanValue,
    QuantizeKV,
    RecomputeWindow,
    ReplaceToken,
    ReplaceValue,
    ScaleAttention,
    ScaleOutput,
    SelfOnly,
    StreamingWindow,
    ZeroAttention,
    ZeroHead,
    ZeroNeuron,
    ZeroValue,
    parse,
)
from sinkscope.testing import tiny_hf_model, tiny_model
from tests.conftest import attempt, fingerprint, most_slow
from tests.model.compare import losses
from tests.oracles import evicting_loop

pytestmark = pytest.mark.classes
IDS = torch.randint(3, 60, (48,), generator=torch.Generator().manual_seed(1))
ROTARY = ["llama", "qwen3", "phi", "gpt_neox"]


@pytest.mark.parametrize("family", [*ROTARY, "gpt2", "opt"])
@pytest.mark.parametrize("sinks", [0, 3])
def test_one_pass_equals_the_evicting_cache(family, sinks):
    edit = ss.SinkWindow(9, sinks=sinks) if sinks else ss.Window(9)
    ours = losses(ss.evaluate(tiny_model(family), [IDS], edit), edit)
    expected = evicting_loop(tiny_hf_model(family), IDS, 9, sinks, cache_positions=False)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize("family", ROTARY)
@pytest.mark.parametrize("sinks", [0, 3])
def test_one_pass_equals_positions_inside_the_cache(family, sinks):
    edit = StreamingWindow(9, sinks=sinks)
    ours = losses(ss.evaluate(tiny_model(family), [IDS], edit), edit)
    expected = evicting_loop(tiny_hf_model(family), IDS, 9, sinks, cache_positions=True)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    if sinks:
        assert np.abs(ours - evicting_loop(tiny_hf_model(family), IDS, 9, sinks, cache_positions=False)).max() > 1e-3


@pytest.mark.parametrize("family", most_slow(ROTARY, "llama", "phi"))
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("piece", [1, 4, 9, 20])
def test_pieces_of_a_stream_change_nothing(family, sinks, piece, monkeypatch):
    """Against the loop, whatever the piece: keys that are carried over are turned to where they stand in the cache."""
    monkeypatch.setattr(edited, "PIECE", piece)
    edit = StreamingWindow(9, sinks=sinks)
    report = ss.evaluate(tiny_model(family), [IDS], [edit, edit & ss.MaskKeys(20)])
    expected = evicting_loop(tiny_hf_model(family), IDS, 9, sinks, cache_positions=True)
    np.testing.assert_allclose(losses(report, edit), expected, atol=1e-4)
    monkeypatch.setattr(edited, "PIECE", 48)
    whole = ss.evaluate(tiny_model(family), [IDS], [edit, edit & ss.MaskKeys(20)])
    np.testing.assert_allclose(report.curves["loss"], whole.curves["loss"], atol=1e-4)
    np.testing.assert_allclose(report.frame["sink_mass"], whole.frame["sink_mass"], atol=1e-6)
    assert report.frame["sink_position"].equals(whole.frame["sink_position"])


def test_a_text_beyond_the_context(monkeypatch):
    """300 tokens where the context is 128: as the loop, in bounded memory, and no clean run is made up."""
    monkeypatch.setattr(edited, "PIECE", 32)
    held, keep = [], edited.Stream.keep
    monkeypatch.setattr(
        edited.Stream, "keep", lambda self, layer, at, *rest: (held.append(len(at)), keep(self, layer, at, *rest))
    )
    ids, model = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(5)), tiny_model("llama")
    edits = [StreamingWindow(16, sinks=2), ss.Window(16)]
    report = ss.evaluate(model, [ids], edits, score_from=40)
    assert max(held) == 15
    for edit, sinks in zip(edits, (2, 0), strict=True):
        expected = evicting_loop(tiny_hf_model("llama"), ids, 16, sinks, cache_positions=True)[39:]
        np.testing.assert_allclose(losses(report, edit), expected, atol=1e-4)
    rows = report.summary().set_index("intervention")
    assert rows.loc["none", "tokens"] == 0
    assert rows["delta_loss"].isna().all()
    assert rows.loc[str(edits[0]), "perplexity"] == pytest.approx(np.exp(losses(report, edits[0]).mean()))
    assert "no unedited run" in report.about["no_clean_run"]
    table = report.page().partition("<table>")[2].partition("</table>")[0]
    assert "nan" not in table.lower()
    assert "&lt;NA" not in table
    assert "have no unedited run" in report.page()
    report._repr_html_()
    report.loss_curve()
    both = ss.evaluate(model, {"long": ids, "short": ids[:60]}, ss.Window(16), score_from=40)  # the short one has a clean run
    short = both.frame[both.frame["text"] == "short"].set_index("intervention")
    assert short.loc["none", "tokens"] == 20
    assert short["delta_loss"].notna().all()
    for edit in (ss.SinkWindow(16, sinks=2), ss.MaskKeys(0), StreamingWindow(16) & DropTokens(0)):
        with pytest.raises(ss.SinkscopeError, match="takes at most 128"):
            ss.evaluate(model, [ids], [edits[0], edit])
    with pytest.raises(ss.SinkscopeError, match="takes at most"):
        ss.evaluate(tiny_model("gpt2"), [ids], ss.Window(16))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputation_is_a_run_on_the_last_tokens(family):
    edit, model = RecomputeWindow(7), tiny_hf_model(family)
    report = ss.evaluate(tiny_model(family), [IDS], edit)
    with torch.no_grad():
        rows = [model(IDS[None, max(0, i - 6) : i + 1]).logits[0, -1].log_softmax(-1) for i in range(len(IDS) - 1)]
    expected = [-float(row[token]) for row, token in zip(rows, IDS[1:], strict=True)]
    np.testing.assert_allclose(losses(report, edit), expected, atol=1e-5)
    assert report.summary()["sink_position"].isna().tolist() == [False, True]


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "mistral", "gemma2", "gpt_oss", "gpt_neox"])
def test_identities(tiny, family):
    """A long window and no edit change nothing; zeroing attention to a key is zeroing its value; both are not masking."""
    edits = [ss.Window(48), ss.SinkWindow(60, sinks=2), ZeroAttention(5), ZeroValue(5), ss.MaskKeys(5)]
    report = ss.evaluate(tiny(family), [IDS], edits)
    plain = losses(report, "none")
    for same in edits[:2]:
        np.testing.assert_allclose(losses(report, same), plain, atol=1e-5)
    np.testing.assert_allclose(losses(report, edits[2]), losses(report, edits[3]), atol=1e-4)
    assert np.abs(losses(report, edits[2]) - plain)[5:].max() > 1e-3, "an edit without effect"
    assert np.abs(losses(report, edits[2]) - losses(report, edits[4])).max() > 1e-3
    np.testing.assert_allclose(losses(report, edits[4])[:4], plain[:4], atol=1e-5)
    kl = report.summary().set_index("intervention")["kl"]
    assert kl["none"] == 0
    assert abs(kl[str(edits[0])]) < 1e-6 < kl[str(edits[4])]


def test_loss_is_the_models_own(tiny):
    with torch.no_grad():
        own = torch.nn.functional.cross_entropy(tiny_hf_model("llama")(IDS[None]).logits[0, :-1], IDS[1:], reduction="none")
    np.testing.assert_allclose(losses(ss.evaluate(tiny("llama"), [IDS], ss.Window(8)), "none"), own.numpy(), atol=1e-5)


def test_masking_every_other_key_leaves_the_own_value(tiny):
    """Seen from outside: with a window of one, tokens don't reach each other at all."""
    edit = ss.Window(1)
    ours = losses(ss.evaluate(tiny("llama"), [IDS], edit), edit)
    with torch.no_grad():
        rows = [tiny_hf_model("llama")(IDS[None, i : i + 1]).logits[0, 0] for i in range(len(IDS) - 1)]
    expected = [-float(row.log_softmax(-1)[token]) for row, token in zip(rows, IDS[1:], strict=True)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    everything = ss.MaskKeys(list(range(48)))
    np.testing.assert_allclose(losses(ss.evaluate(tiny("llama"), [IDS], everything), everything), ours, atol=1e-5)


def test_dropping_is_running_without(tiny):
    report = ss.evaluate(tiny("llama"), [IDS], [DropTokens(0), ReplaceToken(0, 7)])
    shorter = ss.evaluate(tiny("llama"), [IDS[1:]], ss.Window(64))
    np.testing.assert_allclose(losses(report, DropTokens(0)), losses(shorter, "none"), atol=1e-5)
    swapped = IDS.clone()
    swapped[0] = 7
    other = losses(ss.evaluate(tiny("llama"), [swapped], ss.Window(64)), "none")
    np.testing.assert_allclose(losses(report, ReplaceToken(0, 7)), other, atol=1e-5)


def test_kl_and_agreement_by_hand(tiny):
    edit, network = ReplaceToken(0, 7), tiny_hf_model("llama")
    swapped = IDS.clone()
    swapped[0] = 7
    with torch.no_grad():
        p, q = (network(ids[None]).logits[0, :-1].double().log_softmax(-1) for ids in (IDS, swapped))
    row = ss.evaluate(tiny("llama"), [IDS], edit).summary().set_index("intervention").loc[str(edit)]
    assert row["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert row["kl"] > 0.01
    assert row["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_sink_mass_and_place_agree_with_measure(tiny):
    """Also under a mask: rows are renormalised over the other keys, by hand here."""
    report = ss.evaluate(tiny("llama"), [IDS], ss.MaskKeys(0)).summary().set_index("intervention")
    measured = ss.measure(tiny("llama"), [IDS], ["sink_mass", "position_profile"])
    assert report.loc["none", "sink_mass"] == pytest.approx(
        measured.summary("all").set_index("metric")["value"]["sink_mass"], abs=1e-6
    )
    profile = measured.frame[measured.frame["metric"] == "position_profile"].groupby("key")["value"].mean()
    assert report.loc["none", "sink_position"] == profile.idxmax()
    assert report.loc["mask_keys(keys=[0])", "sink_mass"] == pytest.approx(1 / 48, abs=1e-6)  # row 0 alone still sees it


def test_heads_and_layers(tiny):
    """Every head one by one is not all of them at once, and no layer is no edit."""
    model = tiny("llama")
    some = [ss.MaskKeys(0, heads=[h]) for h in range(4)] + [
        ss.MaskKeys(0),
        ss.MaskKeys(0, layers=[2]),
        ss.MaskKeys(0, heads=range(4)),
    ]
    report = ss.evaluate(model, [IDS], some)
    found = [losses(report, e) for e in some]
    assert all(np.abs(a - b).max() > 1e-5 for a, b in itertools.combinations(found[:-1], 2))
    np.testing.assert_allclose(found[-1], found[4], atol=1e-6)


def test_intervals_are_paired():
    """Over texts by hand; over one text by blocks, which says so."""
    model, texts = tiny_model("llama"), [IDS, IDS.flip(0), IDS.roll(5)]
    report = ss.evaluate(model, texts, ss.Window(6))
    each = report.frame[(report.frame["intervention"] == "window(size=6)") & (report.frame["text"] != "all")]["delta_loss"]
    row = report.summary().set_index("intervention").loc["window(size=6)"]
    assert row["delta_loss"] == pytest.approx(each.mean())
    assert row["std_error"] == pytest.approx(each.std() / 3**0.5)
    assert row["low"] == pytest.approx(row["delta_loss"] - 4.302653 * row["std_error"])  # Student's t, 2 degrees of freedom
    assert "across texts" in report.about["interval"]
    assert row["interval"] == "t, 3 texts"
    one = ss.evaluate(model, [IDS], ss.Window(6))
    assert "blocks of the one text" in one.about["interval"]
    assert one.summary().loc[1, "interval"] in (f"t, {(len(IDS) - 1) // 8} blocks", "t, 16 blocks")
    short = ss.evaluate(model, [IDS[:9]], ss.Window(6)).summary()
    assert short["low"].isna().all()
    assert set(short["interval"]) == {"none: 8 tokens scored, 32 needed"}


def test_an_edit_that_changed_nothing_says_so():
    """No key was evicted; some texts were longer; a token was replaced by itself."""
    model, texts = tiny_model("llama"), {"short": IDS[:9], "long": IDS}
    size = len(IDS) - 3
    report = ss.evaluate(model, texts, [ss.Window(256), ss.Window(size), ss.MaskKeys(0), ReplaceToken(0, int(IDS[0]))])
    assert report.about["notes"] == [
        f"window(size=256) changed nothing (no key was evicted: 9 to {len(IDS)} tokens)",
        f"window(size={size}) changed nothing in 'short' (no key was evicted: 9 tokens)",
        f"replace_token(position=0, token={int(IDS[0])}) changed nothing",
    ]
    assert "note: window(size=256) changed nothing" in str(report)


def test_printing_shows_the_table_and_a_long_one_is_cut():
    model = tiny_model("llama")
    report = ss.evaluate(model, [IDS], [ss.Window(n) for n in range(4, 34)])
    shown = str(report)
    assert repr(report) == shown
    assert shown.startswith("EffectReport: tiny-llama, 30 interventions, 1 text of")
    row = report.summary().loc[1]
    assert f"{row['loss']:.3f}" in shown
    assert f"{row['low']:+.3f} to {row['high']:+.3f}" in shown
    assert "... 7 more: effect.summary() has all" in shown
    assert len(shown.splitlines()) < 32


def test_to_xarray_and_figures():
    xr = pytest.importorskip("xarray")
    report = ss.evaluate(tiny_model("llama"), {"b": IDS, "a": IDS.flip(0)}, [ss.Window(6), ss.Window(4)])
    found = report.to_xarray()
    assert isinstance(found, xr.Dataset)
    assert found["text"].values.tolist() == ["b", "a", "all"]
    assert found["intervention"].values.tolist() == report.interventions
    for row in report.frame.itertuples():
        assert float(found["delta_loss"].sel(text=row.text, intervention=row.intervention)) == row.delta_loss
    assert report.to_xarray("a")["text"].values.tolist() == ["a"]
    with pytest.raises(ss.SinkscopeError, match="unknown text in this report 'c'"):
        report.to_xarray("c")
    assert set(report.figures()) == {"loss"}


# --- text form, composition, placebo ------------------------------------------------------------------------------

EDITS = [
    ss.Window(7),
    ss.SinkWindow(64, sinks=2, layers=[0, 1]),
    ss.SinkWindow(64, sinks=2, at=9),
    StreamingWindow(9),
    ss.MaskKeys([0, -1], heads=[1], layers=[2]),
    ZeroAttention(3),
    ZeroValue([1, 2]),
    MeanValue(),
    DropTokens([0, 1]),
    ReplaceToken(0, 198),
    RecomputeWindow(6),
    EditActivation(),
    EditActivation("mean", ratio=50, layers=[1]),
    EditActivation([1.5, -2.0], positions=0, dims=[3, 5], layers=1),
    EditActivation("shuffle", positions=0, dims=5, layers=1, seed=3),
    ScaleAttention([0, -1], 0.5, heads=[1]),
    BiasScores(0, -2),
    SelfOnly([10, 12]),
    ReplaceValue(0, by="donor", seed=4, layers=[1]),
    ZeroHead(heads=[1, 2], decoy=4),
    MeanHead(),
    ScaleOutput(10, 4),
    AmplifyVariance([10], 2.5, heads=[0]),
    QuantizeKV(2, keep=4, at=3, scheme="kivi", group=32, residual_length=8, rotated=False),
    ZeroNeuron(1, [3, 5], decoy=2),
    ss.MaskKeys(1) & ss.Window(5) & DropTokens(0),
]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_text_form(edit):
    assert str(parse(str(edit))) == str(edit)
    assert parse(str(edit)) == edit or "&" in str(edit)


def test_every_edit_has_a_text_form():
    assert {type(e) for e in EDITS} >= set(Intervention.registry.values())


def test_placebo_is_the_same_edit_elsewhere():
    for edit in EDITS[1:2] + EDITS[4:7] + EDITS[8:10]:
        for seed in range(20):
            other = edit.placebo(seed)
            assert type(other) is type(edit)
            assert other != edit
            assert other == edit.placebo(seed)
    assert ss.MaskKeys(0).placebo(3).keys[0] >= 4
    assert ss.SinkWindow(64, sinks=2).placebo(1).at >= 16
    with pytest.raises(ss.SinkscopeError, match="no sink position"):
        ss.Window(8).placebo()


def test_composition(tiny):
    """A mask under a window hides both; two windows make no sense."""
    model, both = tiny("llama"), ss.MaskKeys(20) & ss.Window(8)
    report = ss.evaluate(model, [IDS], [both, ss.Window(8)])
    ours, window = losses(report, both), losses(report, ss.Window(8))
    np.testing.assert_allclose(ours[:20], window[:20], atol=1e-6)
    assert np.abs(ours[20:28] - window[20:28]).max() > 1e-3
    split = ss.MaskKeys(20, heads=[0, 1]) & ss.MaskKeys(20, heads=[2, 3])
    report = ss.evaluate(model, [IDS], [split, ss.MaskKeys(20)])
    np.testing.assert_allclose(losses(report, split), losses(report, ss.MaskKeys(20)), atol=1e-6)
    with pytest.raises(ss.SinkscopeError, match="two windows"):
        ss.Window(8) & ss.SinkWindow(9)


BAD = [
    ("window(size=0)", "at least 1 more"),
    ("sink_window(size=4, sinks=4)", "at least 1 more"),
    ("windw(size=4)", "did you mean 'window'"),
    ("window(sise=4)", "sise"),
    ("window(size='a')", "takes|whole numbers"),
    ("mask_keys(keys=[])", "whole numbers"),
    ("mask_keys(keys=[99])", "positions are 0 to 47"),
    ("drop_tokens(positions=[48])", "positions are 0 to 47"),
    ("mask_keys(keys=[0], layers=[9])", "layers"),
    ("mask_keys(keys=[0], heads=[9])", "heads"),
    ("window(size=9) & mask_keys(keys=[0], layers=[9])", "layers"),
    ("window(size=9) & mask_keys(keys=[0], heads=[9])", "heads"),
    ("zero_value(keys=[0], heads=[4])", "the heads are 0 to 3"),
    ("scale_attention(keys=[0])", "factor=...\\): expected a finite number, at least 0, got None"),
    ("scale_attention(keys=[0], factor=-1)", "at least 0, got -1"),
    ("bias_scores(keys=[0], bias='inf')", "expected a finite number, got 'inf'"),
    ("replace_value(keys=[0], by='nothing')", "one of 'zero', 'mean', 'noise', 'shuffle', 'donor'"),
    ("quantize_kv(bits=0)", "bits is a whole number, 1 to 16"),
    ("quantize_kv(bits=2, scheme='int')", "one of 'per_token', 'kivi'"),
    ("zero_neuron(layer=1, neurons=[0], layers=[2])", "its layer stands first"),
    ("zero_neuron(layer=1, neurons=[-1])", "count from 0"),
    ("zero_head(decoy=1)", "there are no others"),
    ("self_only()", "takes layers, positions"),
    ("drop_tokens(positions=[0]) & mask_keys(keys=[47])", "positions are 0 to 46"),
    ("drop_tokens(positions=[0], layers=[1])", "has no layers"),
    ("replace_token(position=0, token=-4)", "not negative"),
    ("window(size=True)", "takes|whole numbers"),
    ("__import__('os').system('true')", "can't read"),
    ("window(**{'size': 3})", "can't read"),
    ("", "can't read"),
    ("edit_activation(to='none')", "or 'mean'"),
    ("edit_activation(to=[1, 2], positions=0, dims=[1, 2, 3], layers=0)", "are pairs"),
    ("edit_activation(to=0, positions=[0, 1], dims=[1, 2, 3], layers=0)", "are pairs"),
    ("edit_activation(to=0, positions=0)", "give layers, positions and dims"),
    ("edit_activation(to=0, positions=0, dims=99, layers=0)", "dimensions 0 to 31"),
    ("edit_activation(to=0, positions=99, dims=0, layers=0)", "positions are 0 to 47"),
    ("edit_activation(to=0, positions=-1, dims=0, layers=0)", "count from 0"),
    ("edit_activation(ratio=0.5)", "above 1"),
    ("edit_activation()", "no activation is at least 100 and 1000 times the median"),
]


@pytest.mark.parametrize(("text", "says"), BAD)
def test_bad_interventions(tiny, text, says):
    with pytest.raises(ss.SinkscopeError, match=says):
        ss.evaluate(tiny("llama"), [IDS], text)


@pytest.mark.parametrize("how", [{"score_from": 0}, {"score_from": 48}])
def test_bad_score_from(tiny, how):
    with pytest.raises(ss.SinkscopeError, match="1 to 47"):
        ss.evaluate(tiny("llama"), [IDS], ss.Window(8), **how)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma3", "mistral"])
def test_streaming_is_refused_where_it_is_not_defined(bridge_of, family):
    """Absolute positions, two rotations, a window of the layer's own: each with the reason."""
    says = "window of its own" if family == "mistral" else "needs rotary positions"
    with pytest.raises(ss.SinkscopeError, match=says):
        ss.evaluate(bridge_of(family), [IDS], StreamingWindow(8))


@pytest.mark.parametrize("make", [lambda: tiny_model("bert"), lambda: tiny_hf_model("gpt_neo")], ids=["encoder", "plain"])
def test_inert_is_an_error(make):
    model = make()
    with pytest.raises(ss.InertHookError, match="such as GPT-2"):
        ss.evaluate(model, [IDS], ss.Window(8))


def test_nothing_stays(bridge_of, monkeypatch):
    """Also when the middle of a forward pass fails or is interrupted."""
    model = bridge_of("llama")
    before = fingerprint(model)
    ss.evaluate(model, [IDS], [StreamingWindow(8), ss.MaskKeys(0)])
    assert fingerprint(model) == before
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(self, layer, queries, keys, heads, length, error=error):
            if layer == 2:
                raise error

        monkeypatch.setattr(ss.Window, "hides", fail)
        with pytest.raises(error):
            ss.evaluate(model, [IDS], ss.Window(8))
        assert fingerprint(model) == before


def test_saved_and_read_back(tiny, tmp_path):
    report = ss.evaluate(tiny("llama"), {"<b>": IDS}, [ss.Window(8), ss.MaskKeys(0)])
    report.save(tmp_path)
    again = ss.load_report(tmp_path)
    assert again.frame.equals(report.frame)
    assert again.about == report.about
    assert {"effects.csv", "effects.parquet", "summary.json", "loss.png", "report.html"} <= {
        p.name for p in tmp_path.iterdir()
    }
    header = (tmp_path / "effects.csv").read_text().splitlines()[0]
    assert header == "model,text,intervention,tokens,loss,perplexity,delta_loss,kl,std_error,sink_mass,sink_position"
    assert "<b>" not in (tmp_path / "report.html").read_text()
    assert "<table" in report._repr_html_()


def test_plain_hugging_face(tiny):
    ours = ss.evaluate(tiny_hf_model("llama"), [IDS], ss.Window(8))
    theirs = ss.evaluate(tiny("llama"), [IDS], ss.Window(8))
    np.testing.assert_allclose(ours.curves["loss"], theirs.curves["loss"], atol=1e-5)


def test_encoder_and_hooked_transformer_are_refused_by_name(tiny):
    assert "predicts no next token" in str(attempt(lambda: ss.evaluate(tiny("bert"), [IDS], ss.Window(8))))


# --- real weights -------------------------------------------------------------------------------------------------


# --- massive activations ------------------------------------------------------------------------------------------


def planted(where=5, dim=3, size=4000.0):
    """Give a tiny Llama whose token `where` gets a massive activation in the embedding."""
    model = tiny_hf_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[where, dim] = size
    return model


def by_hand(model, ids, layer, position, dim, value):
    """Loss by position when one activation after a layer is overwritten by a hook of torch's."""

    def overwrite(module, args, output):
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, position, dim] = value
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.model.layers[layer].register_forward_hook(overwrite)
    try:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").numpy()
    finally:
        handle.remove()


def test_a_planted_massive_activation_is_found_and_edited():
    model, ids = planted(), IDS.clone()
    ids[ids == 5], ids[17] = 6, 5
    found = EditActivation(ratio=500).located(model, ids)
    assert (found.layers, found.positions, found.dims) == ((0,), (17,), (3,))
    edits = [EditActivation(ratio=500), EditActivation(7.5, ratio=500), found.placebo(1)]
    report = ss.evaluate(model, [ids], edits)
    np.testing.assert_allclose(losses(report, edits[0]), by_hand(model, ids, 0, 17, 3, 0.0), atol=1e-5)
    np.testing.assert_allclose(losses(report, edits[1]), by_hand(model, ids, 0, 17, 3, 7.5), atol=1e-5)
    dim = edits[2].dims[0]
    assert dim != 3
    np.testing.assert_allclose(losses(report, edits[2]), by_hand(model, ids, 0, 17, dim, 0.0), atol=1e-5)
    assert report.about["located"]["text 0"][str(edits[0])] == str(found)


def test_the_mean_is_over_segments():
    """Each of the segments of 24 tokens, run on its own, has one; their mean replaces the first."""
    model, ids = planted(), IDS.clone()
    ids[ids == 5], ids[3], ids[30] = 6, 5, 5
    values = []
    for segment in (ids[:24], ids[24:]):
        seen = []
        handle = model.model.layers[0].register_forward_hook(
            lambda m, a, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            model(segment[None])
        handle.remove()
        column = seen[0].reshape(-1, 32)[:, 3]
        values.append(float(column[column.abs().argmax()]))
    edit = EditActivation("mean", ratio=500).located(model, ids)
    assert (edit.positions, edit.dims) == ((3, 30), (3, 3))
    assert edit.to == pytest.approx([np.mean(values)] * 2, rel=1e-5)


@pytest.mark.parametrize(("rows", "numbers", "cached"), [(128, 4 << 20, 64 * 3), (12, 0, 64), (1, 0, 1)])
def test_portions_of_logits_change_nothing(llama, monkeypatch, rows, numbers, cached):
    """Also where runs lack some of the tokens, which others have."""
    edits = [ss.MaskKeys(0), DropTokens([3, 7, 8]), ReplaceToken(5, 9), ss.Window(7)]
    whole = ss.evaluate(llama, [IDS], edits)
    for name, value in (("ROWS", rows), ("NUMBERS", numbers), ("CACHED", cached)):
        monkeypatch.setattr(scored, name, value)
    parts = ss.evaluate(llama, [IDS], edits)
    for ours, theirs in ((parts.frame, whole.frame), (parts.details, whole.details), (parts.curves, whole.curves)):
        pd.testing.assert_frame_equal(ours, theirs, atol=1e-6, rtol=0)


def test_an_output_layer_that_somebody_changed_is_called():
    """A plain one alone is multiplied by hand, in memory that is used again."""

    def halved(_module, _given, output):
        return output * 0.5

    ids = torch.randint(3, 60, (1, 24), generator=torch.Generator().manual_seed(0))
    for change in ("nothing", "a hook", "a forward of its own"):
        network = tiny_hf_model("llama")
        if change == "a hook":
            network.lm_head.register_forward_hook(halved)
        elif change != "nothing":
            own = network.lm_head.forward
            network.lm_head.forward = lambda hidden, own=own: own(hidden) * 0.5
        with torch.no_grad():
            logits = network(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        effect = ss.evaluate(network, ids, "mask_keys(keys=[0])", score_from=1)
        assert effect.summary().set_index("intervention").loc["none", "loss"] == pytest.approx(float(expected), abs=1e-5)
