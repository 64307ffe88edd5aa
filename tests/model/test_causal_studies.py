"""Studies that edit: planted models on which the answer is known, numbers against `evaluate`, words on both sides."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import studies
from sinkscope.interventions import MaskKeys, QuantizeKV, ReplaceValue, ScaleAttention, SelfOnly, ZeroHead
from sinkscope.models import adapt, bridge
from sinkscope.studies import broadcast, dose, inactive, make, quantised, repeats, secondary
from sinkscope.studies.report import Estimate
from sinkscope.studies.seen import Seen, Within, projection
from sinkscope.testing import planted_sink, tiny_hf_model, tiny_tokenizer
from tests.model.compare import novel
from tests.model.test_studies import alpha, words

ROWS = [torch.randint(6, 60, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def begun(rows=ROWS):
    """The same texts with BOS in front."""
    return [torch.cat([torch.tensor([1]), row[1:]]) for row in rows]


# --- what is seen --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_seen_weights_are_eager_attention_and_change_nothing(tiny, family):
    """Against Hugging Face's own `output_attentions`, and what heads write against its output projection."""
    model, network, taken = tiny(family), tiny_hf_model(family), []
    adapter, inputs, given = adapt(model), [], []
    matrix = {"llama": lambda m: m.model.layers[1].self_attn.o_proj, "gpt2": lambda m: m.transformer.h[1].attn.c_proj}

    def keep(module, args, out):
        inputs.append(args[0][0])
        given.append(out[0])

    matrix[family](network).register_forward_hook(keep)
    seen = Seen(None, (0, 3), look=lambda layer, weights, outputs, values: taken.append((layer, weights, outputs)) or weights)
    plain = ss.evaluate(model, ROWS[:1], MaskKeys(5)).summary().set_index("intervention")
    watched = ss.evaluate(model, ROWS[:1], [seen.edit, Seen(MaskKeys(5)).edit]).summary().set_index("intervention")
    assert watched.loc[str(MaskKeys(5)), "loss"] == pytest.approx(plain.loc[str(MaskKeys(5)), "loss"], abs=1e-6)
    assert watched.loc["intervention()", "delta_loss"] == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        attentions = network(input_ids=ROWS[0][None], output_attentions=True).attentions
    (layers,) = seen.found(len(adapter.layers))
    for got, expected in zip(layers, attentions, strict=True):
        torch.testing.assert_close(got, expected[0][..., [0, 3]], atol=1e-5, rtol=1e-4)
    outputs = next(outputs for layer, _, outputs in taken if layer == 1)
    torch.testing.assert_close(outputs.transpose(0, 1).reshape(len(ROWS[0]), -1), inputs[0], atol=1e-5, rtol=1e-4)
    own = matrix[family](network)
    bias = 0 if own.bias is None else own.bias
    torch.testing.assert_close(projection(adapter, 1)(outputs).sum(0), given[0] - bias, atol=1e-4, rtol=1e-3)


def test_seen_under_an_edit():
    model = planted_sink(((2.0, 0.0),))
    seen = Seen(SelfOnly(6) & MaskKeys(0), (0, 6))
    ss.evaluate(model, begun(), seen.edit)
    for (layer,) in seen.found(1):
        assert layer.shape == (2, 40, 2)
        assert float(layer[:, 1:, 0].abs().max()) == 0
        torch.testing.assert_close(layer[0, 6:, 1], torch.tensor([1.0] + [1 / i for i in range(7, 40)]))


def test_within_is_the_chain_of_its_parts(tiny):
    """Heads of each layer of their own, as one edit and as a chain: of weights, values (another text's too) and outputs."""
    places = {0: [1, 3], 2: [0]}
    zero, donor = (partial(ReplaceValue, 0, by) for by in ("zero", "donor"))
    for edit in (partial(ScaleAttention, 0, 3.0), zero, donor, ZeroHead):
        chain = edit(layers=0, heads=[1, 3]) & edit(layers=2, heads=[0])
        both = ss.evaluate(tiny("llama"), ROWS, [Within(edit(), places, "within"), chain]).summary().set_index("intervention")
        assert both.loc["within", "kl"] == pytest.approx(both.loc[str(chain), "kl"], abs=1e-7)
        assert both.loc["within", "kl"] > 1e-5


# --- make-a-sink ---------------------------------------------------------------------------------------------------------


def test_no_sink_is_made_where_only_bos_can_be_one():
    """The planted heads look for BOS alone and write nothing: nothing makes another sink, and nothing is lost."""
    report = studies.make_a_sink(planted_sink(((4.0, 0.0, 0.0), (0.0, 0.0, 6.0))), begun(), positions=(5, 9))
    for case in (make.ALONE, make.VARIANCE, make.NORM, make.LATE):
        assert report.estimate(case, "sink_rate").value == 0
        assert report.estimate(case, "delta_loss").value == pytest.approx(0, abs=1e-6)
    per_k = [np.mean([np.mean([math.exp(c) / (math.exp(c) + i) for i in range(k + 1, 40)]) for k in (5, 9)]) for c in (4, 6)]
    none = np.mean([np.mean([1 / (1 + i) for i in range(k + 1, 40)]) for k in (5, 9)])
    assert report.estimate(make.UNEDITED, "to_first").value == pytest.approx((sum(per_k) + 4 * none) / 6, abs=1e-5)
    assert report.verdict.startswith("A token that sees itself alone becomes no sink (0.00 of the heads)")
    with pytest.raises(ss.SinkscopeError, match="those from 1 to 32"):
        studies.make_a_sink(planted_sink(((4.0,),)), begun(), positions=(35,))


def made(alone, variance, norm, late=(0.01, 0.0, 0.02)):
    gains = {make.ALONE: alone, make.VARIANCE: variance, make.NORM: norm, make.LATE: late}
    rows = {(case, "sink_rate_change"): Estimate(*gain) for case, gain in gains.items()}
    rows |= {(case, "sink_rate"): Estimate(gain[0] + 0.01) for case, gain in gains.items()}
    rows[make.UNEDITED, "sink_rate"] = Estimate(0.01)
    for name in ("to_token_change", "to_first_change", "to_others_change"):
        rows[make.ALONE, name] = Estimate(-0.2, -0.3, -0.1) if name == "to_first_change" else Estimate(0.0, -0.01, 0.01)
    return rows | {(case, "delta_loss"): Estimate(0.0, -0.1, 0.1) for case in gains}


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        (((0.3, 0.2, 0.4), (0.2, 0.1, 0.3), (0.0, -0.1, 0.1)), "so does one whose variance is amplified, and not one whose"),
        (((0.3, 0.2, 0.4), (0.2, 0.1, 0.3), (0.2, 0.1, 0.3)), "but a larger norm does it as well"),
        (((0.3, 0.2, 0.4), (0.0, -0.1, 0.1), (0.0, -0.1, 0.1)), "was not shown to make one"),
        (((0.3, -0.2, 0.8), (0.0, -0.1, 0.1), (0.2, 0.1, 0.3)), "the opposite of what was published"),
    ],
)
def test_words_of_make_a_sink(gains, expected):
    verdict, said = make._say("m", "of", 4.0, made(*gains))
    assert expected in verdict
    assert ("becomes a sink" in verdict) == (gains[0][1] > 0)
    assert ("the first token pays" in said) == (gains[0][1] > 0)
    verdict, _ = make._say("m", "of", 4.0, made(*gains, late=(0.5, 0.4, 0.6)))  # the placebo does as well
    assert "becomes no sink" in verdict


@pytest.mark.model
def test_smollm2_makes_a_sink(smollm2):
    text = {"a novel": novel(2000)}
    report = studies.make_a_sink(smollm2, text, positions=(10,), sequences=3, tokens=64)
    assert report.estimate(make.UNEDITED, "sink_rate").value < 0.02
    assert report.estimate(make.ALONE, "sink_rate").value > 0.2
    assert report.estimate(make.LATE, "sink_rate").value < 0.1
    assert report.estimate(make.ALONE, "to_first_change").high < 0


# --- dose-response -------------------------------------------------------------------------------------------------------


def test_a_dose_is_what_evaluate_says(tiny):
    report = studies.dose_response(tiny("llama"), ROWS, factors=(0, 1, 2))
    edits = [ScaleAttention(0, 2), ScaleAttention(0, 0, layers=[0])]
    effect = ss.evaluate(tiny("llama"), ROWS, edits).summary().set_index("intervention")
    for case, edit in zip(("all layers, x2", "first third, x0"), edits, strict=True):
        row = effect.loc[str(edit)]
        assert report.estimate(case, "delta_loss")[:3] == pytest.approx(row[["delta_loss", "low", "high"]].tolist(), abs=1e-5)
        assert report.estimate(case, "kl").value == pytest.approx(row["kl"], abs=1e-5)
    with torch.no_grad():
        logits = (
            torch.stack([tiny_hf_model("llama")(input_ids=row[None]).logits[0, :-1] for row in ROWS]).double().log_softmax(-1)
        )
    entropy = -(logits.exp() * logits).sum(-1).mean(1)
    clean = np.array([dose._numbers(one.float(), one.float(), row[1:]) for one, row in zip(logits, ROWS, strict=True)])
    np.testing.assert_allclose(clean[:, 2], entropy.numpy(), rtol=1e-5)
    with pytest.raises(ss.SinkscopeError, match="3 pieces"):
        studies.dose_response(tiny("llama"), ROWS[:3])


def test_no_dose_matters_where_heads_write_nothing():
    report = studies.dose_response(planted_sink(((2.0, 0.0, 1.0), (3.0, 0.0, 0.5))), begun(), factors=(0, 4))
    for quantity in dose.QUANTITIES:
        values = report.ours[report.ours["quantity"] == quantity]["value"]
        assert values.abs().max() == pytest.approx(0, abs=1e-5)
    assert report.verdict == "No weight of the first token was found to be better than the model's own."


def test_the_best_dose_is_judged_on_other_texts():
    """Chosen on texts 0 and 2, judged on 1 and 3: a factor that helps the former alone is seen to."""
    curve = {1.0: np.zeros((4, 3)), 2.0: np.array([[-1.0, 0, 5], [0.3, 0, 5], [-1.0, 0, 5], [0.5, 0, 5]])}
    chosen, judged, by_entropy, _ = dose._best("g", curve, "of")
    assert chosen[2].value == 2.0
    assert judged[2].value == pytest.approx(0.4)
    assert by_entropy[2].value == 1.0


def test_the_best_dose_says_what_single_texts_would_choose():
    alike = dose._best("g", {1.0: np.zeros((4, 3)), 2.0: np.full((4, 3), -1.0)}, "of")
    apart = dose._best("g", {1.0: np.zeros((4, 3)), 2.0: np.array([[-1.0] * 3, [0] * 3, [0.5] * 3, [0] * 3])}, "of")
    assert alike[0][2][:3] == (2.0, 2.0, 2.0)
    assert apart[0][2][:3] == (2.0, 1.0, 2.0)


def doses(factor, gain):
    rows = {}
    for group in ("all layers", dose.PLACEBO):
        for by in ("loss", "entropy"):
            rows[f"{group}, least {by}", "best_factor"] = Estimate(factor)
            rows[f"{group}, least {by}", "best_delta_loss"] = Estimate(*gain)
    return rows


def test_words_of_dose_response():
    for factor, gain, better in ((0.5, (-0.1, -0.2, -0.01), True), (0.5, (-0.1, -0.3, 0.1), False), (1.0, (0, 0, 0), False)):
        verdict, _ = dose._say("m", "of", ["all layers", dose.PLACEBO], doses(factor, gain))
        assert ("is better: all layers, times 0.5 (-0.1 nats)." in verdict) == better
    assert "No weight" in dose._say("m", "of", ["all layers", dose.PLACEBO], doses(2.0, (0.3, 0.2, 0.4)))[0]


# --- kv-quantisation -----------------------------------------------------------------------------------------------------


def test_rounding_is_what_evaluate_says(tiny):
    rows = [torch.cat([row, row[:10]]) for row in ROWS]
    report = studies.kv_quantisation(tiny("llama"), rows, bits=(2, 16), keep=(1,), schemes=("per_token",))
    edits = [QuantizeKV(2), QuantizeKV(2, 1)]
    effect = ss.evaluate(tiny("llama"), rows, edits)
    by_text = [effect.frame[(effect.frame["intervention"] == str(e)) & (effect.frame["text"] != "all")]["kl"] for e in edits]
    change = by_text[1].to_numpy() / by_text[0].to_numpy() - 1
    assert report.estimate("per_token, 2 bits, 1 kept", "kl_change")[:3] == pytest.approx(Estimate.of(change)[:3], abs=1e-6)
    assert report.estimate("per_token, 2 bits, 0 kept", "kl").value == pytest.approx(by_text[0].mean(), abs=1e-7)
    assert report.estimate("per_token, 16 bits, 0 kept", "kl").value < 1e-6
    assert report.estimate("per_token, 2 bits, 0 kept", "kl").value > 1e-3


def test_words_of_quantisation():
    def value(one, four, placebo):
        rows = {(quantised._name("kivi", 2, 0), name): Estimate(1.0, 0.5, 2.0) for name in ("kl", "delta_loss")}
        for k, gain in ((1, one), (4, four), (-1, placebo)):
            rows[quantised._name("kivi", 2, k), "kl_change"] = Estimate(*gain)
        return rows

    def say(*gains):
        return quantised._say("m", "of", [("kivi", 2)], [0, 1, 4], value(*gains))[0]

    none, some, much = (0.0, -0.1, 0.1), (-0.3, -0.4, -0.2), (-0.6, -0.7, -0.5)
    assert say(some, much, none) == "kivi, 2 bits: 1 kept takes away 30% of the KL, 4 take 60%."
    assert say(none, some, none) == "kivi, 2 bits: 4 kept take away 30% of the KL."
    for gains in ((none, none, none), (some, some, much), ((0.3, 0.2, 0.4), none, none)):
        assert say(*gains) == "kivi, 2 bits: keeping first tokens gains no more than later ones."


# --- planted neurons -----------------------------------------------------------------------------------------------------


def planted_neurons():
    """A GPT-2 whose attention writes nothing, and three of whose neurons write one direction: 7 of layer 0 and 3 of layer 1
    at BOS (2 and 1700 of it), 5 of layer 2 at token 5. So BOS grows most in layer 1, and token 5 is like it in layer 2."""
    network = tiny_hf_model("gpt2")
    width, blocks = network.config.n_embd, network.transformer.h
    bos, five, written = torch.zeros(3, width)
    bos[0], bos[1], five[2], five[3], written[4], written[5] = 9, -9, 9, -9, 1, -1
    with torch.no_grad():
        for vectors in (network.transformer.wte.weight, network.transformer.wpe.weight):
            vectors.mul_(0.1)[:, :6] = 0
        network.transformer.wte.weight[1], network.transformer.wte.weight[5] = bos, five
        for block in blocks:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.zero_()
                part.bias.zero_()
            for norm in (block.ln_1, block.ln_2):
                norm.weight.fill_(1.0)
                norm.bias.zero_()
        for layer, neuron, at, size in ((0, 7, bos, 1.0), (1, 3, bos, 1000.0), (2, 5, five, 1000.0)):
            mlp = blocks[layer].mlp
            mlp.c_fc.weight[:, neuron], mlp.c_fc.bias[neuron] = at / 9, -6.0  # the token itself gives 8
            mlp.c_proj.weight[neuron] = written * size
    return bridge(network, tiny_tokenizer("gpt2"), "planted-neurons")


def with_five(at):
    rows = [row.clone() for row in begun()]
    for row, place in zip(rows, at, strict=True):
        row[place] = 5
    return rows


def test_a_planted_secondary_sink_is_found_and_its_mlp(monkeypatch):
    monkeypatch.setattr(secondary, "QUERIES", 2)
    report = studies.secondary_sinks(planted_neurons(), with_five((7, 9, 20, 30)), tokens=40)
    assert report.estimate(secondary.SECONDARY, "positions_per_text").value == 1
    assert report.estimate(secondary.AS_FIRST, "positions_per_text").value == 0
    assert report.estimate(secondary.SECONDARY, "birth").value == pytest.approx(2 / 3)
    assert report.estimate(secondary.SECONDARY, "lifetime").value == pytest.approx(1 / 3)
    assert report.estimate(secondary.SILENT, "lifetime_left").value == 0
    assert report.estimate(secondary.PLACEBO, "lifetime_left").value == 1
    assert "the MLP of the layer of birth makes them" in report.verdict
    assert report.table[report.table["model"] == "Qwen3-4B-base"]["value"].tolist() == [0.7, 0.444, 0.5]
    nothing = studies.secondary_sinks(planted_neurons(), begun(), tokens=40)
    assert nothing.verdict.startswith("No secondary sink")
    with pytest.raises(ss.SinkscopeError, match="is an encoder"):
        studies.secondary_sinks(ss.testing.tiny_model("bert"), ROWS)


def test_lifetimes_by_hand():
    (text,) = ss.tokenize(None, [[1, 6, 7, 8]]).sequences
    cosine = np.array([[1, 0.1, 0.95, -0.95], [1, 0.2, 0.95, -0.95], [1, 0.95, 0.95, -0.99], [1, 0, 0.0, 0.99]])
    found = secondary.sinks_of(text, cosine, cosine, np.eye(4), np.array([True, True, True, False]))
    assert [(s.position, s.birth, s.life, s.kind) for s in found] == [
        (1, 2, 1, secondary.SECONDARY),
        (2, 0, 3, secondary.AS_FIRST),
        (3, 0, 3, secondary.AS_FIRST),
    ]


def test_words_of_secondary_sinks():
    sink = secondary.Sink("t", 7, " the", 2, 5, secondary.SECONDARY, 0.1, 0.01)

    def say(gone, placebo, got):
        counts = (secondary.SECONDARY, secondary.AS_FIRST, secondary.BRIEF, secondary.PUBLISHED)
        rows = {(kind, "positions_per_text"): Estimate(1.0, 0.5, 2.0) for kind in counts}
        rows |= {(secondary.SECONDARY, name): Estimate(0.2, 0.1, 0.3) for name in ("birth", "lifetime")}
        rows |= {(secondary.SECONDARY, "received"): got, ("the token after it", "received"): Estimate(0.02, 0.01, 0.03)}
        rows |= {(secondary.SILENT, "lifetime_left"): gone, (secondary.PLACEBO, "lifetime_left"): placebo}
        rows["the most similar later token", "cosine"] = Estimate(0.98, 0.97, 0.99)
        return secondary._say("m", "of", [sink], rows)[0]

    gone, left, high, low = (
        Estimate(0.1, 0.0, 0.2),
        Estimate(0.9, 0.8, 1.0),
        Estimate(0.1, 0.05, 0.2),
        Estimate(0.0, 0.0, 0.001),
    )
    assert say(gone, left, high).endswith(
        "the MLP of the layer of birth makes them, and they receive more than the token after."
    )
    assert "no single MLP was shown" in say(left, left, high)
    assert "no single MLP was shown" in say(gone, gone, high)  # the placebo does as well
    assert say(gone, left, low).endswith("they receive no more than the token after.")


def test_planted_sink_neurons_are_found_and_hold_the_first_token():
    report = studies.repeated_token(planted_neurons(), begun(), repeats=20)
    assert report.about["sink_layer"] == 1
    assert 3 in report.about["sink_neurons"]
    assert report.estimate(repeats.ZEROED, "first_norm").high < 0.1
    assert report.estimate(repeats.PLACEBO, "first_norm").value == pytest.approx(1, abs=1e-3)
    assert not report.verdict.startswith("Late repeats come to look")
    assert report.estimate(repeats.REPEATS, "like_first").value == 0
    assert "its norm hangs on 2 neurons" in report.verdict


def test_words_of_repeated_token():
    def say(like, own, plain=(0.2, 0.1, 0.3)):
        cases = (repeats.REPEATS, repeats.NATURAL, repeats.WITHOUT, repeats.ZEROED, repeats.PLACEBO)
        rows = {(case, "norm_ratio"): Estimate(0.5, 0.4, 0.6) for case in cases}
        rows[repeats.REPEATS, "like_first"] = Estimate(0.5, 0.1, 0.9)
        rows |= {(repeats.REPEATS, "cosine"): Estimate(*like), (repeats.NATURAL, "cosine"): Estimate(*plain)}
        rows |= {(repeats.ZEROED, "first_norm"): Estimate(*own), (repeats.PLACEBO, "first_norm"): Estimate(1.0, 0.99, 1.01)}
        return repeats._say("m", "of", 1, (3, 5), rows)[0]

    assert say((0.97, 0.95, 0.99), (0.1, 0.0, 0.2)).startswith("Late repeats come to look like the first token (cosine 0.97")
    assert "but not to look like it" in say((0.6, 0.5, 0.7), (0.1, 0.0, 0.2))
    for like in ((0.2, 0.1, 0.3), (-0.5, -0.6, -0.4), (0.97, 0.2, 1.0)):
        assert "was not shown" in say(like, (0.1, 0.0, 0.2))
    for own in ((1.0, 0.99, 1.02), (1.5, 1.4, 1.6), (0.9, 0.7, 1.1)):
        assert "does not shrink it more than random ones" in say((0.97, 0.95, 0.99), own)


# --- planted values ------------------------------------------------------------------------------------------------------


def planted_values():
    """One layer: a head that sinks on BOS and finds no value there (NOP), one that finds a large one (broadcast), one
    without a sink, and one that writes nothing at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinkscope.testing.bridge", lambda network, *rest: network)
        network = planted_sink(((9.0, 9.0, 0.0, 9.0),))
    attention, width = network.transformer.h[0].attn, 32
    qkv, out = attention.c_attn.weight, attention.c_proj.weight
    with torch.no_grad():
        for head in range(3):
            qkv[2 + 8 * head : 10 + 8 * head, 2 * width + 8 * head : 2 * width + 8 * head + 8] = torch.eye(8)
        qkv[0, 2 * width + 8] = 5.0
        out.copy_(torch.eye(width))
    return bridge(network, tiny_tokenizer(), "planted-values")


def test_classes_of_planted_heads():
    report = studies.nop_broadcast(planted_values(), begun())
    assert report.estimate(broadcast.NOP, "heads").value == 0.5
    assert report.estimate(broadcast.BROADCAST, "heads").value == 0.25
    assert report.estimate(broadcast.BETWEEN, "heads").value == 0
    assert report.estimate(broadcast.NOP, "value_ratio").value == pytest.approx(0, abs=1e-6)
    assert report.estimate(broadcast.BROADCAST, "stable_rank").value < 1.1
    assert report.estimate("NOP, zero", "kl").value == pytest.approx(0, abs=1e-7)
    assert report.estimate("broadcast, zero", "kl").value > 1e-3
    assert report.estimate("broadcast, donor", "kl").value == pytest.approx(0, abs=1e-6)
    assert "the first token is the same in all texts" in report.said
    with pytest.raises(ss.SinkscopeError, match="one piece alone"):
        studies.nop_broadcast(planted_values(), begun()[:1])


def test_words_of_nop_broadcast():
    def say(zero, placebo=(0.0, -0.1, 0.1)):
        rows = {(k, "heads"): Estimate(0.25, 0.2, 0.3) for k in (broadcast.NOP, broadcast.BROADCAST, broadcast.BETWEEN)}
        rows |= {("NOP", name): Estimate(0.1, 0.05, 0.2) for name in ("value_ratio", "stable_rank")}
        rows |= {(f"NOP, {by}", "delta_loss"): Estimate(*zero) for by in broadcast.EDITS}
        rows["NOP, " + broadcast.PLACEBO, "delta_loss"] = Estimate(*placebo)
        return broadcast._say("m", "of", rows, [])[0]

    assert say((0.5, 0.4, 0.6)).endswith("the loss needs the sink's value in NOP.")
    for zero, placebo in (
        ((0.0, -0.1, 0.1), (0, -0.1, 0.1)),
        ((-0.5, -0.6, -0.4), (0, -0.1, 0.1)),
        ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6)),
    ):
        assert say(zero, placebo).endswith("the loss needs the value of none.")


# --- inactive-heads ------------------------------------------------------------------------------------------------------


def test_heads_that_write_nothing_are_found_and_cost_nothing():
    """The planted head whose output is zero: its norm finds it; its weight on the first token is that of two others."""
    model = planted_values()
    report = studies.inactive_heads(model, begun(), quantiles=(0.25,))
    for score in ("output norm", "output norm, projected", "mean value norm", "output norm" + inactive.LAYER):
        assert report.estimate(f"{score}, 25% of heads", "delta_loss").value == pytest.approx(0, abs=1e-6)
    scores = inactive._scores(model, adapt(model), adapt(model).tokenize(begun()))
    assert scores["output norm"].argmin() == 3
    assert scores["first-token weight"].argmax() == 2  # the one without a sink comes last
    mass = np.mean([math.exp(9) / (math.exp(9) + i) for i in range(40)])
    assert scores["first-token weight"][0].tolist() == pytest.approx([-mass, -mass, -alpha(0, 40), -mass], abs=1e-5)
    two = [inactive._zero(adapt(model), [0, 2], "two"), ZeroHead(layers=0, heads=[0, 2])]
    losses = ss.evaluate(model, begun(), two).summary().set_index("intervention")["delta_loss"]
    assert losses["two"] == pytest.approx(losses[str(two[1])], abs=1e-6)
    assert abs(losses["two"]) > 1e-3
    with pytest.raises(ss.SinkscopeError, match="3 pieces"):
        studies.inactive_heads(model, begun()[:3])


def test_scores_are_averages_of_norms(tiny):
    adapter = adapt(tiny("llama"))
    scores = inactive._scores(tiny("llama"), adapter, adapter.tokenize(ROWS[:2]))
    report = ss.measure(tiny("llama"), ROWS[:2], ["head_output_norm", "sink_mass", "row_entropy"]).frame
    rows = report[(report["text"] == "all") & report["head"].notna()]
    for score, metric in (
        ("output norm" + inactive.LAYER, "head_output_norm"),
        ("first-token weight", "sink_mass"),
        ("entropy", "row_entropy"),
    ):
        expected = rows[rows["metric"] == metric].pivot(index="layer", columns="head", values="value").to_numpy(float)
        np.testing.assert_allclose(scores[score] * inactive.SCORES[score.removesuffix(inactive.LAYER)], expected, rtol=1e-4)
    assert len(scores) == 15


def test_words_of_inactive_heads():
    def say(less):
        rows = {}
        for name in ("entropy", inactive.SINK, inactive.RANDOM):
            for q in (0.1, 0.2):
                rows[inactive._name(name, q), "delta_loss"] = Estimate(0.0 if name == "entropy" else 1.0)
                rows[inactive._name(name, q), "less_than_random"] = Estimate(*less)
        return inactive._say("m", "of", ["entropy", inactive.SINK], [0.1, 0.2], rows)[0]

    assert say((-0.5, -0.7, -0.3)).startswith("The heads that sink most are more dispensable than random ones (at 10%, 20%")
    assert say((0.5, 0.3, 0.7)).startswith("The heads that sink most cost more than random ones (at 10%, 20%")
    assert "was not shown; of 2 scores, entropy costs least at 10%." in say((-0.1, -0.5, 0.3))


# --- all -----------------------------------------------------------------------------------------------------------------


def test_all_goes_on_after_a_study_that_fails(tiny, tmp_path, monkeypatch):
    find = studies.find

    def fails(model, text):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("sinkscope.studies.everything.find", lambda name: fails if name == "bos" else find(name))
    page = studies.run_all(tiny("bert"), {"t": words(3000)}, tmp_path, only=["bos", "non-first"]).read_text()
    assert "it failed, a bug: ZeroDivisionError: a bug" in page
    assert (tmp_path / "non-first" / "study.html").is_file()
    assert not (tmp_path / "bos").exists()
