"""Output gates and learned sinks of every family that has them, against what Hugging Face's own modules compute."""

import sys

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models.versions import class_of
from sinkscope.testing import tiny_model
from sinkscope.testing.architectures import ARCHITECTURES, tiny_architecture
from tests.conftest import table
from tests.model.compare import TL4, layers_of

pytestmark = pytest.mark.skipif(not TL4, reason="most of these models are newer than what TransformerLens 3.9 takes")
LOCAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
IDS = [1, *range(4, 24)]
#: A sigmoid for each number behind the queries; by itself; of stacks run several times; with a sink; a softplus for each
#: head; for each number; a sigmoid with a bias; for each head.
GATED = {
    "Qwen3NextForCausalLM": None,
    "AfmoeForCausalLM": None,
    "HrmTextForCausalLM": None,
    "HYV4ForCausalLM": {},
    "LagunaForCausalLM": LOCAL,
    "LagunaForCausalLM ": {**LOCAL, "gating": "per-element"},
    "BeamForCausalLM": LOCAL,
    "Lfm3ForCausalLM": {},
}
FAST = ("AfmoeForCausalLM", "HrmTextForCausalLM", "LagunaForCausalLM", "HYV4ForCausalLM")
SINKS = {
    "GptOssForCausalLM": None,
    "GraniteSWAForCausalLM": LOCAL,
    "GraniteMoeSWAForCausalLM": LOCAL,
    "MiMoV2FlashForCausalLM": LOCAL,
    "HYV4ForCausalLM": {},
    "FlintForCausalLM": {},
    "OpenAIPrivacyFilterForTokenClassification": {"sliding_window": 8},
}
SINKS_FAST = ("GraniteSWAForCausalLM", "MiMoV2FlashForCausalLM", "OpenAIPrivacyFilterForTokenClassification")


def cases(all_of, fast):
    return [pytest.param(n, o, id=n, marks=[] if n in fast else pytest.mark.slow) for n, o in all_of.items()]


def network(name, options=None):
    """A tiny random model whose gates, sinks and biases are no zeros."""
    name = name.strip()
    config = tiny_architecture(name, options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        made = class_of(name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for called, weight in made.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if called.endswith(("sinks", "gate_bias")):
                weight.copy_(noise)
            elif weight.ndim > 1:
                weight.copy_(0.3 * noise)
            else:
                weight.add_(0.1 * noise)
    return made.eval()


def seen(model, ids):
    """By call of Hugging Face's attention: its output, values and weights, and what the output projection is given."""
    home = sys.modules[type(model).__module__]
    own, calls = home.eager_attention_forward, []

    def attend(module, query, key, value, *args, **how):
        out, weights = own(module, query, key, value, *args, **how)
        values = value[0].repeat_interleave(query.shape[1] // value.shape[1], 0).double()
        calls.append({"z": out[0].transpose(0, 1).double(), "v": values, "weights": weights[0].double()})
        return out, weights

    for module in model.modules():
        if hasattr(module, "o_proj"):
            module.o_proj.register_forward_pre_hook(lambda _, args: calls[-1].update(written=args[0][0].double()))
    home.eager_attention_forward = attend
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    finally:
        home.eager_attention_forward = own
    for call in calls:
        heads, _, size = call["z"].shape
        call["written"] = call["written"].unflatten(-1, (heads, size)).transpose(0, 1)
    return calls


@pytest.mark.parametrize(("name", "options"), cases(GATED, FAST))
def test_gates_are_what_outputs_are_multiplied_by(name, options):
    report = ss.measure(network(name, options), [IDS], ["gate_mean", "gate_closed@0.5", "sink_output_share"])
    calls = seen(network(name, options), IDS)
    gates = [call["written"] / call["z"] for call in calls]
    expected = torch.stack([gate.mean((1, 2)) for gate in gates]).numpy()
    shares = [
        call["weights"][:, :, 0] * (gate * call["v"][:, :1]).norm(dim=-1) / call["written"].norm(dim=-1)
        for call, gate in zip(calls, gates, strict=True)
    ]
    layers = report.about["layers"]
    np.testing.assert_allclose(table(report, "gate_mean")[layers], expected, rtol=2e-4)
    np.testing.assert_array_equal(table(report, "gate_closed@0.5")[layers], expected < 0.5)
    found = table(report, "sink_output_share")[layers]
    np.testing.assert_allclose(found, torch.stack([s[:, 1:].mean(-1) for s in shares]).numpy(), rtol=2e-4)
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize("name", ["AfmoeForCausalLM", "HrmTextForCausalLM"])
def test_a_bridge_has_the_gates_of_the_model_inside(name):
    model = tiny_model(name)
    report = ss.measure(model, [IDS], ["gate_mean", "sink_mass", "sink_output_share"])
    same = ss.measure(ss.testing.tiny_hf_model(name), [IDS], ["gate_mean", "sink_mass", "sink_output_share"])
    for metric in ("gate_mean", "sink_mass", "sink_output_share"):
        np.testing.assert_allclose(table(report, metric), table(same, metric), atol=1e-6)


@pytest.mark.parametrize(("name", "options"), cases(SINKS, SINKS_FAST))
def test_a_learned_sink_takes_what_rows_lack(name, options):
    """What Granite returns as weights is before the sink takes its share, which then is in its output alone."""
    report = ss.measure(network(name, options), [IDS], ["row_deficit", "sink_mass"])
    for layer, call in enumerate(seen(network(name, options), IDS)):
        weights = call["weights"]
        plain = weights @ call["v"]
        weights = weights * (call["z"] * plain).sum(-1, keepdim=True) / (plain * plain).sum(-1, keepdim=True)
        np.testing.assert_allclose(weights @ call["v"], call["z"], atol=1e-5)
        found = {metric: table(report, metric)[layer] for metric in ("row_deficit", "sink_mass")}
        np.testing.assert_allclose(found["row_deficit"], 1 - weights.sum(-1).mean(-1), atol=1e-5)
        np.testing.assert_allclose(found["sink_mass"], weights[:, :, 0].mean(-1), atol=1e-5)
    assert table(report, "row_deficit").max() > 1e-3


WINDOWED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "local_attention": 8}


@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "OpenAIPrivacyFilterForTokenClassification"])
def test_an_encoder_with_windows_is_that_of_hugging_face(name):
    """Windows reach as far on both sides; of two texts of unequal length, one has pads; chance is over the keys in reach."""
    options = WINDOWED if name.startswith("Modern") else SINKS[name]
    texts = [IDS, IDS[:9]]
    metrics = ["sink_mass", "row_deficit", "visible_sink_mass"]
    report = ss.measure(network(name, options), texts, metrics, batch_size=2)
    for text, ids in enumerate(texts):
        weights = torch.stack(layers_of(network(name, options), ids)).numpy()
        one = f"text {text}"
        np.testing.assert_allclose(table(report, "sink_mass", one), weights[..., 0].mean(-1), atol=1e-5)
        np.testing.assert_allclose(table(report, "row_deficit", one), 1 - weights.sum(-1).mean(-1), atol=1e-5)
        seeing = weights[..., 0] > 0
        expected = weights[..., 0].sum(-1) / seeing.sum(-1)
        np.testing.assert_allclose(table(report, "visible_sink_mass", one), expected, atol=1e-5)
        fair = np.where(seeing, 1 / (weights > 0).sum(-1), 0)
        frame = report.frame.query("metric == 'visible_sink_mass' and text == @one")
        nulls = frame.groupby("layer")["null"].first().to_numpy()
        np.testing.assert_allclose(nulls, (fair.sum(-1) / seeing.sum(-1))[:, 0], atol=1e-6)


def test_stacks_that_are_run_several_times_are_layers_in_the_order_of_their_runs():
    name = "HrmTextForCausalLM"
    weights = torch.stack(layers_of(network(name), IDS)).numpy()
    report = ss.measure(network(name), [IDS], ["sink_mass", "received_profile"])
    assert len(weights) == 32 == report.about["n_layers"]
    np.testing.assert_allclose(table(report, "sink_mass"), weights[..., 0].mean(-1), atol=1e-5)
    for use in (
        lambda m: ss.evaluate(m, [IDS], [ss.MaskKeys(0)]),
        lambda m: ss.sweep(m, [IDS], ss.MaskKeys(0), over="layers"),
        lambda m: ss.MaskKeys(0).on(m).__enter__(),
        lambda m: ss.watch(m, ["sink_mass"]),
    ):
        for model in (network(name), tiny_model(name)):
            with pytest.raises(ss.SinkscopeError, match=r"run several times in a pass: ss\.measure"):
                use(model)


def test_keys_that_an_indexer_chooses_are_all_keys_of_a_short_text():
    """On a plain model as on a bridge; a longer text is refused."""
    name = "GlmMoeDsaForCausalLM"
    report = ss.measure(network(name), [IDS], ["sink_mass"])
    weights = torch.stack(layers_of(network(name), IDS)).numpy()
    np.testing.assert_allclose(table(report, "sink_mass"), weights[..., 0].mean(-1), atol=1e-5)
    assert report.about["engine"] == "flash"
    with pytest.raises(ss.SinkscopeError, match="max_tokens=32"):
        ss.measure(network(name), [[1, *range(4, 44)]], ["sink_mass"])


COMPRESSED = {
    **ARCHITECTURES["DeepseekV4ForCausalLM"],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 10},
    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"] * 2,
    "num_hidden_layers": 6,
    "index_topk": 1,
}


def test_tokens_are_told_from_keys_that_stand_for_several():
    """Columns of tokens come first; of others more than the indexer chooses, some, or none are there."""
    name, metrics = "DeepseekV4ForCausalLM", ["sink_mass", "row_deficit", "row_entropy", "received", "visible_sink_mass"]
    texts = [[1, *range(4, 44)], [1, *range(4, 33)], [1, 5, 6]]
    report = ss.measure(network(name, COMPRESSED), texts, metrics, batch_size=2)
    by_layer = []
    for text, ids in enumerate(texts):
        n, one = len(ids), f"text {text}"
        for layer, weights in enumerate(layers_of(network(name, COMPRESSED), ids)):
            tokens, seen_there = weights[..., :n], weights[0] > 0
            fair = torch.where(seen_there[:, 0], 1 / seen_there.sum(-1), 0)
            expected = {
                "sink_mass": tokens[..., 0].mean(-1),
                "row_deficit": 1 - tokens.sum(-1).mean(-1),
                "row_entropy": torch.special.entr(tokens).sum(-1).mean(-1),
                "received": tokens[..., 0].mean(-1),
                "visible_sink_mass": tokens[..., 0].sum(-1) / seen_there[:, 0].sum(),
            }
            for metric, numbers in expected.items():
                np.testing.assert_allclose(table(report, metric, one)[layer], numbers, atol=1e-5, err_msg=metric)
            null = table(report, "visible_sink_mass", one, "null")[layer, 0]
            np.testing.assert_allclose(null, float(fair.sum() / seen_there[:, 0].sum()), atol=1e-6)
            by_layer.append(weights.shape[-1] - n)
    assert by_layer[:6] == [4, 10, 0] * 2
    assert by_layer[-6:] == [0] * 6


def test_an_output_counts_keys_that_stand_for_several():
    model, ids = network("DeepseekV4ForCausalLM", COMPRESSED), [1, *range(4, 44)]
    home = sys.modules[type(model).__module__]
    own, norms = home.eager_attention_forward, []

    def attend(*args, **how):
        out, weights = own(*args, **how)
        norms.append(weights[0, :, 1:, 0] * args[3][0, 0, 0].norm() / out[0, 1:].transpose(0, 1).norm(dim=-1))
        return out, weights

    home.eager_attention_forward = attend
    try:
        model(input_ids=torch.tensor([ids]))
    finally:
        home.eager_attention_forward = own
    report = ss.measure(model, [ids], ["sink_output_share"])
    expected = torch.stack(norms).detach().mean(-1).numpy()
    np.testing.assert_allclose(table(report, "sink_output_share"), expected, rtol=2e-4)


@pytest.mark.parametrize("make", [network, tiny_model])
def test_edits_of_keys_that_are_no_tokens_are_refused(make):
    for use in (
        lambda m: ss.evaluate(m, [IDS], [ss.MaskKeys(0)]),
        lambda m: ss.sweep(m, [IDS], ss.MaskKeys(0), over="layers"),
        lambda m: ss.MaskKeys(0).on(m).__enter__(),
        lambda m: ss.watch(m, ["sink_mass"]).__enter__(),
    ):
        with pytest.raises(ss.SinkscopeError, match=r"stand for several at once.*ss\.measure, ss\.attention_map and"):
            use(make("DeepseekV4ForCausalLM"))


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "LlamaForSequenceClassification"])
def test_heads_that_classify_are_measured_and_predict_no_token(name):
    weights = torch.stack(layers_of(network(name, {}), IDS)).numpy()
    report = ss.measure(network(name, {}), [IDS], ["sink_mass"])
    np.testing.assert_allclose(table(report, "sink_mass"), weights[..., 0].mean(-1), atol=1e-5)
    for use in (ss.evaluate, lambda model, texts, edits: ss.sweep(model, texts, edits[0], over="layers")):
        with pytest.raises(ss.SinkscopeError, match=r"predicts no (next )?token.*(AutoModelForCausalLM|ss\.load_model)"):
            use(network(name, {}), [IDS], [ss.MaskKeys(0)])


def test_watch_sees_the_windows_of_an_encoder():
    model = network("ModernBertForMaskedLM", WINDOWED)
    with ss.watch(model, ["sink_mass", "visible_sink_mass"]) as seen_there:
        model(input_ids=torch.tensor([IDS]))
    found, report = seen_there.report(), ss.measure(model, [IDS], ["sink_mass", "visible_sink_mass"])
    for metric in ("sink_mass", "visible_sink_mass"):
        same = table(report, metric)
        np.testing.assert_allclose(table(found, metric, found.frame["text"].iloc[-1]), same, atol=1e-6)
