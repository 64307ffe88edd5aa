"""Encoder-decoders: each of their three attentions, against Hugging Face's own (eager, float32, another copy)."""

import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_tokenizer
from tests.conftest import fingerprint, most_slow, table, total
from tests.model.compare import close

SIDES = ["decoder", "encoder", "cross"]
RIGHT = [
    "t5",
    "marian",
    "bart",
    "pegasus",
    "m2m_100",
    "mt5",
    "mbart",
    "blenderbot",
    "switch",
    "t5gemma",
    "Florence2ForConditionalGeneration",
]
METRICS = ["sink_mass", "row_entropy", "received_profile", "effective_keys", "last_row_share", "first_to_rest_ratio"]
KEY = 2


def ids(length, seed):
    """A text for a tiny model: pads' id (0) and EOS inside, where a batch has pads of id 0."""
    found = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    found[1:3] = [0, 2]
    return found


#: Sources and targets of different lengths, in an order of lengths that is not the same: all in one padded batch.
PAIRS = {f"text {i}": (ids(s, s), [1, *ids(t - 1, 9 * t)]) for i, (s, t) in enumerate([(21, 11), (9, 20), (14, 13), (5, 16)])}


@functools.cache
def expected(family, side, label, attention="eager"):
    """`output_attentions` of one pair alone, `[layer, head, query, key]` in float64."""
    network = tiny_hf_model(family)
    source, target = (torch.tensor([row]) for row in PAIRS[label])
    masks = {"attention_mask": torch.ones_like(source), "decoder_attention_mask": torch.ones_like(target)}
    with torch.no_grad():
        out = network(input_ids=source, decoder_input_ids=target, output_attentions=True, **masks)
    name = {"decoder": "decoder_attentions", "encoder": "encoder_attentions", "cross": "cross_attentions"}[side]
    return torch.cat(getattr(out, name)).double().numpy()


def entropy(rows):
    return -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1)


def right(report, family, side, key=0, pairs=PAIRS, tol=1e-5):
    """Compare every text with plain reductions of whole patterns, and with a null that is counted by hand."""
    for label in pairs:
        a = expected(family, side, label)
        queries, keys = a.shape[2:]
        sees = np.tri(queries, dtype=bool) if side == "decoder" else np.ones((queries, keys), dtype=bool)
        chance = sees / sees.sum(1, keepdims=True)
        for of, column in ((a, "value"), (chance[None, None], "null")):
            found = {name: table(report, name, label, column) for name in METRICS[:5]}
            same = functools.partial(np.testing.assert_allclose, rtol=0, atol=tol)
            same(found["sink_mass"], np.broadcast_to(of[..., key].mean(-1), a.shape[:2]), err_msg=f"{label} {column}")
            same(found["last_row_share"], np.broadcast_to(of[..., -1, key], a.shape[:2]))
            same(found["row_entropy"], np.broadcast_to(entropy(of).mean(-1), a.shape[:2]))
            same(found["received_profile"], np.broadcast_to(of.sum(2).mean(1) / sees.sum(0), (len(a), keys)))
            np.testing.assert_allclose(
                found["effective_keys"], np.broadcast_to(np.exp(entropy(of)).mean(-1), a.shape[:2]), rtol=tol
            )
        m = a[..., key].mean()
        assert abs(total(report, "first_to_rest_ratio", label) - m / (1 - m) * (keys - 1)) < 1e-3


def test_the_batch_is_padded_on_both_sides():
    tokens = ss.models.adapt_side(tiny_hf_model("t5"), "cross").tokenize(PAIRS)
    (batch,) = tokens.batches(8)
    assert [len(s) for s in batch.sequences] == [11, 13, 16, 20]
    assert batch.sources.lengths.tolist() == [21, 14, 5, 9]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(RIGHT, *RIGHT[:5]))
def test_every_side_is_hugging_faces(family, side):
    model = tiny_hf_model(family)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]), decoder_input_ids=torch.tensor([[1, 7]]))  # leaves a mark of Switch's own
    before = fingerprint(model)
    report = ss.measure(model, PAIRS, METRICS, side=side)
    assert fingerprint(model) == before
    assert (report.about["engine"], report.about["side"]) == ("flash", side)
    assert f"({side})" in str(report)
    right(report, family, side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_another_key_and_one_text_at_a_time(family, side):
    model = tiny_hf_model(family)
    report = ss.measure(model, PAIRS, METRICS, side=side, key=KEY)
    right_at = {label: expected(family, side, label)[..., KEY].mean(-1) for label in PAIRS}
    for label, pair in PAIRS.items():
        if side != "decoder":
            np.testing.assert_allclose(table(report, "sink_mass", label), right_at[label], atol=1e-5)
        one = ss.measure(model, [pair], METRICS, side=side, key=KEY)
        for name in METRICS[:5]:
            close(table(report, name, label), table(one, name), name)


@pytest.mark.parametrize("engine", ["flash", "hooks"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(["t5", "bart", "marian", "pegasus", "m2m_100", "mbart"], "t5", "bart"))
def test_a_bridge_is_right_by_both_engines(tiny, family, side, engine):
    report = ss.measure(tiny(family), PAIRS, METRICS, side=side, engine=engine)
    assert report.about["engine"] == engine
    right(report, family, side)


def test_windows_of_encoder_and_decoder():
    """T5Gemma's encoder sees WINDOW keys on both sides, its decoder WINDOW keys with its own, on the first layer alone."""
    model = tiny_hf_model("t5gemma")
    assert ss.models.adapt_side(model, "encoder").windows == {0: 9}
    assert ss.models.adapt_side(model, "decoder").windows == {0: 8}
    assert ss.models.adapt_side(model, "cross").windows == {}
    for side in ("encoder", "decoder"):
        report = ss.measure(model, PAIRS, ["visible_sink_mass", "sink_mass", "row_entropy"], side=side)
        a = expected("t5gemma", side, "text 0")
        gap = np.subtract.outer(np.arange(a.shape[2]), np.arange(a.shape[3]))
        sees = abs(gap) <= 8 if side == "encoder" else (gap >= 0) & (gap < 8)
        chance = (sees / sees.sum(1, keepdims=True))[sees[:, 0], 0].mean()
        np.testing.assert_allclose(table(report, "visible_sink_mass", "text 0", "null")[0], chance, atol=1e-6)
        np.testing.assert_allclose(
            table(report, "visible_sink_mass", "text 0")[0], a[0][:, sees[:, 0], 0].mean(-1), atol=1e-5
        )
        np.testing.assert_allclose(table(report, "row_entropy", "text 0"), entropy(a).mean(-1), atol=1e-5)


# --- texts ----------------------------------------------------------------------------------------------------------


def with_tokenizer(family="t5"):
    model = tiny_hf_model(family)
    model.tokenizer = tiny_tokenizer(family)
    return model


def test_strings_are_read_as_in_training():
    """The source ends with EOS; the target stands behind the decoder's start token, without its last."""
    model = with_tokenizer()
    tokens = ss.models.adapt_side(model, "cross").tokenize([("a b", "c d")])
    (text,) = tokens.sequences
    labels = model.tokenizer(text_target="c d")["input_ids"]
    assert text.source.ids.tolist() == model.tokenizer("a b")["input_ids"]
    assert text.ids.tolist() == [1, *labels[:-1]]
    assert text.source.strings[-1] == "<eos>"
    assert tokens.bos == "sources: special tokens added (the model's convention); targets: behind the decoder's start token"


@pytest.mark.parametrize("side", SIDES)
def test_the_same_pairs_in_every_form(side, tmp_path):
    pairs = list(PAIRS.values())
    pads = [(torch.nn.utils.rnn.pad_sequence([torch.tensor(p[i]) for p in pairs], batch_first=True)) for i in (0, 1)]
    masks = [
        (torch.arange(x.shape[1]) < torch.tensor([len(p[i]) for p in pairs])[:, None]).long() for i, x in enumerate(pads)
    ]
    encoding = {"input_ids": pads[0], "attention_mask": masks[0]}
    encoding |= {"decoder_input_ids": pads[1], "decoder_attention_mask": masks[1]}
    rows = [{"source": source, "target": target} for source, target in pairs]
    model = tiny_hf_model("t5")
    given = [pairs, PAIRS, encoding, iter([encoding]), rows, iter(rows)]
    given.append(ss.models.adapt_side(model, "decoder").tokenize(pairs))
    reports = [ss.measure(model, texts, ["sink_mass", "row_entropy"], side=side) for texts in given]
    for report in reports:
        for text in PAIRS:
            np.testing.assert_array_equal(table(report, "row_entropy", text), table(reports[0], "row_entropy", text))


def test_one_pair_is_a_tuple_and_a_list_holds_sources():
    adapter = ss.models.adapt_side(with_tokenizer(), "encoder")
    assert len(adapter.tokenize(("so it goes", "a fox"))) == 1
    assert len(adapter.tokenize(["so it goes", "a fox"])) == 2
    assert len(adapter.tokenize([5, 6, 7])) == 1


@pytest.mark.parametrize("side", ["decoder", "cross"])
def test_a_source_alone_gets_the_target_that_the_model_writes(side):
    model = tiny_hf_model("bart")
    source = torch.tensor([PAIRS["text 1"][0]])
    written = model.generate(source, max_new_tokens=12, do_sample=False, num_beams=1)[0, :-1].tolist()
    report = ss.measure(model, [source[0]], ["sink_mass", "row_entropy"], side=side, max_tokens=12)
    other = ss.measure(model, [(source[0], written)], ["sink_mass", "row_entropy"], side=side)
    assert "generated greedily" in report.about["bos"]
    np.testing.assert_array_equal(table(report, "row_entropy"), table(other, "row_entropy"))


def test_what_is_no_text_of_an_encoder_decoder_is_refused():
    plain, named = tiny_hf_model("bart"), with_tokenizer()
    refused = [
        (plain, [("a", "b")], "no tokenizer"),
        (plain, [([5, 6, 7], "b c")], "no tokenizer"),
        (plain, [([5, 6, 7], [1])], "at least 2"),
        (plain, [([5], [1, 2, 3])], "at least 2"),
        (plain, [([], [1, 2, 3])], "empty source"),
        (plain, [([5, 6, 99], [1, 2, 3])], "token id 99"),
        (plain, [([5, 6, 7], [1, 2, 99])], "token id 99"),
        (plain, [([5] * 129, [1, 2, 3])], "129 tokens"),
        (plain, [([5, 6, 7], [1] * 129)], "129 tokens"),
        (plain, [], "no texts"),
        (named, 5, "expected one or several"),
        (
            plain,
            {"input_ids": torch.ones(2, 4).long(), "decoder_input_ids": torch.ones(3, 4).long()},
            "2 sources and 3 targets",
        ),
    ]
    for model, texts, why in refused:
        with pytest.raises(ss.SinkscopeError, match=why):
            ss.measure(model, texts, "sink_mass", side="cross")
    with pytest.raises(ss.SinkscopeError, match=r"has no source.*pair"):
        ss.measure(plain, ss.tokenize(None, [[5, 6, 7]]), "sink_mass", side="cross")


@pytest.mark.parametrize(
    ("family", "side", "why"),
    [
        ("llama", "encoder", "a decoder alone.*leave side out"),
        ("llama", "cross", "a decoder alone.*T5"),
        ("bert", "decoder", "an encoder alone"),
        ("t5", "crossed", "did you mean 'cross'"),
    ],
)
def test_a_side_that_a_model_has_not(family, side, why):
    with pytest.raises(ss.SinkscopeError, match=why):
        ss.measure(tiny_hf_model(family), [[1, 5, 6, 7]], "sink_mass", side=side)


def test_the_only_side_of_a_model_may_be_named():
    for family, side in (("llama", "decoder"), ("bert", "encoder")):
        one, other = (ss.measure(tiny_hf_model(family), [[1, 5, 6, 7]], "sink_mass", side=s) for s in (side, None))
        assert total(one, "sink_mass") == total(other, "sink_mass")


def test_a_body_without_a_head_needs_pairs():
    from transformers import T5Model

    body = T5Model(tiny_hf_model("t5").config).eval()
    with pytest.raises(ss.SinkscopeError, match=r"no language-model head.*pair.*side='encoder'"):
        ss.measure(body, [[5, 6, 7]], "sink_mass", side="cross")
    assert ss.measure(body, [([5, 6, 7], [1, 2, 3])], "sink_mass", side="cross").about["side"] == "cross"


def test_what_takes_no_encoder_decoder_says_what_does():
    model = tiny_hf_model("t5")
    for verb in (
        lambda: ss.sink_mask(model, list(PAIRS.values())),
        lambda: ss.studies.first_token(model),
    ):
        with pytest.raises(ss.SinkscopeError, match=r"encoder-decoder, which has three attentions.*side="):
            verb()


def test_led_takes_hooks(tiny):
    """Its code looks no attention function up: a bridge's hooks see the decoder, and nobody its encoder's slices."""
    for side in ("decoder", "cross"):
        with pytest.raises(ss.SinkscopeError, match=r"LED.*does not ask Hugging Face's attention interface.*wrap it"):
            ss.measure(tiny_hf_model("led"), PAIRS, "sink_mass", side=side)
        report = ss.measure(tiny("led"), PAIRS, METRICS, side=side)
        assert report.about["engine"] == "hooks"
        right(report, "led", side)
    with pytest.raises(ss.SinkscopeError, match=r"sliding attention.*side='decoder' and 'cross' can"):
        ss.measure(tiny("led"), PAIRS, "sink_mass", side="encoder")


def test_hook_points_that_give_no_attention_are_found_out(tiny):
    """Those of TransformerLens's Switch give the bias of positions."""
    with pytest.raises(ss.SinkscopeError, match=r"give no attention.*leave engine out"):
        ss.measure(tiny("switch"), PAIRS, "sink_mass", engine="hooks")
    report = ss.measure(tiny("switch"), PAIRS, METRICS, side="cross")
    assert report.about["engine"] == "flash"
    right(report, "switch", "cross")


# --- reports --------------------------------------------------------------------------------------------------------


def test_every_metric_has_a_value_in_cross_attention(tmp_path):
    """Those of values and keys are of the source's positions, those of outputs of the target's."""
    model = tiny_hf_model("bart")
    wanted = [
        "sink_mass",
        "value_drain",
        "key_norm",
        "key_drain",
        "query_key_cosine",
        "sink_output_share",
        "head_output_norm",
    ]
    report = ss.measure(model, PAIRS, [*wanted, "query_profile", "sink_positions", "nop_rate@0.5"], side="cross")
    found = {}

    def keep(name):
        return lambda module, args, output: found.__setitem__(name, output.detach())

    attention = model.get_decoder().layers[1].encoder_attn
    hooks = [getattr(attention, f"{n}_proj").register_forward_hook(keep(n)) for n in "vk"]
    source, target = (torch.tensor([row]) for row in PAIRS["text 2"])
    with torch.no_grad():
        model(input_ids=source, decoder_input_ids=target)
    for hook in hooks:
        hook.remove()
    for name, of in (("value_drain", "v"), ("key_drain", "k")):
        norms = found[of].reshape(source.shape[1], 4, -1).norm(dim=-1).numpy()
        np.testing.assert_allclose(table(report, name, "text 2")[1], norms[0] / np.median(norms, axis=0), rtol=1e-4)
    rows = report.frame.query("metric == 'query_profile' and text == 'text 2' and layer == 1 and head == 0")
    np.testing.assert_allclose(rows["value"], expected("bart", "cross", "text 2")[1, 0, :, 0], atol=1e-5)
    np.testing.assert_allclose(rows["null"], 1 / source.shape[1])
    assert [len(t["tokens"]) for t in report.about["texts"]] == [len(p[0]) for p in PAIRS.values()]
    assert [len(t["queries"]) for t in report.about["texts"]] == [len(p[1]) for p in PAIRS.values()]
    report.save(tmp_path / "out")
    again = ss.load_report(tmp_path / "out")
    assert again.about["side"] == "cross"
    assert "(cross)" in (tmp_path / "out" / "report.html").read_text()


def test_a_key_is_a_token_of_the_source():
    model = with_tokenizer()
    report = ss.measure(model, [("so, it goes", "a brown fox")], "sink_mass", side="cross", key=",")
    assert set(report.frame["key"]) == {2}
    with pytest.raises(ss.SinkscopeError, match="does not occur"):
        ss.measure(model, [("so it goes", "a, brown fox")], "sink_mass", side="cross", key=",")


@pytest.mark.parametrize("side", ["decoder", "cross"])
def test_some_queries_alone(side):
    """By position, and by the loss of the next target token, which Hugging Face gives with `labels`."""
    model = tiny_hf_model("bart")
    source, target = (torch.tensor([row]) for row in PAIRS["text 0"])
    with torch.no_grad():
        logits = model(input_ids=source, decoder_input_ids=target).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="none").numpy()
    half = float(np.median(losses)) + 1e-4
    a = expected("bart", side, "text 0")[..., 0]
    late = ss.measure(model, PAIRS, "sink_mass", side=side, where=ss.where.positions(4, None))
    np.testing.assert_allclose(table(late, "sink_mass", "text 0"), a[..., 4:].mean(-1), atol=1e-5)
    hard = ss.measure(model, PAIRS, "sink_mass", side=side, where=ss.where.next_loss(above=half))
    np.testing.assert_allclose(table(hard, "sink_mass", "text 0"), a[..., :-1][..., losses > half].mean(-1), atol=1e-5)


def test_going_on_looks_at_sources(tmp_path):
    """The same targets beside other sources are other texts."""
    model = tiny_hf_model("t5")
    other = {label: (source[::-1], target) for label, (source, target) in PAIRS.items()}
    first = ss.measure(model, PAIRS, "sink_mass", side="cross", resume=tmp_path)
    second = ss.measure(model, other, "sink_mass", side="cross", resume=tmp_path)
    third = ss.measure(model, other, "sink_mass", side="cross")
    assert total(second, "sink_mass") == total(third, "sink_mass") != total(first, "sink_mass")


@pytest.mark.parametrize("side", SIDES)
def test_the_map_of_one_pair(side):
    shown = ss.attention_map(tiny_hf_model("t5"), PAIRS["text 0"], side=side, layer=1, head=2)
    a = expected("t5", side, "text 0")[1, 2]
    np.testing.assert_allclose(shown["value"].to_numpy().reshape(a.shape), a, atol=1e-5)
    source, target = PAIRS["text 0"]
    assert list(shown["key_token"][: a.shape[1]]) == [str(i) for i in (target if side == "decoder" else source)]


# --- edits ----------------------------------------------------------------------------------------------------------


def masked_losses(family, label, hidden):
    """Hugging Face's losses under a mask of the decoder's own attention: `hidden[query, key]` are not seen."""
    network = tiny_hf_model(family)
    source, target = (torch.tensor([row]) for row in PAIRS[label])
    t = target.shape[1]
    seen = torch.ones(t, t, dtype=torch.bool).tril() & ~(
        hidden(torch.arange(t)[:, None], torch.arange(t)) & ~torch.eye(t).bool()
    )
    mask = torch.zeros(t, t).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    memory = network.get_encoder()(input_ids=source).last_hidden_state
    with torch.no_grad():
        logits = network(
            encoder_outputs=(memory,),
            attention_mask=torch.ones_like(source),
            decoder_input_ids=target,
            decoder_attention_mask=mask,
            use_cache=False,
        ).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], target[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("family", most_slow(["t5", "bart", "marian", "pegasus", "m2m_100"], "t5", "bart"))
def test_edits_of_the_decoder_are_a_masks(family, monkeypatch):
    """Also where rows come in blocks, of which a window's later ones hold no first keys."""
    monkeypatch.setattr("sinkscope.capture.attend.ROWS", 6)
    model = tiny_hf_model(family)
    before = fingerprint(model)
    edits = {
        "none": lambda i, k: (i < 0) & (k < 0),
        "window(size=5)": lambda i, k: i - k >= 5,
        "sink_window(size=5, sinks=1)": lambda i, k: (i - k >= 4) & (k >= 1),
        "mask_keys(keys=[2])": lambda i, k: (k == 2) & (i >= 0),
    }
    effect = ss.evaluate(model, PAIRS, [name for name in edits if name != "none"])
    assert fingerprint(model) == before
    for name, hidden in edits.items():
        for label in PAIRS:
            rows = effect.curves[(effect.curves["intervention"] == name) & (effect.curves["text"] == label)]
            np.testing.assert_allclose(rows["loss"], masked_losses(family, label, hidden), atol=2e-5, rtol=1e-5)


def test_the_edits_that_have_no_meaning_there_are_refused():
    model = tiny_hf_model("bart")
    for edit in ("streaming_window(size=5, sinks=1)", "replace_value(keys=[0], by='donor')"):
        with pytest.raises(ss.SinkscopeError, match=r"encoder-decoder, whose decoder.*sink_window"):
            ss.evaluate(model, PAIRS, edit)
    for edit in ("drop_tokens(positions=[0])", "zero_head(heads=[0])", "zero_neuron(layer=1, neurons=[0])"):
        assert len(ss.evaluate(model, PAIRS, edit).curves)


# --- the command line -----------------------------------------------------------------------------------------------


def test_the_command_line_takes_sides(tmp_path):
    from typer.testing import CliRunner

    from sinkscope.cli import app

    directory = tmp_path / "tiny-t5"
    tiny_hf_model("t5").save_pretrained(directory)
    tiny_tokenizer("t5").save_pretrained(directory)
    run = CliRunner().invoke
    given = ["--text", "so it goes", "--target", "a fox", "--text", "the fox", "--metric", "sink_mass"]
    wrong = run(app, ["measure", str(directory), *given, "--side", "cross"])
    assert wrong.exit_code == 1
    assert "1 --target and 2 text(s)" in wrong.output
    given += ["--target", "it was", "--out", str(tmp_path / "out")]
    done = run(app, ["measure", str(directory), *given, "--side", "cross"])
    assert done.exit_code == 0, done.output
    report = ss.load_report(tmp_path / "out")
    assert report.about["side"] == "cross"
    model = ss.load_model(str(directory))
    pairs = {"text 0": ("so it goes", "a fox"), "text 1": ("the fox", "it was")}
    assert total(report, "sink_mass", "all") == pytest.approx(
        total(ss.measure(model, pairs, "sink_mass", side="cross"), "sink_mass", "all")
    )
