"""Models by their hub name, against Hugging Face's own `output_attentions`; needs the hub."""

import pytest
import torch

import sinkscope as ss
from tests.conftest import total
from tests.model.compare import TL4, attentions, check_all, reduced, same

pytestmark = pytest.mark.hub
TEXTS = {
    "pangram": "The quick brown fox jumps over the lazy dog.",
    "long": "When people look at attention maps, they often find that most of it goes to the first token. " * 6,
}


def reference(network, tokenizer, *, bos=(), causal=True):
    """Hugging Face's statistics of the texts, from a model that no bridge has touched."""
    ids = {label: [*bos, *tokenizer(text, add_special_tokens=not causal)["input_ids"]] for label, text in TEXTS.items()}
    return {label: reduced(attentions(network, one), causal=causal) for label, one in ids.items()}


@pytest.fixture(scope="module")
def gpt2_expected():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained("gpt2", attn_implementation="eager", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    return {bos: reference(network, tokenizer, bos=[tokenizer.bos_token_id] if bos else []) for bos in (True, False)}


@pytest.fixture(scope="module")
def gpt2():
    return ss.load_model("gpt2", device="cpu")


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("bos", [True, False])
def test_gpt2_is_hugging_faces(gpt2, gpt2_expected, bos, chunk):
    report = ss.measure(gpt2, TEXTS, bos=bos, chunk=chunk)
    assert report.about["model"] == "gpt2"
    check_all(report, gpt2_expected[bos], tol=5e-5)  # the bridge computes GPT-2's attention itself
    assert total(report, "sink_mass", "pangram") > 1.5 * total(report, "sink_mass", "pangram", "null")


@pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
def test_gpt2_on_hooked_transformer_is_the_same(gpt2, gpt2_expected):
    model = ss.load_model("gpt2", backend="hooked_transformer", device="cpu")
    report = ss.measure(model, TEXTS, bos=True)
    check_all(report, gpt2_expected[True], tol=5e-5)
    same(report, "long", ss.measure(gpt2, TEXTS, bos=True), "long", 5e-5)


def test_bert_is_hugging_faces():
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    name = "bert-base-uncased"
    network = AutoModelForMaskedLM.from_pretrained(name, attn_implementation="eager", dtype=torch.float32).eval()
    expected = reference(network, AutoTokenizer.from_pretrained(name), causal=False)
    model = ss.load_model(name, device="cpu")
    report = ss.measure(model, TEXTS)
    assert report.about["bos"].startswith("special tokens added")
    check_all(report, expected)
    by_name, by_place = (ss.measure(model, TEXTS, ["sink_mass"], key=key) for key in ("[SEP]", -1))
    assert by_name.summary()["value"].equals(by_place.summary()["value"])
