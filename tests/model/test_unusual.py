"""Models whose configuration, mask, head or hooks are unlike the families': right, or refused by name, never wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models import bridge
from sinkscope.testing import tiny_hf_model, tiny_model, tiny_tokenizer
from tests.conftest import table
from tests.model.compare import IDS, bert_asks, layers_of, losses, reduced

SIZES = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
GROUPED = {"num_key_value_heads": 2}
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
BIDIRECTIONAL = {"use_bidirectional_attention": True, "sliding_window": 8, "layer_types": TYPES, "head_dim": 8}


def build(name: str, **options):
    """Give a random model of a class, eager, with patterns far from uniform."""
    import transformers

    make = getattr(transformers, name)
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "attn_implementation": "eager"}
    model = make(make.config_class(**SIZES | special | {"architectures": [name], "max_position_embeddings": 128} | options))
    generator, width = torch.Generator().manual_seed(1), getattr(model.config.get_text_config(), "hidden_size", 32)
    spread = 0.3 * min(1, 32 / width) ** 0.5  # as far in a wide model: farther, float32 itself is 1e-5 off float64
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(spread * noise) if weight.ndim > 1 else weight.add_(0.1 * noise)
    return model.eval()


def wrapped(name: str, **options):
    return bridge(build(name, **options), tiny_tokenizer("bert" if "Bert" in name else "llama"), name)


def right(model, oracle, *, causal: bool) -> ss.SinkReport:
    """Measure, padded in batches of two, and compare with Hugging Face's attentions of each text alone."""
    report = ss.measure(model, IDS, ["sink_mass", "row_entropy", "received"], key=2, batch_size=2)
    assert report.about["causal"] is causal
    for label, ids in IDS.items():
        expected = reduced(layers_of(oracle, ids), key=2, causal=causal)
        for name in ("sink_mass", "row_entropy", "received"):
            np.testing.assert_allclose(table(report, name, label), expected[name], atol=1e-5, err_msg=f"{name} of {label}")
    return report


@pytest.mark.classes
@bert_asks
@pytest.mark.parametrize("make", [build, wrapped])
def test_a_decoder_of_an_encoders_class(make):
    report = right(make("BertLMHeadModel", is_decoder=True), build("BertLMHeadModel", is_decoder=True), causal=True)
    assert report.about["engine"] == "flash"


def test_a_decoder_whose_queries_see_both_ways():
    name = "Gemma3ForCausalLM"
    right(wrapped(name, **GROUPED, **BIDIRECTIONAL), build(name, **GROUPED, **BIDIRECTIONAL), causal=False)


@pytest.mark.parametrize("engine", ["auto", "flash"])
@pytest.mark.parametrize("make", [build, wrapped])
def test_windows_other_than_the_configuration_says(make, engine):
    model = make("MistralForCausalLM", **GROUPED, sliding_window=8)
    getattr(model, "original_model", model).config.layer_types = TYPES  # which Mistral does not look at
    says = "does not attend as its configuration says: layer 1 has a sliding window of 8, its configuration says None"
    with pytest.raises(ss.SinkscopeError, match=says):
        ss.measure(model, IDS, engine=engine)


def test_an_encoder_that_pads_change_is_refused():
    sizes = {"embedding_size": 16, "true_hidden_size": 16, "intra_bottleneck_size": 16}
    with pytest.raises(ss.SinkscopeError, match="the last hidden state differs by"):
        ss.measure(build("MobileBertForMaskedLM", **sizes), IDS)


def test_layers_that_mix_attention_with_a_state_space():
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 8, "head_dim": 8}
    name = "FalconH1ForCausalLM"
    right(build(name, **GROUPED, **sizes), build(name, **GROUPED, **sizes), causal=True)


@pytest.mark.parametrize("make", [build, wrapped])
@pytest.mark.parametrize(
    ("name", "options"),
    [("CohereForCausalLM", {"logit_scale": 0.25}), ("GraniteForCausalLM", {"logits_scaling": 4.0})],
)
def test_scaled_logits(make, name, options):
    (ids,) = [IDS["text 2"]]
    with torch.no_grad():
        logits = build(name, **GROUPED, **options)(torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    report = ss.evaluate(make(name, **GROUPED, **options), [ids], "mask_keys(keys=[0])")
    np.testing.assert_allclose(losses(report, "none"), expected, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_hf_model, tiny_model])
@pytest.mark.parametrize("name", ["BertLMHeadModel", "ModernBertDecoderForCausalLM", "RecurrentGemmaForCausalLM"])
def test_heads_that_are_more_than_an_output_layer(make, name):
    model, (ids,) = make(name), [IDS["text 2"]]
    with torch.no_grad():
        logits = tiny_hf_model(name)(torch.tensor([ids])).logits[0]
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    before = vars(getattr(model, "original_model", model).base_model).get("forward")
    report = ss.evaluate(model, [ids], "mask_keys(keys=[0])")
    np.testing.assert_allclose(losses(report, "none"), expected, atol=1e-5)
    assert vars(getattr(model, "original_model", model).base_model).get("forward") is before


def test_a_model_without_a_head_predicts_nothing():
    with pytest.raises(ss.SinkscopeError, match="LlamaModel has no language-model head"):
        ss.evaluate(build("LlamaModel", **GROUPED), IDS, "window(size=8)")


@pytest.mark.parametrize("edit", ["window(size=8)", "streaming_window(size=8, sinks=2)"])
@pytest.mark.parametrize("make", [build, wrapped])
def test_rotary_scaling_that_depends_on_the_length_does_not_stream(make, edit):
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    model = make("LlamaForCausalLM", **GROUPED, rope_parameters=rope, max_position_embeddings=24)
    with pytest.raises(ss.SinkscopeError, match="needs rotary positions of one plain kind"):
        ss.evaluate(model, [IDS["text 2"]], edit)


def test_blocks_that_give_lists():
    edit = "mask_keys(keys=[0])"
    report = ss.evaluate(
        wrapped("OpenAIGPTLMHeadModel"), [IDS["text 2"]], [edit, "edit_activation(layers=[1], positions=[0], dims=[3], to=0)"]
    )
    assert (report.frame.query("intervention != 'none'")["kl"] > 1e-6).all()


def test_transformer_lens_own_hooks_do_not_count_as_yours():
    model = wrapped("GraniteForCausalLM", **GROUPED)
    model(torch.tensor([IDS["text 0"]]))  # now they are there
    assert ss.measure(model, IDS, ["sink_mass"]).about["engine"] == "flash"
    seen: list[torch.Tensor] = []
    model.hook_dict["blocks.1.hook_attn_out"].add_hook(lambda value, hook: seen.append(value))
    assert ss.measure(model, IDS, ["sink_mass"]).about["engine"] == "hooks"
    assert seen


# --- sizes at the ends of what is sold ------------------------------------------------------------------------------------


def test_three_hundred_heads(tmp_path):
    name = "LlamaForCausalLM"
    many = {"num_attention_heads": 300, "num_key_value_heads": 100, "hidden_size": 300, "head_dim": 2}
    report = right(build(name, **many), build(name, **many), causal=True)
    assert report.frame["head"].max() == 299
    report.save(tmp_path)
    assert ss.load_report(tmp_path).frame.equals(report.frame)


def test_a_vocabulary_of_262144():
    name, many = "LlamaForCausalLM", {"vocab_size": 262_144, "hidden_size": 16, "num_hidden_layers": 2}
    model, oracle = build(name, **many), build(name, **many)
    ids = torch.tensor([1, 262_143, 5, 200_000, 77, 131_072, 9, 3, 100_000, 12])
    effect = ss.evaluate(model, [ids], [ss.MaskKeys(0)])
    loss = effect.summary().set_index("intervention")["loss"]
    with torch.no_grad():
        theirs = torch.nn.functional.cross_entropy(oracle(ids[None]).logits[0, :-1], ids[1:])
    assert loss["none"] == pytest.approx(float(theirs), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precision_throughout(dtype):
    model = build("LlamaForCausalLM", **GROUPED).to(dtype)
    before = build("LlamaForCausalLM", **GROUPED).to(dtype).double()  # the rounded weights, computed with exactly
    bound = {torch.float64: 1e-7, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    ids = IDS["text 1"]
    with torch.no_grad():
        out = before(input_ids=torch.tensor([ids]), output_attentions=True)
    expected = torch.stack([a[0, :, :, 0].mean(-1) for a in out.attentions])
    report = ss.measure(model, [ids], ["sink_mass"])
    np.testing.assert_allclose(table(report, "sink_mass"), expected, atol=bound)
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1], torch.tensor(ids[1:]))
    effect = ss.evaluate(model, [ids], [ss.MaskKeys(0)]).summary().set_index("intervention")["loss"]
    assert effect["none"] == pytest.approx(float(loss), abs=10 * bound)
