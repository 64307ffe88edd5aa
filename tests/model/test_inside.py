"""The text model inside a vision-language or audio-language model, read with text alone: it is that model, in every way."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models import adapt, bridge
from sinkscope.testing import tiny_hf_model, tiny_tokenizer
from sinkscope.testing.architectures import tiny_architecture
from tests.model.compare import TL4

pytestmark = pytest.mark.skipif(not TL4, reason="these models are new in TransformerLens 4")
#: Larger model -> the text model alone, and where its weights are inside.
INSIDE = {
    "Gemma3ForConditionalGeneration": ("Gemma3ForCausalLM", "model.language_model."),
    "Qwen3_5ForConditionalGeneration": ("Qwen3_5ForCausalLM", "model.language_model."),
}
MORE = {
    "AudioFlamingo3ForConditionalGeneration": ("Qwen2ForCausalLM", "model.language_model."),
    "Emu3ForConditionalGeneration": ("Emu3ForCausalLM", "model.text_model."),
    "Gemma4ForConditionalGeneration": ("Gemma4ForCausalLM", "model.language_model."),
    "Idefics3ForConditionalGeneration": ("LlamaForCausalLM", "model.text_model."),
    "LlavaForConditionalGeneration": ("LlamaForCausalLM", "model.language_model."),
    "LlavaOnevisionForConditionalGeneration": ("Qwen2ForCausalLM", "model.language_model."),
    "Mistral3ForConditionalGeneration": ("MistralForCausalLM", "model.language_model."),
    "Qwen2AudioForConditionalGeneration": ("Qwen2ForCausalLM", "model.language_model."),
}
IDS = {
    f"text {i}": [1, *torch.randint(4, 60, (n - 1,), generator=torch.Generator().manual_seed(n))]
    for i, n in enumerate((9, 30))
}
EDITS = ["mask_keys(keys=[0])", "sink_window(size=8, sinks=2)", "edit_activation(to=4, layers=[1], positions=[0], dims=[3])"]
METRICS = ["sink_mass", "visible_sink_mass", "row_entropy", "received_profile", "layer_progression"]


def alone(larger: torch.nn.Module, name: str, place: str):
    """The text model by itself, with the very weights that it has inside."""
    import transformers

    text = getattr(transformers, name)(larger.config.get_text_config()).eval()
    weights = {f"model.{key.removeprefix(place)}": w for key, w in larger.state_dict().items() if key.startswith(place)}
    weights["lm_head.weight"] = larger.lm_head.weight
    text.load_state_dict(weights)
    text.set_attn_implementation("eager")
    return text


def wrapped(name: str):
    return bridge(tiny_hf_model(name), tiny_tokenizer(), name)


def equal(got: ss.SinkReport, expected: ss.SinkReport) -> None:
    assert (got.about["causal"], got.about["layers"]) == (True, expected.about["layers"])
    assert (got.about["windows"], got.about["n_heads"]) == (expected.about["windows"], expected.about["n_heads"])
    axes = ["metric", "text", "layer", "head", "key"]
    mine, theirs = (report.frame.sort_values(axes) for report in (got, expected))
    assert mine[axes].reset_index(drop=True).equals(theirs[axes].reset_index(drop=True))
    for column in ("value", "null"):
        np.testing.assert_allclose(mine[column], theirs[column], atol=1e-5)


def check(name: str, inner: str, place: str) -> None:
    text = alone(tiny_hf_model(name), inner, place)
    expected, effect = ss.measure(text, IDS, METRICS), ss.evaluate(text, IDS, EDITS)
    plain, model = tiny_hf_model(name), wrapped(name)
    for report in (ss.measure(plain, IDS, METRICS), *(ss.measure(model, IDS, METRICS, engine=e) for e in ("auto", "hooks"))):
        equal(report, expected)
    theirs = effect.curves.sort_values(["text", "intervention", "position"])
    for one in (plain, model):
        mine = ss.evaluate(one, IDS, EDITS).curves.sort_values(["text", "intervention", "position"])
        np.testing.assert_allclose(mine["loss"], theirs["loss"], atol=1e-4)


@pytest.mark.parametrize("name", [*INSIDE, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_it_is_its_text_model(name):
    check(name, *(INSIDE | MORE)[name])


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "LlavaForConditionalGeneration"])
def test_an_edit_is_live_where_the_text_model_runs(name):
    model = wrapped(name)
    ids = torch.tensor([IDS["text 1"]])
    with torch.no_grad():
        before = model.original_model(input_ids=ids).logits
        with ss.MaskKeys(0).on(model):
            masked = model.original_model(input_ids=ids).logits
        with ss.interventions.EditActivation(40.0, positions=[0], dims=[3], layers=1).on(model):
            moved = model.original_model(input_ids=ids).logits
        torch.testing.assert_close(model.original_model(input_ids=ids).logits, before)
    assert (masked - before).abs().max() > 1e-3
    assert (moved - before).abs().max() > 1e-3


def test_layers_are_those_of_the_text_model_where_the_tower_has_as_many():
    import transformers

    config = tiny_architecture("LlavaForConditionalGeneration")
    config.vision_config.num_hidden_layers = 4
    model = adapt(transformers.LlavaForConditionalGeneration(config))
    tower = set(model.network.model.vision_tower.modules())
    assert not tower & set(model.blocks)
    assert len(model.blocks) == 4


#: Python tells of these as they happen, however they were called.
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
HEARD: list[str] = []


@pytest.fixture(scope="module")
def ears():
    """Hear of every process that is started and every connection that is opened; an audit hook stays for good."""
    sys.addaudithook(lambda event, _: HEARD.append(event) if event in STARTED else None)


@pytest.mark.parametrize("name", ["Gemma3ForConditionalGeneration", "Qwen3VLForConditionalGeneration"])
def test_no_process_is_started_and_no_connection_opened(name, ears, tmp_path):
    tiny_hf_model(name).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    HEARD.clear()
    for model in (wrapped(name), ss.load_model(tmp_path), tiny_hf_model(name)):
        ss.measure(model, IDS, ["sink_mass"])
        ss.evaluate(model, IDS, EDITS[:1])
    assert HEARD == []
    with pytest.raises(OSError, match="refused"), socket.socket() as s:
        s.connect(("127.0.0.1", 9))
    assert HEARD == ["socket.connect"]
