"""Edits in the encoder and in cross-attention, against Hugging Face's eager attention, edited by hand."""

import contextlib
import re
import sys

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_inputs, tiny_tokenizer
from tests.conftest import fingerprint, most_slow
from tests.model.test_sides import PAIRS
from tests.model.test_whisper import model as whisper

SIDES = ["encoder", "cross"]
FAMILIES = ["t5", "bart", "marian", "pegasus", "m2m_100", "t5gemma", "switch", "mbart"]


def places(network):
    """Module's id -> (side, layer), read off its name: `model.decoder.layers.1.encoder_attn` is layer 1 of `cross`."""
    found = {}
    for name, module in network.named_modules():
        layer = re.search(r"(?:block|layers)\.(\d+)\.", name)
        if layer is not None:
            crossed = re.search(r"EncDecAttention|encoder_attn|cross_attn", name)
            encoder = re.match(r"(model\.)?encoder\.", name)
            found[id(module)] = "cross" if crossed else "encoder" if encoder else "decoder", int(layer[1])
    return found


class Hand:
    """One edit, by hand: what is done to the scores, weights, values and outputs of an attention; nothing by default."""

    def __init__(self, layers=(0, 1, 2), **steps):
        self.layers, self.steps = layers, steps

    def attend(self, module, query, key, value, mask, scaling=None, dropout=0.0, position_bias=None, softcap=None, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        for more in (position_bias, mask):
            scores = scores if more is None else scores + more
        weights = self.step("weights", self.step("scores", scores).softmax(-1))
        out = self.step("outputs", weights @ self.step("values", value))
        return out.transpose(1, 2).contiguous(), weights

    def step(self, name, x):
        return self.steps[name](x.clone()) if name in self.steps else x

    @contextlib.contextmanager
    def on(self, network, side):
        code, where = sys.modules[type(network).__module__], places(network)
        theirs = code.eager_attention_forward
        seen = set()

        def attend(module, *args, **how):
            here, layer = where[id(module)]
            if here != side or layer not in self.layers:
                return theirs(module, *args, **how)
            seen.add(layer)
            return self.attend(module, *args, **how)

        code.eager_attention_forward = attend
        try:
            yield
        finally:
            code.eager_attention_forward = theirs
        assert seen, "no attention was edited"


def at(x, *index):
    """Give what sets `x[..., index]`."""

    def change(new):
        x[(..., *index)] = new(x[(..., *index)]) if callable(new) else new
        return x

    return change


def unseen(side):
    """Hide the first key; a query of the encoder still sees itself."""

    def change(scores):
        own = scores[..., 0, 0].clone()
        scores[..., 0] = -torch.inf
        if side == "encoder":
            scores[..., 0, 0] = own
        return scores

    return change


def scaled(factor, key=0, head=slice(None)):
    def change(weights):
        weights[:, head, :, key] *= factor
        return weights / weights.sum(-1, keepdim=True)

    return change


def alone(position):
    def change(scores):
        own = scores[..., position, position].clone()
        scores[..., position, :] = -torch.inf
        scores[..., position, position] = own
        return scores

    return change


def by_hand(side):
    """Text form -> the same by hand."""
    first = slice(0, 1)
    edits = {
        "mask_keys(keys=[0])": Hand(scores=unseen(side)),
        "zero_attention(keys=[0])": Hand(weights=lambda w: at(w, 0)(0.0)),
        "zero_attention(keys=[-1], layers=[1], heads=[2])": Hand((1,), weights=last_of_head_2),
        "scale_attention(keys=[0], factor=0.25)": Hand(weights=scaled(0.25)),
        "scale_attention(keys=[3], factor=4, layers=[1], heads=[1])": Hand((1,), weights=scaled(4, 3, 1)),
        "bias_scores(keys=[2], bias=1.5)": Hand(scores=lambda s: at(s, 2)(lambda old: old + 1.5)),
        "zero_value(keys=[0])": Hand(values=lambda v: at(v, first, slice(None))(0.0)),
        "mean_value(keys=[0])": Hand(values=lambda v: at(v, 0, slice(None))(v.mean(2))),
        "replace_value(keys=[1], by='mean', layers=[0])": Hand((0,), values=lambda v: at(v, 1, slice(None))(v.mean(2))),
        "zero_head(layers=[0], heads=[2])": Hand((0,), outputs=lambda o: o.index_fill(1, torch.tensor([2]), 0.0)),
        "mean_head(heads=[1])": Hand(outputs=averaged),
        "scale_output(positions=[3], factor=2)": Hand(outputs=lambda o: at(o, 3, slice(None))(lambda old: old * 2)),
    }
    if side == "encoder":
        edits["self_only(positions=[3])"] = Hand(scores=alone(3))
    return edits


def last_of_head_2(weights):
    weights[:, 2, :, -1] = 0.0
    return weights


def averaged(outputs):
    outputs[:, 1] = outputs[:, 1].mean(1, keepdim=True)
    return outputs


def losses(network, source, target):
    """Hugging Face's loss of each target token but the first."""
    source, target = torch.tensor([source]), torch.tensor([target])
    masks = {"attention_mask": torch.ones_like(source), "decoder_attention_mask": torch.ones_like(target)}
    with torch.no_grad():
        logits = network(input_ids=source, decoder_input_ids=target, use_cache=False, **masks).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="none").numpy()


def found(effect, edit, label):
    rows = effect.curves[(effect.curves["intervention"] == edit) & (effect.curves["text"] == label)]
    return rows["loss"].to_numpy()


def same(effect, edit, label, expected):
    np.testing.assert_allclose(found(effect, edit, label), expected, atol=1e-5, rtol=1e-5, err_msg=f"{edit}, {label}")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(FAMILIES, "t5", "bart", "marian"))
def test_edits_are_those_made_by_hand(family, side, monkeypatch):
    """Also where rows come in blocks. Losses under the edit are others than without."""
    monkeypatch.setattr("sinkscope.capture.attend.ROWS", 6)
    model, network, edits = tiny_hf_model(family), tiny_hf_model(family), by_hand(side)
    losses(model, [5, 6], [1, 7])  # leaves a mark of Switch's own
    before = fingerprint(model)
    effect = ss.evaluate(model, PAIRS, list(edits), side=side)
    assert fingerprint(model) == before
    assert (effect.about["side"], effect.about["engine"]) == (side, "flash")
    assert f"({side})" in str(effect)
    for label, pair in PAIRS.items():
        plain = losses(network, *pair)
        same(effect, "none", label, plain)
        for edit, hand in edits.items():
            with hand.on(network, side):
                expected = losses(network, *pair)
            same(effect, edit, label, expected)
            undone = family == "t5gemma" and edit.startswith("scale_output")  # by the norm behind its output projection
            assert undone or np.abs(expected - plain).max() > 1e-6, f"{edit} changes nothing that could be seen"


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_bridge_is_edited_alike(tiny, family, side):
    edits = ["mask_keys(keys=[0])", "zero_head(layers=[0], heads=[2])", "mean_value(keys=[0])"]
    bridge, plain = (ss.evaluate(m, PAIRS, edits, side=side) for m in (tiny(family), tiny_hf_model(family)))
    for edit in ["none", *edits]:
        for label in PAIRS:
            same(bridge, edit, label, found(plain, edit, label))


@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_a_masked_source_token_is_hugging_faces_own_mask(family):
    """Cross-attention without the first source token: the decoder given a mask of the source without it."""
    network = tiny_hf_model(family)
    effect = ss.evaluate(tiny_hf_model(family), PAIRS, "mask_keys(keys=[0])", side="cross")
    for label, (source, target) in PAIRS.items():
        source, target = torch.tensor([source]), torch.tensor([target])
        mask = torch.ones_like(source)
        with torch.no_grad():
            memory = network.get_encoder()(input_ids=source, attention_mask=mask)
            mask[0, 0] = 0
            logits = network(encoder_outputs=memory, attention_mask=mask, decoder_input_ids=target, use_cache=False).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="none").numpy()
        same(effect, "mask_keys(keys=[0])", label, expected)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_source_loses_and_swaps_tokens(family):
    """All target tokens are scored; positions are the source's."""
    network, edits = tiny_hf_model(family), ["drop_tokens(positions=[0])", "replace_token(position=1, token=9)"]
    effect = ss.evaluate(tiny_hf_model(family), PAIRS, edits, side="encoder")
    for label, (source, target) in PAIRS.items():
        same(effect, edits[0], label, losses(network, source[1:], target))
        same(effect, edits[1], label, losses(network, [source[0], 9, *source[2:]], target))
    assert set(effect.frame["tokens"]) == {len(t) - 1 for _, t in PAIRS.values()} | {
        sum(len(t) - 1 for _, t in PAIRS.values())
    }


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_behind_the_encoders_attention(family):
    """Its residual stream, given and located, and its neurons."""
    network = tiny_hf_model(family)
    layers = network.get_encoder().block if family == "t5" else network.get_encoder().layers
    given = "edit_activation(to=2.0, layers=[0], positions=[1], dims=[3])"
    drawn = "edit_activation(to='shuffle', layers=[0], positions=[1], dims=[3])"
    neurons = "zero_neuron(layer=1, neurons=[0, 5])"
    effect = ss.evaluate(tiny_hf_model(family), PAIRS, [given, drawn, neurons], side="encoder")
    matrix = layers[1].layer[1].DenseReluDense.wo if family == "t5" else layers[1].fc2

    def set_to(number):
        def after(module, args, output):
            first = output[0] if isinstance(output, tuple) else output
            first[:, 1, 3] = number

        return after

    def silence(module, args):
        args[0][..., [0, 5]] = 0

    for label, pair in PAIRS.items():
        number = float(re.search(r"to=\[?([-\d.e]+)", effect.about["located"][label][drawn])[1])
        ways = {
            given: lambda: layers[0].register_forward_hook(set_to(2.0)),
            drawn: lambda: layers[0].register_forward_hook(set_to(number)),  # noqa: B023
            neurons: lambda: matrix.register_forward_pre_hook(silence),
        }
        for edit, hooked in ways.items():
            hook = hooked()
            expected = losses(network, *pair)
            hook.remove()
            same(effect, edit, label, expected)


@pytest.mark.parametrize("side", SIDES)
def test_the_sink_is_the_sides(side):
    """Mass on the source's first token without an edit, as `measure` has it; none where it is zeroed."""
    model = tiny_hf_model("t5")
    effect = ss.evaluate(model, PAIRS, "zero_attention(keys=[0])", side=side)
    report = ss.measure(model, PAIRS, ["sink_mass", "received_profile"], side=side)
    for label, (source, _) in PAIRS.items():
        clean, edited = (
            effect.frame[(effect.frame["text"] == label) & (effect.frame["intervention"] == name)].iloc[0]
            for name in ("none", "zero_attention(keys=[0])")
        )
        rows = report.frame[(report.frame["text"] == label) & (report.frame["metric"] == "sink_mass")]
        assert clean["sink_mass"] == pytest.approx(rows["value"].mean(), abs=1e-6)
        assert edited["sink_mass"] == 0
        assert 0 <= clean["sink_position"] < len(source)
        token = effect.details.query("text == @label and intervention == 'none'")["sink_token"].iloc[0]
        assert token == str(source[clean["sink_position"]])


@pytest.mark.parametrize("side", SIDES)
def test_a_sound_is_edited_too(side):
    """Whisper's frames are the keys."""
    network = whisper()
    sound, target = tiny_inputs("whisper", 1)["input_features"], [1, 7, 9, 20, 31]
    hands = {name: by_hand(side)[name] for name in ("mask_keys(keys=[0])", "mean_head(heads=[1])")}
    effect = ss.evaluate(network, ({"input_features": sound}, target), list(hands), side=side)
    for edit, hand in hands.items():
        with hand.on(network, side), torch.no_grad():
            logits = network(input_features=sound, decoder_input_ids=torch.tensor([target]), use_cache=False).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(target[1:]), reduction="none").numpy()
        same(effect, edit, effect.frame["text"].iloc[0], expected)


REFUSED = [
    ("encoder", "window(size=5)", r"window is of causal self-attention.*side='decoder'; here, take mask_keys"),
    ("cross", "sink_window(size=5, sinks=1)", r"window is of causal self-attention.*side='decoder'; here, take mask_keys"),
    ("encoder", "streaming_window(size=5, sinks=1)", "window is of causal self-attention"),
    ("cross", "recompute_window(size=4)", "window is of causal self-attention"),
    ("encoder", "replace_value(keys=[0], by='donor')", "values of another text.*take mask_keys"),
    ("cross", "quantize_kv(bits=2)", "as tokens come.*side='decoder'"),
    ("cross", "drop_tokens(positions=[0])", "two: side='encoder' edits the source, side='decoder' the target"),
    ("cross", "self_only(positions=[1])", "no key is the query itself.*take mask_keys"),
    ("cross", "zero_neuron(layer=1, neurons=[0])", "behind attention.*that is side='decoder'"),
    ("cross", "edit_activation(to=0.0, layers=[0], positions=[0], dims=[1])", "behind attention.*that is side='decoder'"),
    ("cross", "mask_keys(keys=[0]) & window(size=5)", r"window\(size=5\) on side='cross'"),
    ("cross", "mask_keys(keys=[0, 1, 2, 3, 4])", "hides all 5 keys"),
    ("encoder", "mask_keys(keys=[30])", "positions are 0 to"),
    ("cross", "zero_head(layers=[2])", r"layers \[2\]"),
]


@pytest.mark.parametrize(("side", "edit", "why"), REFUSED)
def test_what_is_not_live_there_is_refused(side, edit, why):
    with pytest.raises(ss.SinkscopeError, match=why):
        ss.evaluate(tiny_hf_model("bart"), {"short": PAIRS["text 3"]}, edit, side=side)


def test_frames_are_no_tokens():
    model = whisper()
    given = (tiny_inputs("whisper", 1), [1, 7, 9])
    for edit, why in (
        ("drop_tokens(positions=[0])", "frames can't be left out"),
        ("edit_activation()", "located in a sound"),
    ):
        with pytest.raises(ss.SinkscopeError, match=why):
            ss.evaluate(model, given, edit, side="encoder")


def test_other_models_have_no_other_side():
    with pytest.raises(ss.SinkscopeError, match=r"a decoder alone.*leave side out"):
        ss.evaluate(tiny_hf_model("llama"), [[1, 5, 6, 7]], "mask_keys()", side="encoder")
    with pytest.raises(ss.SinkscopeError, match="encoder, which predicts no next token"):
        ss.evaluate(tiny_hf_model("bert"), [[1, 5, 6, 7]], "mask_keys()", side="encoder")
    with pytest.raises(ss.SinkscopeError, match=r"no source.*pair"):
        ss.evaluate(tiny_hf_model("bart"), ss.tokenize(None, [[5, 6, 7]]), "mask_keys()", side="encoder")


def test_tokens_and_going_on(tmp_path):
    """Tokens of another side are looked at from this one; what was kept of one side is not taken for another's."""
    model = tiny_hf_model("t5")
    wanted = {side: ss.evaluate(model, PAIRS, "mask_keys()", side=side) for side in ("decoder", *SIDES)}
    for side, effect in wanted.items():
        tokens = ss.models.adapt_side(model, "cross").tokenize(PAIRS)
        again = ss.evaluate(model, tokens, "mask_keys()", side=side, resume=tmp_path)
        np.testing.assert_array_equal(again.frame["loss"], effect.frame["loss"])
    assert len({effect.frame["loss"].iloc[1] for effect in wanted.values()}) == 3


def test_the_command_line_edits_sides(tmp_path):
    from typer.testing import CliRunner

    from sinkscope.cli import app

    directory = tmp_path / "tiny-t5"
    tiny_hf_model("t5").save_pretrained(directory)
    tiny_tokenizer("t5").save_pretrained(directory)
    given = ["--text", "so it goes", "--target", "a fox", "--intervention", "mask_keys(0)", "--side", "cross"]
    done = CliRunner().invoke(app, ["evaluate", str(directory), *given, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    effect = ss.load_report(tmp_path / "out")
    assert effect.about["side"] == "cross"
    direct = ss.evaluate(ss.load_model(str(directory)), ("so it goes", "a fox"), "mask_keys(0)", side="cross")
    np.testing.assert_allclose(effect.frame["loss"], direct.frame["loss"])


# --- sweeps ---------------------------------------------------------------------------------------------------------

SWEPT = [
    ("decoder", "zero_head()", "heads"),
    ("decoder", "window(size=4)", "layers"),
    ("encoder", "zero_head()", "heads"),
    ("encoder", "drop_tokens(positions=[0])", "positions"),
    ("cross", "zero_attention(keys=[0])", "heads"),
    ("cross", "zero_value(keys=[0])", "positions"),
    ("cross", "scale_output(positions=[0], factor=3)", "positions"),
]


@pytest.mark.parametrize(("side", "edit", "over"), SWEPT)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_every_place_of_a_sweep_is_evaluate_of_it(family, side, edit, over):
    """Of the source all positions, of the target all but the last; each once, and as where it is run alone."""
    model = tiny_hf_model(family)
    before = fingerprint(model)
    report = ss.sweep(model, PAIRS, edit, over, side=side, placebo=False)
    assert fingerprint(model) == before
    alone = ss.evaluate(model, PAIRS, report.frame.query("text == 'text 1'")["intervention"].unique().tolist()[:3], side=side)
    for name in alone.interventions[1:]:
        for label in PAIRS:
            ours, theirs = (r.frame[(r.frame["text"] == label) & (r.frame["intervention"] == name)] for r in (report, alone))
            for number in ("loss", "delta_loss", "kl"):
                np.testing.assert_allclose(ours[number], theirs[number], atol=1e-5, err_msg=f"{name} {label} {number}")
    if over == "positions":
        for label, (source, target) in PAIRS.items():
            places = report.frame[report.frame["text"] == label]["position"].tolist()
            assert places == list(range(len(target) - 1 if edit.startswith("scale_output") else len(source)))
