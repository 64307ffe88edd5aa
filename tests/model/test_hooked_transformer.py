"""HookedTransformer and HookedEncoder (TransformerLens 2 and 3), against Hugging Face's own attentions."""

import numpy as np
import pytest

import sinkscope as ss
from sinkscope.models import adapt, legacy
from sinkscope.models.legacy import convert
from sinkscope.models.versions import has_bridge
from sinkscope.testing import FAMILIES, tiny_hf_model, tiny_tokenizer
from tests.conftest import fingerprint, fresh, table
from tests.model import test_hooked_encoder_decoder as encoder_decoder
from tests.model.compare import IDS, TL4, check, check_all, novel, same, tiny_reference, windows_of
from tests.model.conftest import HuggingFace

pytestmark = pytest.mark.classes
on_39 = pytest.mark.skipif(TL4, reason="TransformerLens 4 has neither HookedTransformer nor HookedEncoder")
DECODERS = ["gpt2", "gpt_neox", "llama", "mistral", "bloom", "opt", "gptj", "qwen3", "phi3"]
#: gpt_neo: its MLP is taken for 4 times as wide; TransformerLens 2 converts phi, and of gpt_oss leaves the sinks out.
REFUSED = ["gemma2", "gpt_neo"]
DECODERS, REFUSED = (
    ([*DECODERS, "gpt_oss"], [*REFUSED, "phi"]) if has_bridge() else ([*DECODERS, "phi"], [*REFUSED, "gpt_oss"])
)


@pytest.mark.skipif(not TL4, reason="TransformerLens 3.9 has HookedTransformer")
def test_where_it_is_gone_the_error_names_the_version_that_has_it(saved_model):
    with pytest.raises(ss.SinkscopeError, match=r"needs transformer-lens 2\.16 to 3\.9; this is 4\."):
        ss.load_model(saved_model, backend="hooked_transformer")


@on_39
@pytest.mark.parametrize("chunk", [None, 5, 16])
@pytest.mark.parametrize("family", DECODERS)
def test_every_default_metric_is_hugging_faces(hooked, family, chunk):
    report = ss.measure(hooked(family), IDS, chunk=chunk)
    assert report.about["class"] == "HookedTransformer"
    assert report.about["arguments"]["chunk"] == chunk
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


@on_39
@pytest.mark.parametrize("key", [0, 3, -1])
def test_an_encoder_is_hugging_faces(hooked, key):
    report = ss.measure(hooked("bert"), IDS, key=key)
    assert report.about["class"] == "HookedEncoder"
    for label, ids in IDS.items():
        check(report, tiny_reference("bert", ids, key=key), label)
    with pytest.raises(ss.SinkscopeError, match="encoder"):
        ss.measure(hooked("bert"), IDS, chunk=5)


@on_39
@pytest.mark.parametrize("family", [*DECODERS, "bert"])
def test_a_text_is_the_same_in_a_padded_batch_and_alone(hooked, family):
    before = fingerprint(fresh(hooked(family)))
    together = ss.measure(hooked(family), IDS)
    for label, ids in IDS.items():
        same(together, label, ss.measure(hooked(family), [ids]), "text 0", 1e-6)
    assert fingerprint(hooked(family)) == before


@on_39
def test_windows(hooked):
    windows = dict(enumerate(windows_of("mistral")))
    assert adapt(hooked("mistral")).windows == windows
    assert adapt(hooked("llama")).windows == {}


@on_39
@pytest.mark.parametrize(("key", "name"), [(0, "[CLS]"), (-1, "[SEP]")])
def test_special_tokens_by_name(hooked, key, name):
    texts = {"a": "so it goes", "b": "attention, please", "c": "a sink"}
    by_place, by_name = (ss.measure(hooked("bert"), texts, key=k) for k in (key, name))
    for label, text in texts.items():
        ids = tiny_tokenizer("bert")(text)["input_ids"]
        for report in (by_place, by_name):
            check(report, tiny_reference("bert", ids, key=key), label)


@on_39
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_loading_by_directory(hooked, tmp_path, family):
    directory = tmp_path / f"tiny-{family}"
    tiny_hf_model(family).save_pretrained(directory)
    tiny_tokenizer(family).save_pretrained(directory)
    model = ss.load_model(directory, backend="hooked_transformer", device="cpu")
    assert adapt(model).name == f"tiny-{family}"
    same(ss.measure(model, IDS), "text 1", ss.measure(hooked(family), IDS), "text 1", 1e-7)


@on_39
@pytest.mark.parametrize("family", REFUSED)
def test_an_architecture_that_it_cannot_convert_is_named(family):
    network = tiny_hf_model(family)
    with pytest.raises(ss.SinkscopeError, match=rf"'tiny' \({FAMILIES[family].model}\).*backend='bridge'"):
        convert(network, tiny_tokenizer(family), "tiny")


@on_39
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_without_a_tokenizer_ids_can_be_measured(hooked, family):
    model = convert(tiny_hf_model(family), None, "tiny")
    same(ss.measure(model, IDS), "text 1", ss.measure(hooked(family), IDS), "text 1", 1e-7)


@pytest.mark.skipif(has_bridge(), reason="from TransformerLens 3 on it is T5: test_hooked_encoder_decoder.py")
def test_the_decoder_of_transformer_lens_2_is_no_t5s(monkeypatch):
    """It sees later tokens: refused as a whole, of one that somebody has the encoder is looked at."""
    network = encoder_decoder.network()
    with pytest.raises(ss.SinkscopeError, match=r"T5ForConditionalGeneration\): its output differs from Hugging Face's"):
        convert(network, tiny_tokenizer("t5"), "tiny")
    monkeypatch.setattr(legacy, "_proved", lambda model, *_: model)
    model = convert(network, tiny_tokenizer("t5"), "tiny")
    report = ss.measure(model, encoder_decoder.PAIRS, ["sink_mass", "row_entropy"], side="encoder")
    for label in encoder_decoder.PAIRS:
        a = encoder_decoder.expected("encoder", label)
        np.testing.assert_allclose(table(report, "sink_mass", label), a[..., 0].mean(-1), atol=1e-5)
        np.testing.assert_allclose(table(report, "row_entropy", label), encoder_decoder.entropy(a).mean(-1), atol=1e-5)
    for side in ("decoder", "cross"):
        with pytest.raises(ss.SinkscopeError, match=r"sees tokens that come later.*TransformerLens 3\.9"):
            ss.measure(model, encoder_decoder.PAIRS, "sink_mass", side=side)


# --- SmolLM2-135M, by its name ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_hooked():
    return ss.load_model("smollm2-135m", backend="hooked_transformer", device="cpu")


@pytest.fixture(scope="module")
def smollm2_expected(smollm2_gguf):
    """Ids of three texts of unequal length, and Hugging Face's statistics of each."""
    theirs = HuggingFace(smollm2_gguf)
    text = novel(256)
    ids = {f"{n} tokens": theirs.ids(text, n, bos=True) for n in (48, 64, 256)}
    expected = {label: theirs.reference(one) for label, one in ids.items()}
    theirs.free()
    return ids, expected


@on_39
@pytest.mark.model
@pytest.mark.parametrize("chunk", [None, 64])
def test_smollm2_is_hugging_faces(smollm2_hooked, smollm2_expected, chunk):
    ids, expected = smollm2_expected
    report = ss.measure(smollm2_hooked, ids, chunk=chunk)
    assert (report.about["model"], report.about["class"]) == ("smollm2-135m", "HookedTransformer")
    check_all(report, expected)


@on_39
@pytest.mark.model
def test_smollm2_takes_text_with_bos_first(smollm2_hooked, smollm2_expected):
    ids, _ = smollm2_expected
    report = ss.measure(smollm2_hooked, novel(256), ["sink_mass"], max_tokens=64)
    assert report.about["bos"].startswith("BOS '<|im_start|>' (id 1) stands first")
    by_ids = ss.measure(smollm2_hooked, [ids["64 tokens"]], ["sink_mass"])
    np.testing.assert_array_equal(table(report, "sink_mass"), table(by_ids, "sink_mass"))
