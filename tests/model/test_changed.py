"""Models that were changed, shared, wrapped, padded: a right number or a refusal that says what to do, never an old proof."""

import copy
import threading
import warnings

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, RobertaConfig, RobertaForMaskedLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import sinkscope as ss
from sinkscope.interventions import EditActivation, ReplaceToken, ZeroValue
from sinkscope.models import adapt
from sinkscope.models.wrap import nothing_installed
from sinkscope.runs.undo import heeded
from sinkscope.testing import tiny_hf_model, tiny_model

LONG, SHORT = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [20, 21, 22, 23, 24]
METRICS = ["sink_mass", "row_entropy"]


def values(report):
    return report.summary("all").set_index("metric")["value"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_weights_changed_after_a_first_call(family):
    model = tiny_model(family)
    ss.measure(model, [LONG], METRICS)
    for block in model.blocks:
        block.attn.q.original_component.weight.data.mul_(3)
    fresh = values(ss.measure(model, [LONG], METRICS, engine="hooks"))
    assert np.allclose(values(ss.measure(model, [LONG], METRICS)), fresh, atol=1e-5)


def test_a_hook_and_a_patch_after_a_first_call():
    model = tiny_hf_model("llama")
    before = values(ss.measure(model, [LONG], METRICS))
    layer = model.model.layers[0].self_attn
    rotate = layer.q_proj.register_forward_hook(lambda module, args, out: 3 * out)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = torch.stack([a[0, :, :, 0].mean() for a in eager(torch.tensor([LONG]), output_attentions=True).attentions])
    after = values(ss.measure(model, [LONG], METRICS))
    assert after["sink_mass"] == pytest.approx(float(theirs.mean()), abs=1e-5)
    assert abs(after["sink_mass"] - before["sink_mass"]) > 1e-4
    rotate.remove()


def test_an_attention_function_of_the_users_is_not_replaced(monkeypatch):
    def mine(module, query, key, value, mask, **how):
        return sdpa_attention_forward(module, query, key, value, mask, **how)

    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", mine)
    model = tiny_hf_model("llama")
    model.set_attn_implementation("mine")
    with pytest.raises(ss.SinkscopeError, match="its attention is 'mine', a function that somebody registered"):
        ss.measure(model, [LONG], METRICS)
    with pytest.raises(ss.InertHookError, match="'mine'"), ss.Window(4).on(model):
        pass


def test_four_threads_on_one_model():
    model, found, failed = tiny_hf_model("llama"), [], []
    expected = values(ss.measure(model, [LONG], METRICS))

    def work():
        try:
            found.extend(values(ss.measure(model, [LONG], METRICS)) for _ in range(4))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert (len(found), failed) == (16, [])
    assert all(np.allclose(one, expected, atol=1e-6) for one in found)
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_a_metric_that_runs_the_model_is_refused():
    model = tiny_model("llama")

    def again(block):
        ss.measure(model, [LONG], ["sink_mass"])
        return block.row_sum

    def plain(block):
        model(torch.tensor([LONG]))
        return block.row_sum

    with pytest.raises(ss.SinkscopeError, match="being run already"):
        ss.measure(model, [LONG], [again])
    with pytest.raises(ss.SinkscopeError, match="a metric ran the model that is being measured"):
        ss.measure(model, [LONG], [plain], engine="hooks")
    assert np.isfinite(values(ss.measure(model, [LONG], METRICS))).all()


EDITS = [ReplaceToken(1, 9), EditActivation(3.0, positions=[0], dims=[1], layers=[1]), ss.MaskKeys(0), ZeroValue(0)]


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_left_pads_and_packed_texts_are_refused_by_every_edit(family, edit):
    model = tiny_model(family)
    pads = len(LONG) - len(SHORT)
    ids, mask = torch.tensor([LONG, [3] * pads + SHORT]), torch.tensor([[1] * len(LONG), [0] * pads + [1] * len(SHORT)])
    packed = torch.tensor([[*range(len(LONG)), *range(len(SHORT))]])
    with torch.no_grad(), edit.on(model):
        with pytest.raises(ss.SinkscopeError, match="padded on the left"):
            model.original_model(input_ids=ids, attention_mask=mask)
        if family != "bloom":  # which takes no position_ids
            with pytest.raises(ss.SinkscopeError, match="packed texts"):
                model.original_model(input_ids=torch.tensor([LONG + SHORT]), position_ids=packed, use_cache=False)
        right = model.original_model(input_ids=ids.flip(0)[:1], attention_mask=torch.ones(1, len(LONG), dtype=torch.long))
        assert torch.isfinite(right.logits).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_cache_of_texts_padded_on_the_left(family):
    model = tiny_model(family)
    pads = len(LONG) - len(SHORT)
    ids = torch.tensor([LONG, [3] * pads + SHORT])
    mask = torch.tensor([[1] * len(LONG), [0] * pads + [1] * len(SHORT)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, cache = model.run_with_cache(ids, attention_mask=mask)
    report = ss.measure(cache, ids, METRICS, attention_mask=mask)
    alone = ss.measure(model, [LONG, SHORT], METRICS, engine="hooks")
    assert np.allclose(report.frame["value"], alone.frame["value"], atol=1e-5)
    other = torch.tensor([LONG, SHORT + [3] * pads])
    with pytest.raises(ss.SinkscopeError, match="row 1 of the cache is not 'text 1'"):
        ss.measure(cache, other, METRICS, attention_mask=torch.ones_like(other))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_under_autocast(family):
    """Numbers are those of the model as autocast runs it, reduced in float32 all the same."""
    model = tiny_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        report = ss.measure(model, [LONG], METRICS, engine="hooks")
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([LONG]))
        effect = ss.evaluate(model, [LONG], "mask_keys(keys=[0])")
    rows = np.concatenate([cache["pattern", layer].double().numpy()[0] for layer in range(model.cfg.n_layers)])
    entropy = -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1).mean()
    assert values(report)["row_entropy"] == pytest.approx(entropy, abs=1e-5)
    assert np.isfinite(effect.frame["loss"]).all()


def test_a_copy_made_inside_an_edit_is_refused():
    model = tiny_hf_model("llama")
    with ss.MaskKeys(0).on(model), pytest.raises(ss.SinkscopeError, match="copy it before or after"):
        copy.deepcopy(model)
    assert copy.deepcopy(model)(torch.tensor([LONG])).logits.shape[1] == len(LONG)


def test_a_metric_on_scores_has_their_shape():
    model = tiny_model("gpt2")

    @ss.metric(needs="attn.hook_attn_scores", null=None)
    def logit(block):
        return block["attn.hook_attn_scores"][..., 0]

    _, cache = model.run_with_cache(torch.tensor([LONG]))
    scores = torch.stack([cache[f"blocks.{layer}.attn.hook_attn_scores"][0, ..., 0] for layer in range(model.cfg.n_layers)])
    assert values(ss.measure(model, [LONG], [logit]))["logit"] == pytest.approx(float(scores.mean()), abs=1e-5)


def test_a_model_of_the_roberta_kind_says_what_it_takes():
    config = RobertaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=34, pad_token_id=1, type_vocab_size=1, architectures=["RobertaForMaskedLM"],
    )  # fmt: skip
    model = RobertaForMaskedLM(config).eval()
    assert np.isfinite(values(ss.measure(model, [list(range(2, 34))], METRICS))).all()
    with pytest.raises(ss.SinkscopeError, match="takes at most 32"):
        ss.measure(model, [list(range(2, 35))], METRICS)


def test_what_people_have_in_hand():
    inner = tiny_hf_model("llama")
    with pytest.raises(ss.SinkscopeError, match=r"pass model\.module"):
        ss.measure(torch.nn.DataParallel(inner), [LONG])
    with pytest.raises(ss.SinkscopeError, match="pass the bridge itself"):
        ss.measure(tiny_model("llama").original_model, [LONG])
    with pytest.raises(ss.SinkscopeError, match="the class LlamaForCausalLM"):
        ss.measure(type(inner), [LONG])
    with pytest.raises(ss.SinkscopeError, match="meta device"):
        ss.measure(inner.to("meta"), [LONG])


@pytest.mark.parametrize("number", [np.int64(1), torch.tensor(1), np.int8(1)], ids=lambda n: type(n).__name__)
def test_numbers_of_any_kind_in_edits(number):
    assert str(ss.SinkWindow(np.int64(8), sinks=number)) == "sink_window(size=8, sinks=1)"
    assert str(ss.MaskKeys([number, 0], layers=number)) == "mask_keys(keys=[1, 0], layers=[1])"
    assert str(ReplaceToken(number, number)) == "replace_token(position=1, token=1)"
    assert ss.MaskKeys(0).placebo(number) == ss.MaskKeys(0).placebo(1)


def test_what_a_run_is_kept_under_knows_every_number_and_switch():
    model = tiny_hf_model("llama")
    adapter = adapt(model)
    states = [adapter.state()]
    with torch.no_grad():
        weight = model.model.layers[0].self_attn.q_proj.weight
        weight.copy_(weight.flip(0))  # the same sum
        states.append(adapter.state())
        model.model.rotary_emb.inv_freq.mul_(3)
        states.append(adapter.state())
    model.config.rms_norm_eps = 0.1
    states.append(adapter.state())
    with torch.autocast("cpu", torch.bfloat16):
        states.append(adapter.state())
    assert len({repr(state) for state in states}) == len(states)
    assert adapter.state() == states[3]


def test_nothing_is_installed_while_a_model_is_wrapped():
    import subprocess

    own = subprocess.run
    with nothing_installed(), pytest.raises(OSError, match="not run while a model is loaded"):
        subprocess.run(["pip", "install", "torchvision"], check=True)
    assert subprocess.run is own


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_lost_is_heeded():
    import os
    import signal

    class Lost:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def run():
        with heeded() as look:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                thing = Lost()
                del thing  # Python drops what is raised here
            look()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("forward", [False, True], ids=["model.compile", "forward = torch.compile"])
def test_tokens_of_a_model_that_was_compiled_for_this_length_are_not_swapped_in_vain(forward):
    """Warm at this length, it passes new hooks by; at another length it would be compiled anew, with them."""
    model, ids = tiny_hf_model("llama"), torch.tensor([LONG])
    if forward:
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        warm = model(ids).logits
        with pytest.raises(ss.InertHookError, match="compiled forward passes hooks by"), ReplaceToken(0, 9).on(model):
            model(ids)
        torch.testing.assert_close(model(ids).logits, warm)
    torch._dynamo.reset()
