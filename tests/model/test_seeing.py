"""Images inside vision-language models, against Hugging Face's own attentions (eager, float32, another copy of the model)."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models import adapt, adapt_side, bridge
from sinkscope.testing import tiny_hf_model, tiny_inputs, tiny_tokenizer
from sinkscope.testing.seeing import SEEING
from tests.conftest import fingerprint, most_slow, table, total
from tests.model.compare import TL4

pytestmark = pytest.mark.skipif(not TL4, reason="these models are new in TransformerLens 4")
METRICS = [
    *("sink_mass", "sink_mass_excess", "visible_sink_mass", "received", "row_entropy", "normalized_row_entropy"),
    *("effective_keys", "received_profile", "position_profile", "last_row_share", "sink_rate", "sink_positions"),
]
GEMMA, LLAVA, QWEN = (f"{name}ForConditionalGeneration" for name in ("Gemma3", "Llava", "Qwen2_5_VL"))
FAST = (LLAVA, GEMMA, QWEN)


@functools.cache
def expected(name, images=2):
    """`output_attentions` of the whole model on all that is given, `[layer, head, query, key]`."""
    network = tiny_hf_model(name)
    with torch.no_grad():
        found = network(**tiny_inputs(name, images), output_attentions=True).attentions
    return torch.cat(found).double().numpy()


def seen(name, layer, images=2):
    """Who sees whom, by a loop: causality, the window, and images of Gemma that see themselves both ways."""
    given = tiny_inputs(name, images)
    t = given["input_ids"].shape[1]
    types = given["token_type_ids"][0].tolist() if name == GEMMA else [0] * t
    picture = np.cumsum([types[i] == 1 and (i == 0 or types[i - 1] != 1) for i in range(t)])
    window = adapt(tiny_hf_model(name)).windows.get(layer)
    marks = np.zeros((t, t), dtype=bool)
    for i in range(t):
        for k in range(t):
            both = types[i] == types[k] == 1 and picture[i] == picture[k]
            marks[i, k] = (k <= i or both) and (window is None or i - k < window)
    return marks


def right(report, name, label, images=2):
    """Every number from the weights by a loop, and the null from who sees whom."""
    weights, adapter = expected(name, images), adapt(tiny_hf_model(name))
    t, windows, a = weights.shape[-1], adapter.windows, dict(zip(adapter.layers, weights, strict=True))
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=label)
    for layer in a:
        there = seen(name, layer, images)
        assert (a[layer][:, there] > 0).all()
        assert (a[layer][:, ~there] == 0).all()
        causal = there if layer not in windows else seen_without_window(name, layer, images)
        sees, choice = causal[:, 0], causal.sum(1) > 1
        even = causal / causal.sum(1, keepdims=True)
        narrow = there / there.sum(1, keepdims=True)
        entropy = -(a[layer] * np.log(np.where(a[layer] > 0, a[layer], 1))).sum(-1)
        at = functools.partial(table, report)
        same(at("sink_mass", label)[layer], a[layer][..., 0].mean(-1))
        same(at("sink_mass", label, "null")[layer], np.full(len(a[layer]), even[:, 0].mean()))
        same(at("sink_mass_excess", label)[layer], (a[layer][..., 0] - even[:, 0])[:, choice & sees].mean(-1))
        same(at("visible_sink_mass", label)[layer], a[layer][:, there[:, 0], 0].mean(-1))
        same(at("visible_sink_mass", label, "null")[layer], np.full(len(a[layer]), narrow[there[:, 0], 0].mean()))
        same(at("received", label)[layer], a[layer][:, sees, 0].mean(-1))
        same(at("row_entropy", label)[layer], entropy.mean(-1))
        same(at("row_entropy", label, "null")[layer], np.full(len(a[layer]), np.log(causal.sum(1)).mean()))
        same(at("normalized_row_entropy", label)[layer], (entropy[:, choice] / np.log(causal.sum(1)[choice])).mean(-1))
        same(at("last_row_share", label)[layer], a[layer][:, -1, 0])
        same(at("position_profile", label)[layer], a[layer].mean((0, 1)))
        alpha = a[layer].mean(0).sum(0) / causal.sum(0)
        same(at("received_profile", label)[layer], alpha)
        same(at("received_profile", label, "null")[layer], even.sum(0) / causal.sum(0))
        np.testing.assert_allclose(at("effective_keys", label)[layer], np.exp(entropy).mean(-1), rtol=1e-5)
    assert total(report, "sink_rate@0.3", label) == pytest.approx((weights[..., 0].mean(2) > 0.3).mean())
    assert report.about["texts"][0]["n_tokens"] == t


def seen_without_window(name, layer, images):
    """The same where windows are not looked at."""
    far = seen(name, next(n for n in range(99) if n not in adapt(tiny_hf_model(name)).windows), images)
    assert far.shape == seen(name, layer, images).shape
    return far


@pytest.mark.parametrize("name", most_slow(list(SEEING), *FAST))
def test_every_number_is_hugging_faces(name):
    model = tiny_hf_model(name)
    before = fingerprint(model)
    report = ss.measure(model, tiny_inputs(name, 2), METRICS)
    assert fingerprint(model) == before
    assert (report.about["engine"], report.about["causal"]) == ("flash", True)
    right(report, name, "text 0")


@pytest.mark.parametrize("name", most_slow(list(SEEING), GEMMA))
def test_whole_patterns(name):
    model, given, a = tiny_hf_model(name), tiny_inputs(name, 2), expected(name)
    t = a.shape[-1]
    layers = adapt(model).layers
    shown = ss.attention_map(model, given, layer=layers[1], head=2, max_tokens=t)
    np.testing.assert_allclose(shown["value"].to_numpy().reshape(t, t), a[1, 2], atol=1e-5)
    patterns = ss.attention_patterns(model, given, max_tokens=t)
    full = np.zeros((layers[-1] + 1, *a.shape[1:]))
    full[tuple(patterns[axis].to_numpy(int) for axis in ("layer", "head", "query", "key"))] = patterns["value"]
    np.testing.assert_allclose(full[list(layers)], a, atol=1e-5)


def test_sums_that_are_made_tile_by_tile(monkeypatch):
    from sinkscope.capture import rows

    monkeypatch.setattr(rows, "TILE", 4 * 20 * 7)
    right(ss.measure(tiny_hf_model(GEMMA), tiny_inputs(GEMMA, 2), METRICS), GEMMA, "text 0")


def test_images_longer_than_a_window_see_themselves_both_ways():
    """An image of Gemma 3 of 16 positions, twice the window: later keys are seen, early ones beyond the window are not."""
    import transformers

    config = tiny_hf_model(GEMMA).config
    config.vision_config.patch_size, config.mm_tokens_per_image = 4, 16
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    given = tiny_inputs(LLAVA, 1)  # 16 tokens of an image
    given["token_type_ids"] = (given["input_ids"] == 60).long()
    with torch.no_grad():
        a = torch.cat(model(**given, output_attentions=True).attentions).double().numpy()
    assert (a[0, :, 4, 19] > 0).all()  # the first position of the image, and its last
    assert (a[0, :, 19, 4] == 0).all()
    report = ss.measure(model, given, ["visible_sink_mass", "received", "row_entropy", "received_profile"], key=15)
    sees = (a[:, 0, :, 15] > 0).T  # the first position of the image, too, eleven before it
    for layer in range(len(a)):
        column = a[layer, :, :, 15]
        there = (a[1, 0] > 0)[:, 15]  # without a window
        np.testing.assert_allclose(table(report, "visible_sink_mass")[layer], column[:, sees[:, layer]].mean(-1), atol=1e-5)
        np.testing.assert_allclose(table(report, "received")[layer], column[:, there].mean(-1), atol=1e-5)
        whole = a[layer].mean(0).sum(0) / (a[1, 0] > 0).sum(0)
        np.testing.assert_allclose(table(report, "received_profile")[layer], whole, atol=1e-5)
    even = np.log((a[1, 0] > 0).sum(1)).mean()
    np.testing.assert_allclose(table(report, "row_entropy", column="null"), np.full(a.shape[:2], even), atol=1e-9)


def test_images_that_see_themselves_both_ways_in_windows_alone():
    """Larger models of Gemma 4: layers without a sliding window are causal, images or not; by both engines."""
    name = "Gemma4ForConditionalGeneration"
    config, given = tiny_hf_model(name).config, tiny_inputs(name, 2)
    config.text_config.use_bidirectional_attention = "vision"
    torch.manual_seed(0)
    model = type(tiny_hf_model(name))(config).eval()
    with torch.no_grad():
        a = torch.cat(model(**given, output_attentions=True).attentions).double().numpy()
    t, windows = a.shape[-1], adapt(model).windows
    assert sorted(windows) == [0, 2]
    first = given["input_ids"][0].tolist().index(60)
    assert [bool((a[layer, :, first, first + 5] > 0).all()) for layer in range(4)] == [True, False, True, False]
    wide = np.tril(np.ones((t, t), dtype=bool))
    images = np.cumsum(np.diff(given["mm_token_type_ids"][0].numpy(), prepend=0) == 1) * given["mm_token_type_ids"][0].numpy()
    both = wide | ((images[:, None] == images) & (images > 0))
    for engine in ("flash", "hooks"):
        one = model if engine == "flash" else bridge(model, tiny_tokenizer(), name)
        report = ss.measure(one, given, METRICS, key=first + 1, engine=engine)
        for layer in range(4):
            sees = both if layer in windows else wide
            even, rows = sees / sees.sum(1, keepdims=True), sees[:, first + 1]
            at = functools.partial(table, report)
            same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5, err_msg=f"{engine} {layer}")
            same(at("sink_mass")[layer], a[layer, :, :, first + 1].mean(-1))
            same(at("sink_mass", column="null")[layer], np.full(4, even[:, first + 1].mean()))
            same(at("received")[layer], a[layer][:, rows, first + 1].mean(-1))
            same(at("row_entropy", column="null")[layer], np.full(4, np.log(sees.sum(1)).mean()))
            same(at("received_profile")[layer], a[layer].mean(0).sum(0) / sees.sum(0))
            same(at("received_profile", column="null")[layer], even.sum(0) / sees.sum(0))
            same(at("position_profile")[layer], a[layer].mean((0, 1)))
            there = rows if layer not in windows else rows & (np.arange(t) - first - 1 < windows[layer])
            same(at("visible_sink_mass")[layer], a[layer][:, there, first + 1].mean(-1))


@pytest.mark.slow
def test_gemma_3n_on_text_alone():
    import transformers

    from sinkscope.testing.architectures import ARCHITECTURES, tiny_architecture

    torch.manual_seed(0)
    told = ARCHITECTURES["Gemma3nForConditionalGeneration"]["text_config"].options
    model = transformers.Gemma3nForCausalLM(tiny_architecture("Gemma3nForCausalLM", told)).eval()
    ids = torch.randint(4, 60, (1, 26))
    with torch.no_grad():
        a = torch.cat(model(ids, output_attentions=True).attentions).double().numpy()
    report = ss.measure(model, ids, ["sink_mass", "row_entropy", "received_profile"])
    np.testing.assert_allclose(table(report, "sink_mass"), a[..., 0].mean(-1), atol=1e-5)
    np.testing.assert_allclose(table(report, "row_entropy"), -np.where(a > 0, a * np.log(a), 0).sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(table(report, "received_profile"), a.mean(1).sum(1) / (26 - np.arange(26)), atol=1e-5)


def test_an_image_changes_what_is_measured():
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 1)
    other = given | {"pixel_values": given["pixel_values"] + 1}
    report = ss.measure(model, {"one": given, "other": other, "none": given["input_ids"][0].tolist()}, ["sink_mass"])
    one, two, none = (table(report, "sink_mass", label) for label in ("one", "other", "none"))
    assert min(abs(one - two).max(), abs(one - none).max(), abs(two - none).max()) > 1e-4


@pytest.mark.parametrize("engine", ["flash", "hooks"])
@pytest.mark.parametrize("name", most_slow([name for name in SEEING if "Qwen2VL" not in name], GEMMA))  # which has no bridge
def test_a_bridge_is_right_by_both_engines(name, engine):
    model = bridge(tiny_hf_model(name), tiny_tokenizer(), name)
    report = ss.measure(model, tiny_inputs(name, 2), METRICS, engine=engine)
    assert report.about["engine"] == engine
    right(report, name, "text 0")


# --- what is given --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", most_slow([LLAVA, GEMMA, QWEN], LLAVA))
def test_several_with_text_alone_among_them(name):
    """Labelled, in a list, in a stream; text alone gives what it gives by itself, also after images."""
    model, words = tiny_hf_model(name), [1, 9, 8, 7, 6]
    inputs = [tiny_inputs(name, n) for n in (1, 2)]
    alone = ss.measure(model, {"words": words}, METRICS)
    labelled = ss.measure(model, {"one": inputs[0], "words": words, "two": inputs[1]}, METRICS)
    numbered = ss.measure(model, [inputs[0], words, inputs[1]], METRICS)
    streamed = ss.measure(model, iter([inputs[0], words, inputs[1]]), METRICS)
    assert numbered.texts == streamed.texts == ["text 0", "text 1", "text 2"]
    for report, labels in [(labelled, ["one", "words", "two"]), *((r, r.texts) for r in (numbered, streamed))]:
        for metric in ("sink_mass", "received_profile", "row_entropy"):
            np.testing.assert_array_equal(table(report, metric, labels[1]), table(alone, metric, "words"))
            for count, label in ((1, labels[0]), (2, labels[2])):
                a = expected(name, count)
                if metric == "sink_mass":
                    np.testing.assert_allclose(table(report, metric, label), a[..., 0].mean(-1), atol=1e-5)


def test_pads_of_a_batch_of_one_are_cut_off():
    given = tiny_inputs(GEMMA, 2)
    pad = torch.zeros(1, 3, dtype=torch.long)
    padded = given | {n: torch.cat([pad, given[n]], 1) for n in ("input_ids", "attention_mask", "token_type_ids")}
    right(ss.measure(tiny_hf_model(GEMMA), padded, METRICS), GEMMA, "text 0")


def test_positions_are_found_by_name():
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 2)
    model.tokenizer = tiny_tokenizer()
    report = ss.measure(model, given, ["sink_mass"], key="image 1 patch 3,2")
    del model.tokenizer
    names = report.about["texts"][0]["tokens"]
    at = names.index("image 1 patch 3,2")
    assert (given["input_ids"][0, at], names[0], len(names)) == (60, "<bos>", expected(LLAVA).shape[-1])
    np.testing.assert_allclose(table(report, "sink_mass"), expected(LLAVA)[..., at].mean(-1), atol=1e-5)
    only = ss.measure(model, given, ["sink_mass"], where=ss.where.tokens(lambda name: name.startswith("image 0")))
    rows = [n for n, name in enumerate(names) if name.startswith("image 0")]
    np.testing.assert_allclose(table(only, "sink_mass"), expected(LLAVA)[:, :, rows, 0].mean(-1), atol=1e-5)


def test_losses_of_next_tokens_are_those_of_text():
    """By the model's own logits: a position whose next one is of an image is on neither side."""
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 2)
    with torch.no_grad():
        logits = model(**given).logits[0, :-1]
    ids = given["input_ids"][0]
    losses, text = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"), ids[1:] != 60
    bound = float(losses[text].median())
    rule = ss.where.next_loss(above=bound)
    report = ss.measure(model, given, ["sink_mass"], where=rule, compare=True)
    for name, there in (("sink_mass", text & (losses > bound)), ("sink_mass[others]", text & ~(losses > bound))):
        rows = there.nonzero().flatten().tolist()
        np.testing.assert_allclose(table(report, name), expected(LLAVA)[:, :, rows, 0].mean(-1), atol=1e-5)


def test_resume_knows_the_pixels(tmp_path):
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 1)
    for pixels in (given["pixel_values"], given["pixel_values"], given["pixel_values"] + 1):
        ss.measure(model, given | {"pixel_values": pixels}, ["sink_mass"], resume=tmp_path)
    assert len(list((tmp_path / "unfinished").glob("*.npz"))) == 2


def test_what_qwen_keeps_to_generate_from_is_left():
    model, given = tiny_hf_model(QWEN), tiny_inputs(QWEN, 1)
    ss.measure(model, given, ["sink_mass"])
    assert model.model.rope_deltas is None


BAD = {
    "two rows": (lambda g: {n: torch.cat([v, v]) for n, v in g.items()}, "holds 2 texts at once, whose images are not told"),
    "no token": (
        lambda g: g | {"input_ids": torch.ones(1, 9, dtype=torch.long), "attention_mask": None},
        "has no token that",
    ),
    "too few": (lambda g: g | {"pixel_values": g["pixel_values"][:1]}, "does not run as it is"),
    "strange": (
        lambda g: g | {"image_size": torch.ones(2)},
        "has 'image_size', which LlavaModel does not take: leave it out",
    ),
    "no numbers": (lambda g: g | {"pixel_values": [object()]}, "pixel_values of 'text 0' is no array of numbers"),
    "not finite": (lambda g: g | {"pixel_values": g["pixel_values"] * torch.nan}, "NaN or infinity"),
    "sound": (lambda g: g | {"input_features": torch.zeros(1, 4, 4)}, "'input_features', which LlavaModel does not take"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_refused(what):
    make, said = BAD[what]
    with pytest.raises(ss.SinkscopeError, match=said):
        ss.measure(tiny_hf_model(LLAVA), make(tiny_inputs(LLAVA, 2)), ["sink_mass"])


def test_more_that_is_refused():
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 1)
    for how, said in [
        ({"max_tokens": 9}, "has 24 positions, images among them, and is not cut: give max_tokens=24"),
        ({"attention_mask": given["attention_mask"]}, "it is among what the processor gives"),
        ({"engine": "flash", "chunk": 4}, "belongs to engine='hooks'"),
        ({"key": "image 7 patch 0,0"}, "does not occur"),
    ]:
        with pytest.raises(ss.SinkscopeError, match=said):
            ss.measure(model, given, ["sink_mass"], **how)
    with pytest.raises(ss.SinkscopeError, match="distinct and not 'all'"):
        ss.measure(model, {"all": given}, ["sink_mass"])
    for ask in (lambda g: ss.evaluate(model, g, "mask_keys(keys=[0])"), lambda g: ss.sink_mask(model, g)):
        for texts in (given, [given], {"one": given}, iter([given])):
            with pytest.raises(ss.SinkscopeError, match=r"'pixel_values' beside its ids.* taken by ss.measure"):
                ask(texts)
    for texts in (given, [given], {"one": given}):
        with pytest.raises(ss.SinkscopeError, match="of a model that reads both"):
            ss.measure(tiny_hf_model("llama"), texts, ["sink_mass"])


def test_another_mask_is_never_measured(monkeypatch):
    """A model that says of its images what it does not do: found out before anything is reported."""
    model, given = tiny_hf_model(LLAVA), tiny_inputs(LLAVA, 2)
    from sinkscope.models import seeing

    monkeypatch.setattr(seeing, "_ends", lambda values, length, config: torch.arange(1, length + 1).clamp(min=7))
    with pytest.raises(ss.SinkscopeError, match="queries of layer 0 see other keys than was thought"):
        ss.measure(model, given, ["sink_mass"])


# --- names ----------------------------------------------------------------------------------------------------------


def embedded(model, given):
    """What the text model is given, `[position, d]`."""
    kept = []
    inside = model.get_decoder()
    handle = inside.register_forward_pre_hook(lambda m, a, k: kept.append(k["inputs_embeds"][0]), with_kwargs=True)
    with torch.no_grad():
        model(**given)
    handle.remove()
    return kept[0]


def film(name, grids, images=0):
    """Text with videos of so many (steps, rows, columns) of patches in it, and images behind them."""
    draw, pieces = torch.Generator().manual_seed(3), [1, 9, 8]
    for t, h, w in grids:
        pieces += [62, *[61] * (t * h * w // 4), 63, 12, 13]
    pieces += [62, 60, 60, 60, 60, 63, 17] * images
    ids = torch.tensor([pieces])
    patches = sum(t * h * w for t, h, w in grids)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "video_grid_thw": torch.tensor(grids)}
    given |= {
        "pixel_values_videos": torch.randn(patches, 96, generator=draw),
        "mm_token_type_ids": (ids == 60).long() + 2 * (ids == 61).long(),
    }
    if images:
        grid = torch.tensor([[1, 4, 4]] * images)
        given |= {"pixel_values": torch.randn(16 * images, 96, generator=draw), "image_grid_thw": grid}
    return given | ({"second_per_grid_ts": [1.5] * len(grids)} if "2_5" in name else {})


@pytest.mark.parametrize("name", most_slow(["Qwen2VLForConditionalGeneration", QWEN], "Qwen2VLForConditionalGeneration"))
@pytest.mark.parametrize(("grids", "images"), [([(2, 4, 4)], 0), ([(2, 4, 6), (1, 4, 4)], 1)])
def test_videos_too(name, grids, images):
    """Alone, and before an image; with the seconds of a step as a list, as the processor gives them."""
    model, given = tiny_hf_model(name), film(name, grids, images)
    with torch.no_grad():
        a = torch.cat(model(**given, output_attentions=True).attentions).double().numpy()
    before = fingerprint(model)
    report = ss.measure(model, given, ["sink_mass", "row_entropy", "received_profile"])
    assert fingerprint(model) == before
    t = a.shape[-1]
    np.testing.assert_allclose(table(report, "sink_mass"), a[..., 0].mean(-1), atol=1e-5)
    entropy = -(a * np.log(np.where(a > 0, a, 1))).sum(-1).mean(-1)
    np.testing.assert_allclose(table(report, "row_entropy"), entropy, atol=1e-5)
    alpha = a.mean(1).sum(1) / (t - np.arange(t))
    np.testing.assert_allclose(table(report, "received_profile"), alpha, atol=1e-5)
    names = report.about["texts"][0]["tokens"]
    assert [n for n in names if n.startswith("video 0")] == [f"video 0 patch {n}" for n in range(np.prod(grids[0]) // 4)]
    if images:
        assert [n for n in names if n.startswith("video 1")] == [f"video 1 patch {r},{c}" for r in (0, 1) for c in (0, 1)]
        assert [n for n in names if n.startswith("image")] == [f"image 0 patch {r},{c}" for r in (0, 1) for c in (0, 1)]
    later = ss.measure(model, given | {"pixel_values_videos": given["pixel_values_videos"] + 1}, ["sink_mass"])
    assert np.abs(table(later, "sink_mass") - table(report, "sink_mass")).max() > 1e-5


CELL = {LLAVA: 4, GEMMA: 8, "Idefics3ForConditionalGeneration": 8, "Mistral3ForConditionalGeneration": 8}


@pytest.mark.parametrize("name", CELL)
def test_a_patch_is_where_its_name_says(name):
    """Other pixels inside one cell of an image move the position of its name most."""
    model, given, cell = tiny_hf_model(name), tiny_inputs(name, 2), CELL[name]
    names = adapt_side(model, features=True).tokenize(given).sequences[0].strings
    before = embedded(model, given)
    for image, row, column in [(0, 0, 1), (0, 1, 0), (1, 1, 1), (1, 1, 0)]:
        moved = torch.zeros(len(names))
        for seed in range(4):
            pixels = given["pixel_values"].clone()
            there = pixels.reshape(-1, *pixels.shape[-3:])[image, :, cell * row :, cell * column :][:, :cell, :cell]
            there += 3 * torch.randn(there.shape, generator=torch.Generator().manual_seed(seed))
            moved += (embedded(model, given | {"pixel_values": pixels}) - before).norm(dim=-1)
        assert names[int(moved.argmax())] == f"image {image} patch {row},{column}"
        assert {names[n][:7] for n in (moved > 0).nonzero().flatten().tolist()} == {f"image {image}"}


def test_rows_and_columns_are_those_of_mrope():
    model, given = tiny_hf_model(QWEN), tiny_inputs(QWEN, 2)
    names = adapt_side(model, features=True).tokenize(given).sequences[0].strings
    positions = model.model.get_rope_index(**{n: v for n, v in given.items() if n != "pixel_values"})[0][1:, 0]
    for image in (0, 1):
        at = [n for n, name in enumerate(names) if name.startswith(f"image {image}")]
        places = positions[:, at] - positions[:, at].amin(1, keepdim=True)
        assert [names[n] for n in at] == [f"image {image} patch {row},{column}" for row, column in places.T.tolist()]


def test_images_of_unequal_sizes_have_the_positions_that_are_theirs():
    """Emu3's rows end with a position of their own; Gemma 4 says where each patch is, pads behind them."""
    for name, sizes in (("Emu3", [28, 20]), ("LlavaNext", [14, 16]), ("LlavaOnevision", [14, 16])):
        name += "ForConditionalGeneration"
        names = adapt_side(tiny_hf_model(name), features=True).tokenize(tiny_inputs(name, 2)).sequences[0].strings
        found = [name for name in names if name.startswith("image")]
        assert found == [f"image {image} patch {n}" for image, size in enumerate(sizes) for n in range(size)]
    name = "Gemma4ForConditionalGeneration"
    names = adapt_side(tiny_hf_model(name), features=True).tokenize(tiny_inputs(name, 2)).sequences[0].strings
    expected = [f"image {n} patch {r},{c}" for n, columns in ((0, 3), (1, 2)) for r in (0, 1) for c in range(columns)]
    assert [name for name in names if name.startswith("image")] == expected


def test_where_no_grid_is_known():
    from sinkscope.models.patches import names_inside

    images = {"pixel_values": torch.zeros(2, 3, 16, 16)}
    assert names_inside("image", [3, 4, 5, 8, 9, 10], images, None)[3:] == [f"image 1 patch {n}" for n in range(3)]
    tiles = {"pixel_values": torch.zeros(2, 5, 3, 16, 16), "image_sizes": torch.tensor([[40, 30], [30, 40]])}
    assert names_inside("image", [3, 4, 5, 8], tiles, None) == [*(f"image 0 patch {n}" for n in range(3)), "image 1 patch 0"]
    assert names_inside("image", [3, 4, 5, 6], tiles, None) == [f"image patch {n}" for n in range(4)]
    assert names_inside("video", [3, 4], {"video_grid_thw": torch.tensor([[2, 1, 1]])}, None) == [
        "video 0 patch 0",
        "video 0 patch 1",
    ]
