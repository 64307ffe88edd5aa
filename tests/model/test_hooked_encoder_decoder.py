"""HookedEncoderDecoder (TransformerLens 3): its three attentions, against Hugging Face's T5."""

import copy
import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models.versions import has_bridge
from sinkscope.testing import tiny_hf_model, tiny_tokenizer
from tests.conftest import fingerprint, table, total
from tests.model.compare import TL4
from tests.model.test_sides import METRICS, PAIRS, SIDES, entropy

pytestmark = [
    pytest.mark.classes,
    pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedEncoderDecoder"),
    pytest.mark.skipif(not has_bridge(), reason="the decoder of TransformerLens 2 is no T5's: a test of its own"),
]


@functools.cache
def network():
    """The tiny T5 with as many layers in its decoder as in its encoder: TransformerLens knows one number."""
    from transformers import T5ForConditionalGeneration

    whole = tiny_hf_model("t5")
    config = copy.deepcopy(whole.config)
    config.num_decoder_layers = config.num_layers
    smaller = T5ForConditionalGeneration(config).eval()
    kept = smaller.state_dict().keys()
    smaller.load_state_dict({name: weight for name, weight in whole.state_dict().items() if name in kept})
    return smaller


@functools.cache
def model():
    from sinkscope.models.legacy import convert

    return convert(network(), tiny_tokenizer("t5"), "tiny")


def expected(side, label):
    source, target = (torch.tensor([row]) for row in PAIRS[label])
    masks = {"attention_mask": torch.ones_like(source), "decoder_attention_mask": torch.ones_like(target)}
    with torch.no_grad():
        out = network()(input_ids=source, decoder_input_ids=target, output_attentions=True, **masks)
    name = {"decoder": "decoder_attentions", "encoder": "encoder_attentions", "cross": "cross_attentions"}[side]
    return torch.cat(getattr(out, name)).double().numpy()


@pytest.mark.parametrize("side", SIDES)
def test_every_side_is_hugging_faces(side):
    before = fingerprint(model())
    report = ss.measure(model(), PAIRS, METRICS, side=side)
    assert fingerprint(model()) == before
    assert (report.about["engine"], report.about["side"]) == ("hooks", side)
    assert report.about["class"] == "HookedEncoderDecoder"
    for label in PAIRS:
        a = expected(side, label)
        sees = np.tri(*a.shape[2:], dtype=bool) if side == "decoder" else np.ones(a.shape[2:], dtype=bool)
        chance = np.broadcast_to(sees / sees.sum(1, keepdims=True), a.shape)
        for of, column in ((a, "value"), (chance, "null")):
            found = {name: table(report, name, label, column) for name in METRICS[:5]}
            same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=f"{label} {column}")
            same(found["sink_mass"], of[..., 0].mean(-1))
            same(found["last_row_share"], of[..., -1, 0])
            same(found["row_entropy"], entropy(of).mean(-1))
            same(found["received_profile"], of.sum(2).mean(1) / sees.sum(0))


@pytest.mark.parametrize("side", SIDES)
def test_the_map_is_hugging_faces(side):
    shown = ss.attention_map(model(), PAIRS["text 0"], side=side, layer=1, head=2)
    a = expected(side, "text 0")[1, 2]
    np.testing.assert_allclose(shown["value"].to_numpy().reshape(a.shape), a, atol=1e-5)


def test_values_and_outputs_are_those_of_the_side():
    """Of cross-attention, values are the source's; the residual stream is the decoder's."""
    report = ss.measure(model(), PAIRS, ["value_drain", "residual_norm"], side="cross")
    plain = ss.measure(network(), PAIRS, ["value_drain"], side="cross")
    np.testing.assert_allclose(table(report, "value_drain", "text 2"), table(plain, "value_drain", "text 2"), rtol=1e-4)
    assert table(report, "residual_norm", "text 2").shape[0] == 2


def test_texts_are_read_as_of_hugging_faces_model():
    """Strings behind the start token; a source alone gets what is written greedily."""
    network().tokenizer = tiny_tokenizer("t5")
    for given in (("so it goes", "a fox"), "so it goes"):
        report, plain = (ss.measure(m, given, ["sink_mass"], side="cross", max_tokens=9) for m in (model(), network()))
        assert report.about["texts"][0]["queries"] == plain.about["texts"][0]["queries"]
        np.testing.assert_allclose(table(report, "sink_mass"), table(plain, "sink_mass"), atol=1e-5)


def test_some_queries_by_their_loss():
    hard = [ss.measure(m, PAIRS, "sink_mass", where=ss.where.next_loss(above=4.0)) for m in (model(), network())]
    np.testing.assert_allclose(*(table(report, "sink_mass", "text 0") for report in hard), atol=1e-5)


def test_nothing_said_is_the_decoder():
    one, other = (ss.measure(model(), PAIRS, "sink_mass", side=side) for side in (None, "decoder"))
    assert total(one, "sink_mass", "all") == total(other, "sink_mass", "all")


def test_what_is_not_covered_names_the_way_out():
    for use in (
        lambda: ss.evaluate(model(), PAIRS, [ss.MaskKeys(0)]),
        lambda: ss.evaluate(model(), PAIRS, [ss.MaskKeys(0)], side="cross"),
        lambda: ss.sweep(model(), PAIRS, "zero_head()"),
        lambda: ss.watch(model()),
        lambda: ss.MaskKeys(0).on(model()).__enter__(),
    ):
        with pytest.raises(
            ss.SinkscopeError, match=r"HookedEncoderDecoder is looked at by ss.measure.*T5ForConditionalGeneration"
        ):
            use()
    with pytest.raises(ss.SinkscopeError, match="token id 99"):
        ss.measure(model(), [([5, 6, 99], [1, 2, 3])], "sink_mass")
    with pytest.raises(ss.SinkscopeError, match=r"engine 'flash' can't run this.*computes attention itself"):
        ss.measure(model(), PAIRS, "sink_mass", engine="flash")


def test_a_decoder_that_sees_later_tokens_is_refused():
    """As that of TransformerLens 2."""
    changed = copy.deepcopy(model())
    for block in changed.decoder:
        block.attn._attention_dir_override = "bidirectional"
    with pytest.raises(ss.SinkscopeError, match="sees tokens that come later"):
        ss.measure(changed, PAIRS, "sink_mass")
    assert ss.measure(changed, PAIRS, "sink_mass", side="encoder").about["side"] == "encoder"
