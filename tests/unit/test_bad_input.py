"""What is refused, in which words; and that a run which fails leaves the model as it was."""

import contextlib

import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_model
from tests.conftest import TEXTS, attempt, fingerprint, fresh, table

TEXT = "so it goes"
CONTEXT = 128


def refused(message, model, texts=TEXT, *args, **how):
    """Check the error; that it comes in our words on one subject; and that the model is untouched."""
    before = fingerprint(model)
    with pytest.raises(ss.SinkscopeError, match=message) as caught:
        ss.measure(model, texts, *args, **how)
    assert fingerprint(model) == before
    return str(caught.value)


# --- before anything runs --------------------------------------------------------------------------------------------


@pytest.fixture
def never_runs(llama):
    """A model that must not be run."""

    def fail(*_, **__):
        raise AssertionError("the model was run")

    handle = llama.original_model.base_model.register_forward_pre_hook(fail)
    yield llama
    handle.remove()


@pytest.mark.parametrize(
    ("texts", "how", "message"),
    [
        ("", {}, "text 0 is empty"),
        ({"x": "ab", "y": " "}, {}, r"text 1 \('y'\) is empty"),
        ([[5, 6], [7]], {}, r"text 1 has 1 token\(s\); attention needs at least 2"),
        ("a", {"bos": False}, r"text 0 has 1 token\(s\)"),
        ("a" * 128, {}, r"'text 0' has 129 tokens, but tiny-llama takes at most 128.*max_tokens=128.*windowed intervention"),
        ([[5, 64]], {}, "'text 0' has token id 64; tiny-llama has 0 to 63"),
        (TEXT, {"metrics": ["sinkmass"]}, r"unknown metric 'sinkmass'; did you mean 'sink_mass'\? Available: .*row_entropy"),
        (TEXT, {"metrics": "sink_mas"}, "did you mean 'sink_mass'"),
        (TEXT, {"metrics": []}, "no metrics asked for"),
        (TEXT, {"metrics": ["sink_mass@0.3"]}, "metric 'sink_mass' takes no threshold: write 'sink_mass'"),
        (TEXT, {"metrics": ["consistency@0.3"]}, "takes no threshold"),
        (TEXT, {"metrics": ["sink_rate@high"]}, "the threshold after @ must be a number, as in 'sink_rate@0.3'"),
        (TEXT, {"metrics": ["sink_rate@nan"]}, "threshold"),
        (TEXT, {"key": 11}, "key=11 lies outside 'text 0', whose positions are 0 to 10"),
        (TEXT, {"key": [0, -12]}, "key=-12 lies outside 'text 0', whose positions are 0 to 10"),
        (TEXT, {"key": "[SEP]"}, r"key='\[SEP\]' does not occur in 'text 0'"),
        (TEXT, {"key": []}, "key"),
        (TEXT, {"engine": "hook"}, r"unknown engine 'hook'; did you mean 'hooks'\? Available: auto, .*hooks"),
        (TEXT, {"chunk": 0}, "chunk=0: give a number of query rows"),
        (TEXT, {"chunk": "some"}, "chunk='some': give a number"),
        (TEXT, {"max_tokens": 1}, "max_tokens=1: at least 2"),
        (TEXT, {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_refused_before_the_model_runs(never_runs, texts, how, message):
    refused(message, never_runs, texts, how.pop("metrics", None), **how)


def test_a_text_as_long_as_the_context_is_fine(llama):
    assert ss.measure(llama, "a" * (CONTEXT - 1), ["sink_mass"]).about["texts"][0]["n_tokens"] == CONTEXT
    assert ss.measure(llama, "a" * 500, ["sink_mass"], max_tokens=CONTEXT).about["texts"][0]["n_tokens"] == CONTEXT


def test_a_model_without_attention():
    mamba = tiny_model("mamba")
    with pytest.raises(ss.SinkscopeError, match=r"MambaForCausalLM.*no attention pattern.*State-space.*such as gpt2"):
        ss.measure(mamba, TEXT)


@pytest.mark.parametrize("thing", ["gpt2", None, torch.nn.Linear(2, 2)])
def test_what_is_no_transformer_lens_model(thing):
    with pytest.raises(ss.SinkscopeError, match=rf"a {type(thing).__name__} is .*TransformerLens.* model.*load_model"):
        ss.measure(thing, TEXT)


def test_attention_that_never_passes_the_hook_is_named():
    """Hugging Face's fused attention gives no pattern: the report would be empty, not zero."""
    model = tiny_model("opt")
    model.original_model.set_attn_implementation("sdpa")
    with pytest.raises(ss.InertHookError, match=r"attn.hook_pattern never fired in layer 0 of tiny-opt.*eager"):
        ss.measure(model, TEXT, ["sink_mass"])


# --- load_model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "can't load model 'smollm2-135'.*Did you mean 'smollm2-135m'"),
        ("./nowhere", "no such directory: './nowhere'"),
        ("/nowhere/at/all", "no such directory: '/nowhere/at/all'"),
        ("nowhere.gguf", "no such file: 'nowhere.gguf'"),
    ],
)
def test_an_unknown_model(name, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ss.SinkscopeError, match=message):
        ss.load_model(name)


def test_a_directory_that_holds_no_model(tmp_path):
    with pytest.raises(ss.SinkscopeError, match=r"has no config.json: not a model directory"):
        ss.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ss.SinkscopeError, match="can't load"):
        ss.load_model(tmp_path)


def test_pickled_weights_are_not_read(saved_model, tmp_path):
    import shutil

    shutil.copytree(saved_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ss.SinkscopeError, match=r"can't load 'm'.*safetensors"):
        ss.load_model(tmp_path / "m")


@pytest.mark.parametrize("damage", [b"", b"\x00" * 100, b"not weights"], ids=["empty", "zeros", "words"])
def test_damaged_weights(saved_model, tmp_path, damage):
    import shutil

    shutil.copytree(saved_model, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(damage)
    with pytest.raises(ss.SinkscopeError, match="can't load 'm'"):
        ss.load_model(tmp_path / "m")


def test_unknown_arguments_of_load_model(saved_model):
    with pytest.raises(ss.SinkscopeError, match="'nonsense'"):
        ss.load_model(saved_model, device="nonsense")
    if not torch.cuda.is_available():
        with pytest.raises(ss.SinkscopeError, match="cuda"):
            ss.load_model(saved_model, device="cuda")


# --- NaN and infinity ------------------------------------------------------------------------------------------------

PLACES = {
    "attention of layer 1": ("model.layers.1.self_attn.q_proj.weight", "in layer 1 of tiny-llama"),
    "value of layer 1": ("model.layers.1.self_attn.v_proj.weight", "in layer 1 of tiny-llama"),
    "MLP of layer 1": ("model.layers.1.mlp.down_proj.weight", "in layer 1 of tiny-llama"),
    "attention of the last layer": ("model.layers.2.self_attn.k_proj.weight", "in layer 2 of tiny-llama"),
    "MLP of the last layer": ("model.layers.2.mlp.down_proj.weight", "in layer 2 of tiny-llama"),
    "embeddings": ("model.embed_tokens.weight", "in the embeddings of tiny-llama"),
    "final norm": ("model.norm.weight", "after the last layer of tiny-llama"),
}


def poisoned(weight, value):
    """A tiny Llama with one weight spoiled."""
    from sinkscope.models import bridge
    from sinkscope.testing import tiny_hf_model, tiny_tokenizer

    network = tiny_hf_model("llama")
    with torch.no_grad():
        dict(network.named_parameters())[weight].view(-1)[:] = value
    return fresh(bridge(network, tiny_tokenizer(), "tiny-llama"))


@pytest.mark.parametrize("engine", ["hooks", "flash"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", PLACES)
def test_nan_is_named_by_its_first_layer(place, value, engine):
    weight, where = PLACES[place]
    model = poisoned(weight, value)
    message = refused(f"NaN or infinity {where}", model, {"mine": TEXT}, ["sink_mass"], engine=engine)
    assert "'mine'" in message


@pytest.mark.parametrize("metrics", [["row_entropy"], None])
def test_nan_is_found_whatever_is_measured(metrics):
    refused("NaN or infinity in layer 1", poisoned(PLACES["MLP of layer 1"][0], float("nan")), TEXT, metrics)
    residual = ss.metric(needs="residual", name="norm")(lambda block: block.residual.norm(dim=-1)[:, None])
    refused("NaN or infinity in layer 1", poisoned(PLACES["MLP of layer 1"][0], float("nan")), TEXT, [residual])


@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_the_bad_text_is_named_and_not_those_before_it(engine):
    """Only id 40 (a space) is spoiled: the error names the text that has one."""
    model = fresh(tiny_model())
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[40] = float("nan")
    texts = {"fine": "abcdef" * 5, "bad": "a b"}  # the longer one is the one that an engine is proved on
    message = refused("NaN or infinity in the embeddings", model, texts, ["sink_mass"], batch_size=1, engine=engine)
    assert "'bad'" in message
    assert "'fine'" not in message


# --- metrics that fail in the middle of a run -------------------------------------------------------------------------


def raises(block):
    if block.layer == 1:
        raise ZeroDivisionError("by nothing")
    return block.mass


def interrupts(block):
    if block.layer == 1:
        raise KeyboardInterrupt
    return block.mass


def flat(block):
    return block.mass.mean(-1)


def swapped(block):
    return block.mass.transpose(1, 2)


def one_column(block):
    """A column kept as an axis by mistake."""
    return block.pattern[..., :1]


WRONG = {
    raises: r"metric 'raises' raised ZeroDivisionError in layer 1: by nothing",
    flat: r"metric 'flat' returned a tensor \(1, 4\) in layer 0; expected \[batch, head, query\] = \[1, any, 11\]",
    swapped: r"metric 'swapped' returned a tensor \(1, 11, 4\) in layer 0; expected",
    one_column: r"metric 'one_column' returned a tensor \(1, 4, 11, 1\) in layer 0; expected",
}
NOT_TENSORS = {"float": 0.5, "NoneType": None, "list": [1.0], "ndarray": pd.array([1.0]).to_numpy()}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_a_metric_that_fails_is_named_and_the_model_restored(llama, wrong, engine):
    right = ss.measure(llama, TEXTS, engine=engine)
    refused(WRONG[wrong], llama, TEXT, ["sink_mass", wrong], engine=engine)
    pd.testing.assert_frame_equal(ss.measure(llama, TEXTS, engine=engine).frame, right.frame)


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_a_metric_that_returns_no_tensor(llama, kind):
    mine = ss.metric(needs="mass", name="mine")(lambda block: NOT_TENSORS[kind])
    refused(f"metric 'mine' returned a {kind} in layer 0; expected", llama, TEXT, [mine])


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_metric_that_gives_nan_is_refused_by_name_or_reported_as_nan(llama):
    mine = ss.metric(needs="mass", name="mine", null=None)(lambda block: (block.mass - 2).log())
    got = attempt(lambda: ss.measure(llama, TEXT, [mine]))
    assert got.frame["value"].isna().all() if isinstance(got, ss.SinkReport) else "'mine'" in str(got)


@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_an_interrupt_leaves_the_model_as_it_was(llama, engine):
    right, before = ss.measure(llama, TEXTS, engine=engine), fingerprint(llama)
    with pytest.raises(KeyboardInterrupt):
        ss.measure(llama, TEXTS, ["sink_mass", interrupts], engine=engine)
    assert fingerprint(llama) == before
    pd.testing.assert_frame_equal(ss.measure(llama, TEXTS, engine=engine).frame, right.frame)


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gpt_neox", "bloom", "gptj", "opt", "phi3", "gpt_neo", "bert", "gpt_oss"]
)
@pytest.mark.parametrize(
    "metrics", [["sink_mass", "row_entropy"], [raises], [interrupts]], ids=["fine", "raises", "interrupts"]
)
@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_every_family_is_left_as_it_was(tiny, family, metrics, engine):
    model = tiny(family)
    before = fingerprint(model)
    with contextlib.suppress(ss.SinkscopeError, KeyboardInterrupt):
        ss.measure(model, TEXTS, metrics, engine=engine)
    assert fingerprint(model) == before


# --- what the caller had set up -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metrics", [["sink_mass"], [raises]], ids=["fine", "raises"])
def test_the_callers_hooks_run_and_stay(metrics):
    model, seen = tiny_model("llama"), []
    point = model.hook_dict["blocks.1.attn.hook_pattern"]
    point.add_hook(lambda pattern, hook: seen.append("theirs"))
    point.register_forward_hook(lambda module, args, output: seen.append("torch"))
    model.original_model.model.layers[2].register_forward_hook(lambda module, args, output: seen.append("layer"))
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    seen.clear()
    before = fingerprint(model)
    with contextlib.suppress(ss.SinkscopeError):
        ss.measure(model, TEXT, metrics)
    assert fingerprint(model) == before
    assert {"theirs", "torch"} <= set(seen)
    assert ("layer" in seen) == (metrics == ["sink_mass"])
    seen.clear()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    assert set(seen) == {"theirs", "torch", "layer"}


def test_the_callers_edit_is_what_gets_measured():
    """A hook that edits the pattern was there first, so the report shows the edited attention."""
    model = tiny_model("llama")
    plain = table(ss.measure(model, TEXT, ["sink_mass"]), "sink_mass")
    for layer in range(3):
        model.hook_dict[f"blocks.{layer}.attn.hook_pattern"].add_hook(lambda pattern, hook: torch.zeros_like(pattern))
    assert (plain > 0.01).all()
    assert not table(ss.measure(model, TEXT, ["sink_mass"]), "sink_mass").any()


def test_dropout_is_off_for_the_run_and_modes_are_put_back():
    model = fresh(tiny_model("gpt2"))
    right = ss.measure(model, TEXT, ["sink_mass"])
    model.train()
    model.original_model.transformer.h[1].eval()
    for metrics in (["sink_mass"], [raises], [interrupts]):
        before = fingerprint(model)
        with contextlib.suppress(ss.SinkscopeError, KeyboardInterrupt):
            report = ss.measure(model, TEXT, metrics)
        assert fingerprint(model) == before
    assert {m.training for m in model.modules()} == {True, False}
    pd.testing.assert_frame_equal(report.frame, right.frame)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_grad_mode_is_put_back(llama, mode):
    right = ss.measure(llama, TEXT, ["sink_mass"])
    with mode():
        was = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        for metrics in ([raises], [interrupts], ["sink_mass"]):
            with contextlib.suppress(ss.SinkscopeError, KeyboardInterrupt):
                report = ss.measure(llama, TEXT, metrics)
            assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == was
    pd.testing.assert_frame_equal(report.frame, right.frame)


def test_a_metric_sees_no_graph(llama):
    def graph(block):
        assert not block.pattern.requires_grad
        return block.mass

    ss.measure(llama, TEXT, [graph])


def test_the_global_random_state_is_not_touched(llama):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    ss.measure(llama, TEXTS)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- strange text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "a\x00b\x1b[31m", "\u202eevil\u2028", "a\r\nb\tc", "😀" * 3])
def test_strange_text_is_just_text(llama, text):
    report = ss.measure(llama, {text: text})
    assert report.texts == [text]
    assert str(report).startswith("SinkReport: tiny-llama, 1 text of ")


def test_errors_are_value_errors(llama):
    with pytest.raises(ValueError, match="is empty"):
        ss.measure(llama, "")
    assert issubclass(ss.InertHookError, ss.SinkscopeError)
