"""`edit.on(model, side=...)`: anybody's code runs an encoder-decoder, edited in its encoder, its decoder or between them.

Logits against Hugging Face's eager attention, edited by hand; generation against a loop of forward passes without a cache.
"""

import functools

import numpy as np
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.interventions import EditActivation, ReplaceToken
from sinkscope.interventions.base import parse
from sinkscope.testing import tiny_hf_model, tiny_inputs
from tests.conftest import fingerprint, most_slow
from tests.model.test_edits_of_sides import Hand, alone, by_hand
from tests.model.test_whisper import model as whisper

SIDES = ["encoder", "cross", "decoder"]
FAMILIES = ["t5", "bart", "marian", "whisper", "pegasus", "t5gemma", "mbart"]
FAST = ("t5", "bart", "whisper")
SOURCE = torch.tensor([[5, 6, 7, 8, 9, 10, 1], [11, 12, 13, 9, 22, 5, 1]])
TARGET = torch.tensor([[2, 7, 9, 20, 31, 4], [2, 17, 29, 6, 3, 8]])


def given(family):
    """The sources of a model, by the names that it takes them by."""
    return {"input_features": tiny_inputs(family, 2)["input_features"]} if family == "whisper" else {"input_ids": SOURCE}


@functools.cache
def model(family, copy=0):
    """A tiny model with a head, that generates: transformers' own caches have as many layers as the encoder (T5)."""
    found = whisper.__wrapped__() if family == "whisper" else tiny_hf_model(family)
    if family == "t5":
        found.config.num_layers = found.config.num_decoder_layers = 2
        torch.manual_seed(1)
        found = type(found)(found.config).eval()
    return found


def logits(network, family, target=TARGET, **more):
    with torch.no_grad():
        return network(**given(family), decoder_input_ids=target, **more).logits


def same(ours, theirs, what=""):
    np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-5, rtol=1e-5, err_msg=what)


def causal(change):
    """Edit the scores of the first key, but that of the first query."""

    def edit(scores):
        scores[..., 1:, 0] = change(scores[..., 1:, 0])
        return scores

    return edit


def narrow(scores):
    """Keep the two latest keys."""
    gap = torch.arange(scores.shape[-2])[:, None] - torch.arange(scores.shape[-1])
    return scores.masked_fill(gap >= 2, -torch.inf)


def edits_of(side, heads):
    """Text form -> the same by hand, of what can be made live."""
    if side == "decoder":
        return {
            "mask_keys(keys=[0])": Hand(scores=causal(lambda s: torch.full_like(s, -torch.inf))),
            "window(size=2)": Hand(scores=narrow),
            "self_only(positions=[3], layers=[1])": Hand((1,), scores=alone(3)),
        }
    found = by_hand(side)
    if side == "cross":
        del found["mean_head(heads=[1])"]  # over target tokens that are yet to come
    return {name: hand for name, hand in found.items() if "heads=[2]" not in name or heads > 2}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(FAMILIES, *FAST))
def test_logits_are_those_of_attention_edited_by_hand(family, side):
    """Nothing stays, an exception in between included."""
    ours, theirs = model(family), model(family, copy=1)
    plain, before = logits(theirs, family), fingerprint(ours)
    heads = 2 if family == "whisper" else 4
    for text, hand in edits_of(side, heads).items():
        with hand.on(theirs, side):
            expected = logits(theirs, family)
        with parse(text).on(ours, side=side) as found:
            assert found is ours
            same(logits(ours, family), expected, text)
        undone = family == "t5gemma" and text.startswith("scale_output")  # by the norm behind its output projection
        assert undone or float((expected - plain).abs().max()) > 1e-4, f"{text} changes nothing that could be seen"
        with pytest.raises(KeyboardInterrupt), parse(text).on(ours, side=side):
            raise KeyboardInterrupt
    assert fingerprint(ours) == before
    assert torch.equal(logits(ours, family), plain)


GENERATED = {
    "encoder": ["mask_keys(keys=[0])", "zero_value(keys=[-1])", "zero_neuron(layer=1, neurons=[0, 5])"],
    "cross": ["zero_attention(keys=[-1])", "scale_attention(keys=[1], factor=4)"],
    "decoder": [
        "sink_window(size=3, sinks=1)",
        "mask_keys(keys=[0])",
        "quantize_kv(bits=2)",
        "replace_token(position=0, token=9)",
    ],
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(FAMILIES, *FAST))
def test_generation_is_a_loop_of_forward_passes(family, side):
    """With a cache that grows, greedily: every logit is that of a forward pass over what came before, without a cache."""
    network = model(family)
    plain = logits(network, family)
    for text in GENERATED[side]:
        with parse(text).on(network, side=side):
            assert float((logits(network, family) - plain).abs().max()) > 1e-4
            how = {"do_sample": False, "num_beams": 1, "output_logits": True, "return_dict_in_generate": True}
            generate = functools.partial(transformers.GenerationMixin.generate, network)  # Whisper's own makes prompts
            out = generate(**given(family), max_new_tokens=8, min_new_tokens=8, **how)
            written = out.sequences[:, :1]
            for step in out.logits:
                # T5Gemma would take the id 0 for a pad where no mask is given.
                seen = {"use_cache": False, "decoder_attention_mask": torch.ones_like(written)}
                same(step, logits(network, family, written, **seen)[:, -1], text)
                written = torch.cat([written, out.sequences[:, [written.shape[1]]]], 1)


def test_whispers_own_generate():
    network, sound = model("whisper"), given("whisper")
    with ss.MaskKeys(0).on(network, side="cross"), torch.no_grad():
        out = network.generate(**sound, max_new_tokens=8, return_dict_in_generate=True, output_logits=True)
        again = logits(network, "whisper", out.sequences)
    same(torch.stack(out.logits, 1), again[:, -1 - len(out.logits) : -1])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_bridge_is_edited_alike(tiny, family, side):
    """By its own forward pass, and its own way to generate."""
    bridge, plain = tiny(family), tiny_hf_model(family)
    before, unedited = fingerprint(bridge), bridge(SOURCE, decoder_input=TARGET)
    for edit in (ss.MaskKeys(0), parse("zero_head(layers=[0], heads=[2])")):
        with edit.on(plain, side=side):
            expected = logits(plain, family)
        with edit.on(bridge, side=side), torch.no_grad():
            same(bridge(SOURCE, decoder_input=TARGET), expected)
    assert fingerprint(bridge) == before
    assert torch.equal(bridge(SOURCE, decoder_input=TARGET), unedited)
    with edit.on(bridge, side=side), torch.no_grad():
        made = bridge.generate(SOURCE, max_new_tokens=6, do_sample=False, verbose=False)
        again = bridge(SOURCE, decoder_input=made)[:, :-1].argmax(-1)
    ours, told = made[:, 1:], made[:, 1:-1] != made[:, 1:-1] + (made[:, 1:-1] == 2)  # what comes before the end
    assert torch.equal(ours[:, :-1][told], again[:, :-1][told])


@pytest.mark.parametrize("side", SIDES)
def test_a_swapped_token_is_that_of_its_side(side):
    """Also where encoder and decoder share their embedding."""
    network, edit = model("t5"), ReplaceToken(1, 9)
    if side == "cross":
        with pytest.raises(ss.SinkscopeError, match="side='encoder' edits the source"), edit.on(network, side=side):
            pass
        return
    network.set_input_embeddings(network.get_input_embeddings())  # one module for both, as after a resizing
    source, target = SOURCE.clone(), TARGET.clone()
    (source if side == "encoder" else target)[:, 1] = 9
    with torch.no_grad():
        expected = network(input_ids=source, decoder_input_ids=target).logits
        with edit.on(network, side=side):
            assert torch.equal(logits(network, "t5"), expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_behind_the_encoders_attention(family):
    """Its residual stream, also after a decoder's cache has grown."""
    network = model(family)
    layers = network.get_encoder().block if family == "t5" else network.get_encoder().layers

    def put(module, args, output):
        (output[0] if isinstance(output, tuple) else output)[:, 1, 3] = 2.0

    hook = layers[0].register_forward_hook(put)
    expected = logits(network, family)
    hook.remove()
    with EditActivation(2.0, layers=[0], positions=[1], dims=[3]).on(network, side="encoder"), torch.no_grad():
        network.generate(SOURCE, max_new_tokens=4)
        same(logits(network, family), expected)


def test_an_activation_is_located_on_its_side():
    network, pair = model("bart"), (SOURCE[0].tolist(), TARGET[0].tolist())
    edit = EditActivation("shuffle", layers=[0], positions=[1], dims=[3])
    found = edit.located(network, pair, side="encoder")
    located = ss.evaluate(network, pair, edit, side="encoder").about["located"]
    assert str(found) in str(located)
    with pytest.raises(ss.SinkscopeError, match="not located"), edit.on(network, side="encoder"):
        pass
    with found.on(network, side="encoder"):
        logits(network, "bart")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_pads_behind_a_source_change_nothing(family, side):
    network, short = model(family), SOURCE[:1, :4]
    both, mask = SOURCE.clone(), torch.ones_like(SOURCE)
    both[0, 4:] = mask[0, 4:] = 0
    for edit in (ss.MaskKeys([0, 2]), parse("zero_attention(keys=[1])"), parse("scale_attention(keys=[1], factor=4)")):
        with edit.on(network, side=side), torch.no_grad():
            one = network(input_ids=short, decoder_input_ids=TARGET[:1]).logits
            two = network(input_ids=SOURCE[1:], decoder_input_ids=TARGET[1:]).logits
            same(network(input_ids=both, attention_mask=mask, decoder_input_ids=TARGET).logits, torch.cat([one, two]))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["bart", "t5"])
def test_gradients_flow(family, side):
    """A bias of nothing is no edit: its gradients are the model's own; those of another differ. T5's positions have some."""
    network = model(family)

    def gradient(edit):
        network.zero_grad()
        with edit.on(network, side=side):
            network(input_ids=SOURCE, decoder_input_ids=TARGET).logits.square().mean().backward()
        return network.get_input_embeddings().weight.grad.clone()

    network.zero_grad()
    network(input_ids=SOURCE, decoder_input_ids=TARGET).logits.square().mean().backward()
    own = network.get_input_embeddings().weight.grad.clone()
    same(gradient(parse("bias_scores(keys=[0], bias=0)")), own)
    assert float((gradient(ss.MaskKeys(0)) - own).abs().max()) > 1e-4
    network.zero_grad()


MASK = torch.ones_like(SOURCE)
LONE = MASK.clone()
LONE[0, 1:] = 0
LEFT = LONE.flip(1)
REFUSED = [
    ("encoder", "window(size=5)", {}, r"window is of causal self-attention.*side='decoder'; here, take mask_keys"),
    ("cross", "recompute_window(size=4)", {}, r"window is of causal self-attention.*side='decoder'; here, take mask_keys"),
    ("cross", "quantize_kv(bits=2)", {}, "as tokens come.*side='decoder'"),
    ("cross", "zero_neuron(layer=1, neurons=[0])", {}, "behind attention.*that is side='decoder'"),
    ("cross", "mean_head(heads=[1])", {}, "not known before the text is: evaluate it"),
    ("cross", "scale_output(positions=[-1], factor=2)", {}, "positions from the end are not known"),
    ("encoder", "replace_token(position=-1, token=4)", {}, "positions from the end are not known"),
    ("encoder", "drop_tokens(positions=[0])", {}, "change the ids that you give the model"),
    ("decoder", "mask_keys(keys=[-1])", {}, "positions from the end are not known"),
    ("decoder", "streaming_window(size=5, sinks=1)", {}, "takes no positions inside a cache.*take sink_window"),
    ("cross", "mask_keys(keys=[9])", {}, "whose positions are 0 to 6"),
    ("cross", "mask_keys(keys=[0])", {"attention_mask": LONE}, "hides all 7 keys of a source in layer 0: leave one"),
    ("cross", "mask_keys(keys=[-1])", {"attention_mask": LONE}, "needs a source's end, and there are pads"),
    ("encoder", "mean_value(keys=[0])", {"attention_mask": LONE}, "needs a source's end, and there are pads"),
    ("encoder", "mask_keys(keys=[0])", {"attention_mask": LEFT}, "padded on the left"),
    ("cross", "mask_keys(keys=[0])", {"attention_mask": LEFT}, "padded on the left"),
    ("sideways", "mask_keys(keys=[0])", {}, "unknown side"),
]


@pytest.mark.parametrize(("side", "edit", "more", "why"), REFUSED)
def test_what_cannot_be_done(side, edit, more, why):
    network = model("bart")
    before = fingerprint(network)
    with pytest.raises(ss.SinkscopeError, match=why), parse(edit).on(network, side=side):
        logits(network, "bart", **more)
    assert fingerprint(network) == before


def test_a_pad_whose_row_sees_nothing_stays_a_number():
    """The one real token of a source is masked in the encoder: it sees itself, and so do its pads."""
    network, short = model("bart"), SOURCE[:, :1]
    with ss.MaskKeys(0).on(network, side="encoder"), torch.no_grad():
        found = logits(network, "bart", attention_mask=LONE)[:1]
        same(found, network(input_ids=short, decoder_input_ids=TARGET).logits[:1])


def test_a_decoder_that_takes_ids_for_pads_by_itself_is_refused_where_they_come_first():
    network, target = model("t5gemma"), TARGET.clone()
    target[:, 0] = network.config.pad_token_id or 0
    with ss.MaskKeys(3).on(network, side="cross"), pytest.raises(ss.SinkscopeError, match="padded on the left"):
        logits(network, "t5gemma", target, use_cache=False)
    with ss.MaskKeys(3).on(network, side="cross"):
        logits(network, "t5gemma", target, use_cache=False, decoder_attention_mask=torch.ones_like(target))


@pytest.mark.parametrize("side", SIDES)
def test_a_static_cache_is_refused(side):
    says = r"use a dynamic one \(transformers.DynamicCache"
    with pytest.raises(ss.SinkscopeError, match=says), torch.no_grad(), ss.MaskKeys(0).on(model("bart"), side=side):
        model("bart").generate(SOURCE, max_new_tokens=4, cache_implementation="static")


def test_a_decoder_alone_has_one_side():
    network = tiny_hf_model("gpt2")
    with ss.MaskKeys(0).on(network), torch.no_grad():
        expected = network(TARGET).logits
    with ss.MaskKeys(0).on(network, side="decoder"), torch.no_grad():
        assert torch.equal(network(TARGET).logits, expected)
    with pytest.raises(ss.SinkscopeError, match=r"a decoder alone.*leave side out"), ss.MaskKeys(0).on(network, side="cross"):
        pass
    with ss.MaskKeys(0).on(model("bart"), side="cross"), pytest.raises(ss.SinkscopeError, match="leave the block first"):
        ss.measure(model("bart"), (SOURCE[0], TARGET[0]), side="cross")
