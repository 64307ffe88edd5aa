"""Encoders of images and of sound, against Hugging Face's own attentions (eager, float32, another copy, one input alone)."""

import functools
import json
import re

import numpy as np
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.models import bridge, media
from sinkscope.testing import SENSES, tiny_hf_model, tiny_inputs, tiny_model, tiny_tokenizer
from tests.conftest import fingerprint, most_slow, table, total

METRICS = ["sink_mass", "row_entropy", "received_profile", "effective_keys", "last_row_share", "sink_rate", "sink_positions"]
PATCHED = [family for family, sense in SENSES.items() if sense.reads == "pixel_values"]
HEARING = [family for family in SENSES if family not in PATCHED]
NOUN = {family: "image" if family in PATCHED else "sound" for family in SENSES}
SIDE = {"whisper": "encoder"}
#: Names of the positions, by hand.
FIRST = {
    **{"vit": ["[CLS]"], "dinov2": ["[CLS]"], "clip_vision": ["[CLS]"]},
    **{"deit": ["[CLS]", "[DIST]"], "ast": ["[CLS]", "[DIST]"]},
    "dinov2_with_registers": ["[CLS]", "[REG1]", "[REG2]", "[REG3]", "[REG4]"],
}


@functools.cache
def expected(family, row, seed=0):
    """`output_attentions` of one input alone, `[layer, head, query, key]` in float64."""
    network = tiny_hf_model(family)
    network = network.get_encoder() if family == "whisper" else network
    one = {name: values[row : row + 1] for name, values in tiny_inputs(family, 3, seed).items()}
    with torch.no_grad():
        found = network(**one, output_attentions=True).attentions
    return torch.cat(found).double().numpy()


def measured(family, model=None, inputs=None, metrics=METRICS, **how):
    model = tiny_hf_model(family) if model is None else model
    return ss.measure(model, tiny_inputs(family, 3) if inputs is None else inputs, metrics, side=SIDE.get(family), **how)


def right(report, family, key=0, labels=None):
    for row in range(3):
        a, label = expected(family, row), labels[row] if labels else f"{NOUN[family]} {row}"
        t = a.shape[-1]
        entropy = -(a * np.log(np.where(a > 0, a, 1))).sum(-1)
        same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=label)
        same(table(report, "sink_mass", label), a[..., key].mean(-1))
        same(table(report, "sink_mass", label, "null"), np.full(a.shape[:2], 1 / t))
        same(table(report, "last_row_share", label), a[..., -1, key])
        same(table(report, "row_entropy", label), entropy.mean(-1))
        same(table(report, "row_entropy", label, "null"), np.full(a.shape[:2], np.log(t)))
        same(table(report, "received_profile", label), a.mean((1, 2)))
        same(table(report, "received_profile", label, "null"), np.full((len(a), t), 1 / t))
        np.testing.assert_allclose(table(report, "effective_keys", label), np.exp(entropy).mean(-1), rtol=1e-5)
        rate = (a.mean(2)[..., key] > 0.3).mean()
        assert total(report, "sink_rate@0.3", label) == pytest.approx(rate)


@pytest.mark.parametrize("family", SENSES)
def test_every_family_is_hugging_faces(family):
    model = tiny_hf_model(family)
    before = fingerprint(model)
    report = measured(family, model)
    assert fingerprint(model) == before
    assert (report.about["engine"], report.about["causal"], report.about["reads"]) == ("flash", False, SENSES[family].reads)
    right(report, family)


@pytest.mark.parametrize("family", most_slow(list(SENSES), "dinov2_with_registers", "ast", "wav2vec2"))
def test_by_its_own_name_another_key(family):
    """A position is found by its name; inputs one by one, in another order, give the same."""
    names = measured(family, metrics=["sink_mass"]).about["texts"][0]["tokens"]
    key = min(3, len(names) - 1)
    one = [{name: values[row : row + 1] for name, values in tiny_inputs(family, 3).items()} for row in (2, 0, 1)]
    labelled = {f"input {row}": given for row, given in zip((2, 0, 1), one, strict=True)}
    report = measured(family, inputs=labelled, key=names[key], batch_size=2)
    right(report, family, key, [f"input {row}" for row in range(3)])


BRIDGED = ["vit", "deit", "ast", "hubert", "wav2vec2"]


def bridged(family):
    """A bridge; TransformerLens knows AST with its head alone."""
    if family != "ast":
        return tiny_model(family)
    plain = tiny_hf_model("ast")
    plain.config.architectures = ["ASTForAudioClassification"]
    network = transformers.ASTForAudioClassification(plain.config).eval()
    network.audio_spectrogram_transformer.load_state_dict(plain.state_dict())
    return bridge(network, tiny_tokenizer(), "tiny-ast")


@pytest.mark.parametrize("engine", ["flash", "hooks"])
@pytest.mark.parametrize("family", most_slow(BRIDGED, "vit", "hubert"))
def test_a_bridge_is_right_by_both_engines(family, engine):
    report = measured(family, bridged(family), engine=engine)
    assert report.about["engine"] == engine
    right(report, family)


@pytest.mark.parametrize("family", most_slow([*SENSES, "Wav2Vec2ForPreTraining"], "vit", "siglip_vision"))
def test_loaded_from_a_directory(family, tmp_path):
    """A bridge where TransformerLens knows the class, else Hugging Face's own; of a checkpoint of pretraining, its body."""
    own = "wav2vec2" if family.startswith("Wav2Vec2") else family
    network = tiny_hf_model(own)
    network.save_pretrained(tmp_path)
    if own != family:
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [family]}))
    model = ss.load_model(tmp_path)
    assert type(getattr(model, "original_model", model)) is type(network)
    assert hasattr(model, "hook_dict") == (own in BRIDGED and own != "ast")
    right(measured(own, model), own)


def test_what_is_not_loaded(tmp_path):
    transformers.CLIPConfig(architectures=["CLIPModel"]).save_pretrained(tmp_path)
    with pytest.raises(ss.SinkscopeError, match=r"CLIPModel has two towers: load one with transformers \(CLIPVisionModel"):
        ss.load_model(tmp_path)
    transformers.DebertaV2Config(architectures=["DebertaV2Model"]).save_pretrained(tmp_path)
    with pytest.raises(ss.SinkscopeError, match="DebertaV2Model predicts no tokens, and reads neither images nor sound"):
        ss.load_model(tmp_path)


def test_image_files_on_the_command_line(tmp_path):
    """The directory's own processor reads them: the same as in Python; and what can't be read."""
    from PIL import Image
    from typer.testing import CliRunner

    from sinkscope.cli import app

    def run(*arguments):
        return CliRunner().invoke(app, ["measure", *map(str, arguments)])

    place, out = tmp_path / "vit", tmp_path / "out"
    network = tiny_hf_model("ViTForImageClassification")
    network.save_pretrained(place)
    values = np.random.default_rng(0).integers(0, 255, (2, 30, 40, 3), dtype=np.uint8)
    files = [tmp_path / f"{name}.png" for name in "ab"]
    for path, pixels in zip(files, values, strict=True):
        Image.fromarray(pixels).save(path)
    (tmp_path / "c.PNG").write_bytes(b"no image")
    asked = [place, "--metric", "sink_mass", "--metric", "received_profile"]
    assert "has no image processor that loads (OSError" in run(*asked, "--file", files[0]).stderr
    processor = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(place)
    result = run(*asked, "--file", files[0], "--file", files[1], "--out", out)
    assert result.exit_code == 0, result.output
    assert "vit on 2 images of 17 positions" in result.stdout
    report = ss.load_report(out)
    for path in files:
        given = processor(Image.open(path), return_tensors="pt")
        with torch.no_grad():
            a = torch.cat(network(**given, output_attentions=True).attentions)
        np.testing.assert_allclose(table(report, "sink_mass", path.name), a[..., 0].mean(-1), atol=1e-5)
    assert (out / "grid.png").exists()
    for arguments, words in [
        (["--text", "so it goes"], "on the command line, --file IMAGE.png"),
        (["--text", "so it goes", "--file", files[0]], "images and text are given"),
        (["--file", files[0], "--file", files[0]], "is given twice"),
        (["--file", tmp_path / "d.png"], "no such file"),
        (["--file", tmp_path / "c.PNG"], "can't read the image"),
    ]:
        found = run(*asked, *arguments)
        assert (found.exit_code, words in found.stderr) == (1, True), found.output


def test_sound_files_on_the_command_line(tmp_path):
    """Stereo at half the rate: what the model is given is the tone itself, at the rate that it hears."""
    from scipy.io import wavfile
    from typer.testing import CliRunner

    from sinkscope.cli import app

    place, out, file = tmp_path / "hubert", tmp_path / "out", tmp_path / "tone.wav"
    network = tiny_hf_model("HubertModel")
    network.save_pretrained(place)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=False)
    extractor.save_pretrained(place)
    left = np.sin(2 * np.pi * 440 * np.arange(4000) / 8000)
    wavfile.write(file, 8000, np.stack([30000 * left, 10000 * left], 1).astype(np.int16))
    heard = media.processed(str(place), "input_values", {"tone": file})["tone"]["input_values"][0].numpy()
    tone = 20000 / 32768 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    np.testing.assert_allclose(heard[200:-200], tone[200:-200], atol=2e-3)
    arguments = ["measure", str(place), "--metric", "sink_mass", "--file", str(file), "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with torch.no_grad():
        a = torch.cat(network(torch.from_numpy(heard)[None], output_attentions=True).attentions)
    np.testing.assert_allclose(table(ss.load_report(out), "sink_mass", "tone.wav"), a[..., 0].mean(-1), atol=1e-5)
    file.write_bytes(b"no sound")
    for more, words in [([], "can't read the sound"), (["--text", "so it goes"], "sounds and text are given")]:
        found = CliRunner().invoke(app, [*arguments[:-2], *more])
        assert (found.exit_code, words in found.stderr) == (1, True), found.output


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PATCHED)
def test_a_patch_is_where_its_name_says(family):
    """Another pixel inside one patch changes the embedding of that position and of no other."""
    model, inputs = tiny_hf_model(family), tiny_inputs(family, 1)
    names = measured(family, model, inputs, ["sink_mass"]).about["texts"][0]["tokens"]
    rows, columns = (n // 4 for n in SENSES[family].shape[1:])
    assert names[: len(FIRST.get(family, []))] == FIRST.get(family, [])
    assert len(names) == len(FIRST.get(family, [])) + rows * columns
    for row, column in [(0, 0), (0, 1), (rows - 1, 0), (1, columns - 1)]:
        other = inputs["pixel_values"].clone()
        other[0, 1, 4 * row + 2, 4 * column + 1] += 1
        with torch.no_grad():
            embedded = [model.embeddings(pixels)[0] for pixels in (inputs["pixel_values"], other)]
        (moved,) = (embedded[0] - embedded[1]).abs().amax(-1).nonzero().flatten().tolist()
        assert names[moved] == f"patch {row},{column}"


def test_registers_and_class_tokens_are_where_their_names_say():
    model = tiny_hf_model("dinov2_with_registers")
    names = measured("dinov2_with_registers", model, metrics=["sink_mass"]).about["texts"][0]["tokens"]
    with torch.no_grad():
        before = model.embeddings(tiny_inputs("dinov2_with_registers", 1)["pixel_values"])[0]
        model.embeddings.register_tokens[0, 2] += 1
        after = model.embeddings(tiny_inputs("dinov2_with_registers", 1)["pixel_values"])[0]
    (moved,) = (before - after).abs().amax(-1).nonzero().flatten().tolist()
    assert names[moved] == "[REG3]"


def test_frequencies_are_rows_of_a_spectrum():
    model, inputs = tiny_hf_model("ast"), tiny_inputs("ast", 1)
    names = measured("ast", model, inputs, ["sink_mass"]).about["texts"][0]["tokens"]
    assert names[:4] == ["[CLS]", "[DIST]", "patch 0,0", "patch 0,1"]
    assert names[-1] == "patch 2,2"  # 16 mel bins by 24 frames, 8 x 8 patches, strides 4 and 8
    other = inputs["input_values"].clone()
    other[0, 17, 0] += 1  # a late time, the lowest frequency
    with torch.no_grad():
        moved = (model.embeddings(other) - model.embeddings(inputs["input_values"]))[0].abs().amax(-1).nonzero()
    assert [names[at] for at in moved.flatten().tolist()] == ["patch 0,2"]


def test_frames_are_numbered():
    assert measured("whisper", metrics=["sink_mass"]).about["texts"][0]["tokens"][:3] == ["frame 0", "frame 1", "frame 2"]
    names = measured("wav2vec2", metrics=["sink_mass"]).about["texts"][0]["tokens"]
    assert names[:3] == ["frame 0", "frame 1", "frame 2"]
    assert len(names) == len(set(names)) == expected("wav2vec2", 0).shape[-1]


# --- what is given --------------------------------------------------------------------------------------------------


def test_what_a_processor_gives():
    """A BatchFeature, a list of them, rows of a dataset, a stream, arrays and lists: all the same."""
    from transformers import BatchFeature

    pixels = tiny_inputs("vit", 3)["pixel_values"]
    whole = BatchFeature({"pixel_values": pixels, "labels": torch.arange(3)})
    given = [
        whole,
        [whole],
        [BatchFeature({"pixel_values": pixels[:2]}), {"pixel_values": pixels[2]}],
        iter([{"pixel_values": row} for row in pixels]),
        {"pixel_values": pixels.numpy()},
        {"pixel_values": [row.numpy() for row in pixels]},
        {"pixel_values": pixels.tolist()},
    ]
    for inputs in given:
        right(measured("vit", inputs=inputs), "vit")


def test_a_long_stream_is_numbered_through():
    """Portions of a stream of batches begin with the number of their first image."""
    pixels = tiny_inputs("vit", 3)["pixel_values"]
    report = measured("vit", inputs=({"pixel_values": pixels} for _ in range(90)), metrics=["sink_mass"])
    assert report.texts == [f"image {n}" for n in range(270)]


def test_waves_are_cut_where_their_pads_begin():
    """Unequal sounds in one padded batch: each is measured as if it were alone."""
    waves = tiny_inputs("wav2vec2", 2)["input_values"]
    waves[1, 150:] = 0
    mask = (torch.arange(203) < torch.tensor([[203], [150]])).long()
    report = ss.measure(tiny_hf_model("wav2vec2"), {"input_values": waves, "attention_mask": mask}, ["sink_mass"])
    assert [t["n_tokens"] for t in report.about["texts"]] == [19, 14]
    with torch.no_grad():
        found = tiny_hf_model("wav2vec2")(waves[1:, :150], output_attentions=True).attentions
    np.testing.assert_allclose(table(report, "sink_mass", "sound 1"), torch.cat(found)[..., 0].mean(-1), atol=1e-5)


def test_images_of_several_sizes():
    """DINOv2 takes any size: those of one size share a batch, and their positions have names of their own."""
    sizes = [(12, 20), (20, 12), (16, 16), (12, 20)]
    pixels = [torch.randn(3, *size, generator=torch.Generator().manual_seed(n)) for n, size in enumerate(sizes)]
    model = tiny_hf_model("dinov2")
    report = ss.measure(model, [{"pixel_values": one} for one in pixels], ["sink_mass", "received_profile"])
    assert report.about["texts"][1]["tokens"][-1] == "patch 4,2"
    for n, one in enumerate(pixels):
        with torch.no_grad():
            a = torch.cat(tiny_hf_model("dinov2")(one[None], output_attentions=True).attentions)
        np.testing.assert_allclose(table(report, "sink_mass", f"image {n}"), a[..., 0].mean(-1), atol=1e-5)


def test_resume_knows_the_pixels(tmp_path):
    inputs = tiny_inputs("vit", 3)
    first = measured("vit", inputs=inputs, metrics=["sink_mass"], resume=tmp_path, batch_size=1)
    kept = sorted((tmp_path / "unfinished").glob("*.npz"))
    again = measured("vit", inputs=inputs, metrics=["sink_mass"], resume=tmp_path, batch_size=1)
    assert sorted((tmp_path / "unfinished").glob("*.npz")) == kept
    assert len(kept) == 3
    np.testing.assert_array_equal(first.frame["value"], again.frame["value"])
    inputs["pixel_values"][1, 0, 5, 5] += 1
    other = measured("vit", inputs=inputs, metrics=["sink_mass"], resume=tmp_path, batch_size=1)
    assert len(list((tmp_path / "unfinished").glob("*.npz"))) == 4
    assert not np.allclose(table(first, "sink_mass", "image 1"), table(other, "sink_mass", "image 1"), atol=1e-6)


BAD = {
    "text": (lambda: ["so it goes"], "reads pixel_values: give what its processor gives"),
    "a tensor": (lambda: tiny_inputs("vit")["pixel_values"], "what was given is a Tensor"),
    "ids": (lambda: {"input_ids": [[1, 2, 3]]}, "reads pixel_values"),
    "sound": (lambda: tiny_inputs("ast"), "holds input_values, and"),
    "another size": (lambda: {"pixel_values": torch.zeros(1, 3, 8, 8)}, r"has \[8, 8\] pixels .* takes \[16, 16\]"),
    "bytes": (lambda: {"pixel_values": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)}, "floating-point numbers"),
    "one channel": (lambda: {"pixel_values": torch.zeros(1, 1, 16, 16)}, "has 1 channels"),
    "no axes": (lambda: {"pixel_values": torch.zeros(16, 16)}, r"\[batch, channels, height, width\]"),
    "a mask": (
        lambda: tiny_inputs("vit") | {"bool_masked_pos": torch.ones(2, 16)},
        "'bool_masked_pos' beside 'pixel_values'",
    ),
    "nothing": (list, "nothing was given"),
    "not finite": (lambda: {"pixel_values": torch.full((1, 3, 16, 16), torch.nan)}, "NaN or infinity"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(what):
    make, said = BAD[what]
    with pytest.raises(ss.SinkscopeError, match=said):
        ss.measure(tiny_hf_model("vit"), make(), ["sink_mass"])


def test_more_that_is_refused():
    vit, inputs = tiny_hf_model("vit"), tiny_inputs("vit")
    for how, said in [
        ({"bos": True}, "bos= is for text"),
        ({"max_tokens": 4}, "has 17 positions and is not cut"),
        ({"key": "[SEP]"}, "does not occur in 'image 0'"),
        ({"side": "decoder"}, "is an encoder alone"),
        ({"engine": "hooks"}, "plain Hugging Face model"),
        ({"where": ss.where.next_loss(above=1.0)}, "predicts no next token"),
    ]:
        with pytest.raises(ss.SinkscopeError, match=said):
            ss.measure(vit, inputs, ["sink_mass"], **how)
    with pytest.raises(ss.SinkscopeError, match=r"reads pixel_values, which ss\.measure"):
        ss.evaluate(vit, inputs, "window(size=2)")
    with pytest.raises(ss.SinkscopeError, match="holds pixel_values, and this model reads text"):
        ss.measure(tiny_hf_model("llama"), inputs)
    with pytest.raises(ss.SinkscopeError, match="holds pixel_values, and this model reads text"):
        ss.measure(tiny_hf_model("llama"), [inputs, [5, 6, 7]])
    assert measured("vit", max_tokens=17, metrics=["sink_mass"]).texts == ["image 0", "image 1", "image 2"]


# --- what is seen ---------------------------------------------------------------------------------------------------


def test_the_report(tmp_path):
    report = measured("dinov2_with_registers")
    assert "3 images of 20 positions" in str(report)
    assert set(report.sink_positions()["token"]) <= set(report.about["texts"][0]["tokens"])
    report.save(tmp_path)
    assert (tmp_path / "grid.png").stat().st_size > 5000
    again = ss.load_report(tmp_path)
    assert again.about["texts"][0]["tokens"][:2] == ["[CLS]", "[REG1]"]
    assert again.texts == ["image 0", "image 1", "image 2"]
    page = report.page()
    assert "[REG4]" in page
    assert "3 images, 60 positions." in page
    assert again.about["sentences"]["sink_mass"].startswith("On average a position pays")
    assert "of its attention to [CLS]; spread" in again.about["sentences"]["sink_mass"]
    assert again.heatmap().get_title().endswith("mean of images")
    assert set(again.intervals()["interval"]) <= {"t, logit, 3 images", "t, log, 3 images", "t, 3 images"}
    words = re.sub(r"<(script|style).*?</\1>|<[^>]*>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?i)\b(?:text|token)s?\b", words.partition("How this was measured")[0])
    assert again.grid(text="image 1").get_title().endswith("received_profile, image 1")


def test_the_picture_of_the_grid():
    """Every cell is the patch's own number, by its place; what stands apart has its own; chance is written below."""
    report = measured("dinov2_with_registers")
    a = expected("dinov2_with_registers", 1).mean((1, 2))
    ax = report.grid(text="image 1", layer=2)
    (drawn,) = ax.images
    np.testing.assert_allclose(drawn.get_array(), a[2, 5:].reshape(3, 5), atol=1e-5)
    assert [words.get_text() for words in ax.texts] == ["[CLS]", "[REG1]", "[REG2]", "[REG3]", "[REG4]"]
    for cell, value in zip(ax.patches, a[2, :5], strict=True):
        np.testing.assert_allclose(cell.get_facecolor(), drawn.cmap(drawn.norm(value)), atol=0.02)
    assert ax.get_xlabel() == "layer 2; uniform attention: 0.05"
    assert "received_profile, image 1" in ax.get_title()
    both = report.grid(image=tiny_inputs("dinov2_with_registers")["pixel_values"][0])
    below, above = both.images
    assert below.get_array().shape == (12, 20, 3)
    assert below.get_extent() == above.get_extent() == [-0.5, 4.5, 2.5, -0.5]
    mean = np.mean([expected("dinov2_with_registers", row).mean((0, 1, 2))[5:] for row in range(3)], 0)
    np.testing.assert_allclose(above.get_array(), mean.reshape(3, 5), atol=1e-5)


def test_no_grid_of_what_is_none():
    with pytest.raises(ss.SinkscopeError, match="no patches of an image"):
        measured("wav2vec2").grid()
    with pytest.raises(ss.SinkscopeError, match="unknown layer"):
        measured("vit").grid(layer=9)
    with pytest.raises(ss.SinkscopeError, match="unknown text"):
        measured("vit").grid(text="image 9")
    with pytest.raises(ss.SinkscopeError, match="image has the shape"):
        measured("vit").grid(image=np.zeros(5))
    assert "grid" not in ss.measure(tiny_hf_model("llama"), {"a": [1, 5, 6, 7]}).figures()


def test_whole_patterns():
    model, one = tiny_hf_model("vit"), tiny_inputs("vit", 1)
    a = expected("vit", 0)
    shown = ss.attention_map(model, one, layer=1, head=2)
    np.testing.assert_allclose(shown["value"].to_numpy().reshape(17, 17), a[1, 2], atol=1e-5)
    assert shown["key_token"].iloc[1] == "patch 0,0"
    patterns = ss.attention_patterns(model, one)
    np.testing.assert_allclose(patterns["value"].to_numpy().reshape(a.shape), a, atol=1e-5)


def test_a_model_with_a_head():
    """The body of a classifier is found; its own numbers."""
    config = tiny_hf_model("vit").config
    network = transformers.ViTForImageClassification(config).eval()
    inputs = tiny_inputs("vit", 1)
    with torch.no_grad():
        a = torch.cat(network(**inputs, output_attentions=True).attentions)
    report = ss.measure(network, inputs, ["sink_mass"])
    np.testing.assert_allclose(table(report, "sink_mass", "image 0"), a[..., 0].mean(-1), atol=1e-5)


def test_a_tokenizer_does_not_matter():
    model = tiny_hf_model("vit")
    model.tokenizer = tiny_tokenizer()
    right(measured("vit", model), "vit")
