"""The public functions on models on a GPU: the numbers of the CPU, whoever asks; nothing is left on the wrong device."""

import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import interventions as edits
from sinkscope.metrics import BUILT_IN
from sinkscope.testing import FAMILIES, planted_sink, tiny_hf_model, tiny_model
from tests.conftest import DEVICE, TEXTS, attempt, fingerprint, fresh, table, total
from tests.model.compare import IDS, NOT_FLASH, check_all, tiny_reference

pytestmark = pytest.mark.gpu
WITH_ATTENTION = [family for family in FAMILIES if family != "mamba"]
HOWS = {"one shot": {"engine": "hooks", "chunk": None}, "chunks": {"engine": "hooks", "chunk": 16}, "auto": {}}
SOME = ["llama", "gpt2", "gemma2", "gpt_oss", "bert"]
LINE = torch.randint(3, 60, (48,), generator=torch.Generator().manual_seed(1))
EDITS = [
    ss.Window(9),
    ss.SinkWindow(9, sinks=2),
    ss.MaskKeys(0),
    ss.MaskKeys([0, 3], heads=[1], layers=[1, 2]),
    edits.ZeroAttention(0),
    edits.ZeroValue([0, 2]),
    edits.MeanValue(0),
    edits.ReplaceToken(0, 9),
    edits.DropTokens(0),
    edits.EditActivation(4.0, positions=[0, 2], dims=[3, 5], layers=1),
    edits.EditActivation("mean", positions=[0], dims=[3], layers=1),
    edits.RecomputeWindow(7),
]


@pytest.fixture(scope="session")
def there():
    """Give the tiny model of a family on the device; `plain`: Hugging Face's, without a bridge."""
    return functools.cache(
        lambda family, plain=False: tiny_hf_model(family).to(DEVICE) if plain else fresh(tiny_model(family).to(DEVICE))
    )


def same(ours, theirs, tolerance):
    """Every row of two reports, the nulls included."""
    labels = [c for c in theirs.frame if c not in ("value", "std_error", "null", "model")]
    assert ours.frame[labels].equals(theirs.frame[labels])
    for column in ("value", "std_error", "null"):
        a, b = ours.frame[column].to_numpy(float), theirs.frame[column].to_numpy(float)
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=column)


# --- measure ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_measure_is_hugging_faces(there, family, how):
    """Four texts in two padded batches, every default metric, against loops over `output_attentions` on the CPU."""
    if family == "bert" and how == "chunks":
        pytest.skip("an encoder has no chunks")
    report = ss.measure(there(family), IDS, **HOWS[how])
    assert report.about["device"].startswith(DEVICE.type)
    if how == "auto":
        assert report.about["engine"] == ("hooks" if family in NOT_FLASH else "flash")
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


@pytest.mark.parametrize(
    ("family", "how"), [("llama", "one shot"), ("llama", "auto"), ("gpt2", "one shot"), ("gpt_oss", "auto"), ("bert", "auto")]
)
def test_all_metrics_are_those_of_the_cpu(there, tiny, family, how):
    """The built-in ones, of queries, keys, values and the residual stream too; several keys; one of the user's."""
    texts, metrics = {label: IDS[label] for label in ("text 0", "text 3")}, [*BUILT_IN, travelled]
    asked = {"key": [0, -1], **HOWS[how]}
    same(ss.measure(there(family), texts, metrics, **asked), ss.measure(tiny(family), texts, metrics, **asked), 2e-5)


@ss.metric(needs=("pattern", "residual"), null=None)
def travelled(block):
    """Whatever a user's metric can ask a block for, all on one device."""
    parts = [block.pattern, block.mass, block.row_sum, block.entropy, block.valid, block.sees_key, block.n_visible]
    assert len({x.device for x in (*parts, block.keys, block.lengths, block.tokens, block["residual"])}) == 1
    return (block.pattern * block.distance).sum(-1) + block["residual"].norm(dim=-1)[:, None] / (block.queries + 1)


@pytest.mark.parametrize("family", SOME)
def test_plain_hugging_face(there, family):
    report = ss.measure(there(family, plain=True), IDS)
    assert report.about["engine"] == "flash"
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


def test_texts_ids_and_masks_from_anywhere(there, saved_model):
    """Strings, ids on the CPU and on the device, a padded batch with its mask; a model that chose its device itself."""
    model = ss.load_model(saved_model)
    assert ss.measure(model, TEXTS, ["sink_mass"]).about["device"].startswith(DEVICE.type)
    same(ss.measure(model, TEXTS), ss.measure(ss.load_model(saved_model, device="cpu"), TEXTS), 2e-5)
    ids = torch.tensor([IDS["text 0"] + [0] * 6, IDS["text 3"]])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    expected = ss.measure(there("llama"), [IDS["text 0"], IDS["text 3"]])
    for where in ("cpu", DEVICE):
        same(ss.measure(there("llama"), ids.to(where), attention_mask=mask.to(where)), expected, 2e-5)


def test_what_the_sink_is_known_to_be():
    """The planted sink, in closed form, in every precision."""
    texts = {"a": "so it goes", "b": "attention, please: it sinks"}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)):
        model = planted_sink().to(DEVICE).to(dtype)
        for engine in ("hooks", "flash"):
            report = ss.measure(model, texts, ["sink_mass"], engine=engine, bos=True)
            for label, text in texts.items():
                queries = np.arange(1 + len(text))
                c = np.arange(8.0).reshape(2, 4)[..., None]
                expected = (np.exp(c) / (np.exp(c) + queries)).mean(-1)
                np.testing.assert_allclose(table(report, "sink_mass", label), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_half_precision(family, dtype, tiny, record_property):
    expected = table(ss.measure(tiny(family), IDS, ["sink_mass"]), "sink_mass", "all")
    model = tiny_model(family).to(DEVICE).to(dtype)
    for how in HOWS:
        report = ss.measure(model, IDS, ["sink_mass", "row_deficit"], **HOWS[how])
        assert report.about["dtype"] == str(dtype).removeprefix("torch.")
        error = float(np.abs(table(report, "sink_mass", "all") - expected).mean())
        record_property(f"mean sink_mass {report.about['dtype']} {how}", error)
        assert error < 0.02
        if family != "gpt_oss":
            assert abs(total(report, "row_deficit", "all")) < 0.005


def test_reduced_products(there, tiny):
    """Where the user lets float32 products be rounded (TF32), numbers are worse, and still those of the model."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        report = ss.measure(there("llama"), IDS, ["sink_mass", "row_deficit"])
    finally:
        torch.set_float32_matmul_precision(before)
    expected = ss.measure(tiny("llama"), IDS, ["sink_mass"])
    np.testing.assert_allclose(table(report, "sink_mass"), table(expected, "sink_mass"), atol=5e-3)


@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_a_model_is_left_as_it_was(there, engine):
    model = there("llama")
    before = fingerprint(model)
    first, again = (ss.measure(model, IDS, engine=engine) for _ in range(2))
    ss.evaluate(model, [LINE], EDITS[:2])
    assert fingerprint(model) == before
    assert first.frame.equals(again.frame), "two runs differ"


def test_a_cache_of_activations(there):
    ids = torch.tensor([IDS["text 2"]], device=DEVICE)
    with torch.no_grad():
        _, cache = there("llama").run_with_cache(ids)
    same(ss.measure(cache, ids), ss.measure(there("llama"), ids, engine="hooks", chunk=None), 1e-6)


def test_a_report_is_saved_resumed_and_shown(there, tmp_path):
    once = ss.measure(there("llama"), IDS, resume=tmp_path)
    again = ss.measure(there("llama"), IDS, resume=tmp_path)
    assert once.frame.equals(again.frame)
    once.save(tmp_path)
    assert ss.load_report(tmp_path).frame["value"].equals(once.frame["value"])


def test_a_map_of_attention(there, tiny):
    ours, theirs = (ss.attention_map(model("llama"), IDS["text 2"])["value"] for model in (there, tiny))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --- edits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2", "gpt_oss"])
def test_evaluate_is_that_of_the_cpu(there, tiny, family):
    """All edits at once, two texts of unequal lengths; StreamingWindow where it is defined."""
    asked = [*EDITS, *([edits.StreamingWindow(9, sinks=2)] if family == "llama" else [])]
    texts = {"a": LINE, "b": LINE[:30]}
    ours, theirs = (ss.evaluate(model(family), texts, asked) for model in (there, tiny))
    assert ours.about["device"].startswith(DEVICE.type)
    for column in ("loss", "kl", "delta_loss", "std_error"):
        a, b = (report.frame[column].to_numpy(float) for report in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-4, err_msg=column)
    np.testing.assert_allclose(ours.frame["sink_mass"], theirs.frame["sink_mass"], atol=1e-5)
    assert ours.frame["sink_position"].equals(theirs.frame["sink_position"])
    np.testing.assert_allclose(ours.curves["loss"], theirs.curves["loss"], atol=1e-4)


def test_a_stream_longer_than_the_context(there, tiny):
    ids = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(5))
    edit = edits.StreamingWindow(16, sinks=2)
    ours, theirs = (ss.evaluate(model("llama"), [ids], edit, score_from=40) for model in (there, tiny))
    np.testing.assert_allclose(ours.curves["loss"], theirs.curves["loss"], atol=1e-4)


def test_located_activations(there, tiny):
    """Random weights have no activation of the size that is looked for: the error tells the largest there is."""
    said = [str(attempt(functools.partial(edits.EditActivation().located, model("llama"), LINE))) for model in (there, tiny)]
    assert said[0] == said[1]
    assert "The largest is" in said[0]


@pytest.mark.parametrize("edit", [*EDITS[:4], edits.ZeroAttention(0), edits.StreamingWindow(7, sinks=2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generation_under_an_edit(there, tiny, family, edit):
    """With the KV cache: each step's scores are those of one forward pass under the edit, on this device and on the CPU."""
    if family != "llama" and isinstance(edit, edits.StreamingWindow):
        pytest.skip("no streaming window there")
    start = LINE[None, :12].to(DEVICE)
    how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for model in (there(family), there(family, plain=True)):
        network = getattr(model, "original_model", model)
        with torch.no_grad(), edit.on(model):
            out = network.generate(start, output_scores=True, return_dict_in_generate=True, **how)
            again = network(out.sequences).logits[0, 11:-1]
        torch.testing.assert_close(torch.cat(out.scores), again, atol=1e-4, rtol=0)
        with torch.no_grad(), edit.on(tiny(family)):
            expected = tiny(family)(out.sequences.cpu())[0, 11:-1]
        torch.testing.assert_close(again.cpu(), expected, atol=1e-4, rtol=0)


def test_gradients_under_an_edit(there, tiny):
    found = []
    for model, where in ((there("llama"), DEVICE), (tiny("llama"), "cpu")):
        with ss.SinkWindow(9, sinks=1).on(model):
            loss = model(LINE[None].to(where), return_type="loss")
            parameter = model.original_model.model.layers[0].self_attn.k_proj
            weight = getattr(parameter, "original_component", parameter).weight
            (gradient,) = torch.autograd.grad(loss, [weight])
        found.append(gradient.cpu())
    assert float(found[1].abs().max()) > 0
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-3)


def test_a_study(there, tiny):
    """Over-mixing changes tokens, masks keys and looks at every layer."""
    how = {"sequences": 2, "tokens": 32, "changes": 2}
    ours, theirs = (ss.studies.over_mixing(model("llama"), TEXTS["c"] * 8, **how) for model in (there, tiny))
    a, b = (report.ours["value"].to_numpy(float) for report in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=1e-4)
