"""Engine `flash`: equal to `hooks` wherever it is taken, refused by name elsewhere, and nothing of it stays on a model.

Families against Hugging Face's own attentions are in `test_families.py`; the arithmetic is in `unit/test_op.py`.
"""

import functools

import numpy as np
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.capture import call, flash, proof
from sinkscope.capture.rows import ScoredRows
from sinkscope.models import adapt, bridge
from sinkscope.models.versions import check_interfaces
from sinkscope.testing import FAMILIES, tiny_hf_model, tiny_model, tiny_tokenizer
from tests.conftest import fingerprint, table, total
from tests.model import compare
from tests.model.compare import IDS, check, novel, text_ids, tiny_reference

pytestmark = pytest.mark.classes
#: Of attention, of masks; the second is not in transformers 4.51.
INTERFACES = [getattr(transformers, n) for n in ("AttentionInterface", "AttentionMaskInterface") if hasattr(transformers, n)]
INTERFACE = "its attention does not ask Hugging Face's attention interface"
NOT_FLASH = dict.fromkeys(sorted(compare.NOT_FLASH), INTERFACE)
WITH_ATTENTION = [family for family in FAMILIES if family != "mamba"]
TAKEN = [family for family in WITH_ATTENTION if family not in NOT_FLASH]


@pytest.fixture(scope="module")
def plain():
    return functools.cache(tiny_hf_model)


def same_frames(ours, theirs, tolerance=1e-5):
    labels = [column for column in theirs.frame if column not in ("value", "std_error", "null", "model")]
    assert ours.frame[labels].equals(theirs.frame[labels])
    for column in ("value", "std_error", "null"):
        a, b = ours.frame[column].to_numpy(float), theirs.frame[column].to_numpy(float)
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance)


# --- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAKEN)
def test_equal_to_hooks(bridge_of, plain, family):
    """Every metric, batches of unequal lengths, several keys; also without any TransformerLens."""
    hooks = ss.measure(bridge_of(family), IDS, key=[0, 3, -1], engine="hooks")
    for model in (bridge_of(family), plain(family)):
        ours = ss.measure(model, IDS, key=[0, 3, -1])
        assert ours.about["engine"] == "flash"
        assert "proved equal" in ours.about["engine_why"]
        same_frames(ours, hooks)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_what_auto_takes(bridge_of, family):
    """Pinned: it fails in either direction when Hugging Face or TransformerLens changes."""
    about = ss.measure(bridge_of(family), IDS, ["sink_mass"]).about
    assert about["engine"] == ("hooks" if family in NOT_FLASH else "flash")
    if family in NOT_FLASH:
        assert about["engine_why"].endswith(f"; not flash: {NOT_FLASH[family]}")
        with pytest.raises(ss.SinkscopeError, match=rf"'flash' can't run this on tiny-{family}: {INTERFACE}"):
            ss.measure(bridge_of(family), IDS, engine="flash")


@compare.bert_asks
def test_a_plain_encoder_has_its_separator(plain):
    texts = {"a": tiny_tokenizer("bert")("so it goes")["input_ids"], "b": tiny_tokenizer("bert")("a sink")["input_ids"]}
    model = plain("bert")
    by_place = ss.measure(model, texts, key=-1)
    for label, ids in texts.items():
        check(by_place, tiny_reference("bert", ids, key=-1), label)
    model.tokenizer = tiny_tokenizer("bert")  # plain models carry none: give them one, and texts and token names work
    by_name = ss.measure(model, {"a": "so it goes", "b": "a sink"}, key="[SEP]")
    np.testing.assert_array_equal(by_name.frame["value"], by_place.frame["value"])
    del model.tokenizer


@pytest.mark.parametrize("base", ["GPT2Model", pytest.param("BertModel", marks=compare.bert_asks)])
def test_a_body_without_a_head(plain, base):
    family = "gpt2" if base == "GPT2Model" else "bert"
    body = plain(family).base_model
    assert type(body).__name__ == base
    same_frames(ss.measure(body, IDS), ss.measure(plain(family), IDS), 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("need", ["value", "output", "residual", "mlp.hook_post"])
def test_what_else_is_needed_is_the_same(family, need, bridge_of):
    norm = ss.metric(needs=("mass", need), name="norm")(
        lambda block: block.mass * block[need].flatten(2).norm(dim=-1)[:, None]
    )
    ours, hooks = (ss.measure(bridge_of(family), IDS, [norm, "row_entropy"], engine=engine) for engine in ("auto", "hooks"))
    same_frames(ours, hooks, 1e-4)
    assert ours.about["engine"] == "flash"


def test_where_a_hook_does_not_fire_it_is_hooks(bridge_of):
    """GPT-2's queries, keys and values come apart in the bridge alone: attention supplies values, but not `attn.hook_v`."""
    norm = ss.metric(needs=("mass", "attn.hook_v"), name="norm")(lambda block: block.mass)
    report = ss.measure(bridge_of("gpt2"), IDS, [norm])
    assert report.about["engine_why"].endswith(
        "not flash: attn.hook_v never came from layer 0 once Hugging Face's own attention was in place"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_half_precision_is_near_float32(bridge_of, family, dtype):
    """Within 0.02 of float32's sink mass and 0.06 nats of its entropy, per head; and no farther than hooks is."""
    model = bridge(tiny_hf_model(family).to(dtype), tiny_tokenizer(family), "half")
    reference = ss.measure(bridge_of(family), IDS, ["sink_mass", "row_entropy"])
    gaps = {}
    for engine in ("flash", "hooks"):
        report = ss.measure(model, IDS, ["sink_mass", "row_entropy"], engine=engine)
        for metric in ("sink_mass", "row_entropy"):
            gaps[engine, metric] = max(np.abs(table(report, metric, t) - table(reference, metric, t)).max() for t in IDS)
    assert gaps["flash", "sink_mass"] < 0.02
    assert gaps["flash", "row_entropy"] < 0.06
    assert gaps["flash", "sink_mass"] < 1.5 * gaps["hooks", "sink_mass"] + 1e-3


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["hooks", "flash"])
def test_mass_metrics_see_a_layer_at_once_and_no_row(bridge_of, engine):
    seen = []

    @ss.metric(needs="mass", null=None)
    def look(block):
        seen.append((block.layer, block.start, block.n_queries))
        return block.mass

    @ss.metric(needs="mass")
    def greedy(block):
        return block.pattern[..., 0]

    ss.measure(bridge_of("llama"), [text_ids(120)], [look, "row_entropy"], engine=engine)
    assert seen == [(layer, 0, 120) for layer in range(3)]
    with pytest.raises(ss.SinkscopeError, match=r"'greedy' raised .* declares needs='mass': declare needs='pattern'"):
        ss.measure(bridge_of("llama"), IDS, [greedy], engine=engine)


def test_whole_rows_come_in_blocks(bridge_of, monkeypatch):
    expected = ss.measure(bridge_of("gemma3"), IDS)
    monkeypatch.setattr("sinkscope.capture.rows.ROWS", 7)
    same_frames(ss.measure(bridge_of("gemma3"), IDS), expected, 1e-6)


# --- what it refuses, and what auto then says -------------------------------------------------------------------------


def refused(model, because, **how):
    with pytest.raises(ss.SinkscopeError, match=because):
        ss.measure(model, IDS, engine="flash", **how)
    report = ss.measure(model, IDS)
    assert report.about["engine"] == "hooks"
    assert because.replace("\\", "") in report.about["engine_why"]
    return report


FAULTS = {
    "lse": (lambda out, lse: (out, lse + 0.1), "attention to the first token differs by"),
    "output": (lambda out, lse: (out * 1.1, lse), "differs by"),
    "raises": (lambda out, lse: out[99], "IndexError: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_swap_is_found_out(bridge_of, monkeypatch, fault):
    spoil, because = FAULTS[fault]
    right = flash.attention_with_lse
    monkeypatch.setattr(flash, "attention_with_lse", lambda *args, **how: spoil(*right(*args, **how)))
    same_frames(refused(bridge_of("llama"), because), ss.measure(bridge_of("llama"), IDS, engine="hooks"), 0)


def test_a_wrong_value_in_the_last_layer_is_found_out(bridge_of, monkeypatch):
    """There no pattern comes after it: only the last hidden state tells."""
    calls = []

    def spoil(*args, right=flash.attention_with_lse, **how):
        calls.append(1)
        out, lse = right(*args, **how)
        return (out * 1.1 if len(calls) % 3 == 0 else out), lse

    monkeypatch.setattr(flash, "attention_with_lse", spoil)
    refused(bridge_of("llama"), "the last hidden state differs by")


EXTRAS = {
    "alibi": (torch.zeros(1), "its attention takes 'alibi', which engine 'flash' does not know"),
    "dropout": (0.1, r"its attention drops out \(0.1\) in eval mode"),
    "sliding_window": (4, "layer 0 has a sliding window of 4, its configuration says None"),
    "is_causal": (False, "layer 0 is not causal, the model is not so"),
    "attention_mask": (torch.zeros(1, 1, 1, 1), "its attention mask is its own, not causal or key padding"),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_what_it_does_not_know_it_refuses_by_name(bridge_of, monkeypatch, name):
    value, because = EXTRAS[name]
    right = call.Calls.__call__

    def attend(self, module, q, k, v, mask, **how):
        if name == "attention_mask":
            mask = value
        else:
            how = {**how, name: value}
        return right(self, module, q, k, v, mask, **how)

    monkeypatch.setattr(call.Calls, "__call__", attend)
    if name in ("sliding_window", "is_causal"):  # then no engine would know what a query sees
        with pytest.raises(ss.SinkscopeError, match=f"does not attend as its configuration says: {because}"):
            ss.measure(bridge_of("llama"), IDS)
    else:
        refused(bridge_of("llama"), because)


def test_a_mask_that_is_not_plain_is_refused():
    masks = flash.Masks(causal=True)
    how = {"q_length": 9, "kv_length": 9}
    assert masks(**how, mask_function=lambda b, h, q, k: k <= q) is None
    assert masks(**how, mask_function=lambda b, h, q, k: (k <= q) & (q - k < 4), local_size=4) is None
    for wrong in (
        {"mask_function": lambda b, h, q, k: (k <= q) & (q // 4 == k // 4), "local_size": 4},  # chunked, as in Llama 4
        {"mask_function": lambda b, h, q, k: (k <= q) | (k < 3)},  # a prefix that all see
        {"mask_function": lambda b, h, q, k: k <= q, "use_vmap": True},
        {"mask_function": lambda b, h, q, k: k <= q, "kv_length": 12},
    ):
        with pytest.raises(ss.SinkscopeError, match="its attention mask is neither causal"):
            masks(**(how | wrong))


def test_hooks_on_attention_are_not_left_out(bridge_of):
    model = bridge_of("llama")
    untouched = ss.measure(model, IDS, ["sink_mass"])
    point = model.hook_dict["blocks.1.attn.hook_pattern"]
    point.add_hook(lambda pattern, hook: pattern.roll(1, 0) * 0.5)
    try:
        edited = refused(model, "there are hooks on the attention of layer 1 that it would leave out")
    finally:
        point.remove_hooks("fwd")
    assert abs(table(edited, "sink_mass") - table(untouched, "sink_mass"))[1].max() > 0.01


HALVED = ["ln1.hook_scale", "ln2.hook_normalized", "ln2.hook_in", "mlp.hook_out", "mlp.hook_in", "mlp.in.hook_out"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooks_elsewhere_count(bridge_of, family):
    """Hook points that nobody hooks are passed by, those that somebody does are not."""
    model, found = bridge_of(family), {}
    untouched = ss.measure(model, IDS, ["sink_mass"], engine="flash")
    for name in [f"blocks.0.{name}" for name in HALVED]:
        with model.hooks([(name, lambda value, hook: value * 0.5)]):
            found[name] = ss.measure(model, IDS, ["sink_mass"], engine="flash")
            same_frames(found[name], ss.measure(model, IDS, ["sink_mass"], engine="hooks"))
    changed = [name for name, report in found.items() if not report.frame.equals(untouched.frame)]
    assert {"blocks.0.ln2.hook_normalized", "blocks.0.mlp.hook_out", "blocks.0.mlp.in.hook_out"} <= set(changed)
    same_frames(ss.measure(model, IDS, ["sink_mass"], engine="flash"), untouched, 1e-9)


def test_a_hook_that_hooks_others_counts(bridge_of):
    model, ids = bridge_of("llama"), [list(range(3, 51))]
    untouched = ss.measure(model, ids, ["sink_mass"])

    def late(value, hook):
        point = model.hook_dict["blocks.0.mlp.hook_out"]
        if value.shape[1] > 16:
            point.add_hook(lambda value, hook: -2 * value)

    reports = []
    for engine in ("flash", "hooks"):
        with model.hooks([("blocks.0.hook_in", late)]):
            reports.append(ss.measure(model, ids, ["sink_mass"], engine=engine))
        model.reset_hooks()
    same_frames(*reports)
    assert not reports[0].frame.equals(untouched.frame)


def test_a_stream_that_changes_the_model_is_in_eval_mode(bridge_of):
    """Its code runs between two portions of texts, and may attach what is in training."""
    model, text = tiny_model("llama"), list(range(3, 51))

    def texts():
        yield from [text[:8]] * 256
        model.blocks[1].mlp.hook_out.add_module("dropout", torch.nn.Dropout(0.5))
        model.blocks[1].mlp.hook_out.add_hook(lambda value, hook: model.blocks[1].mlp.hook_out.dropout(value))
        yield from [text] * 3

    report = ss.measure(model, texts(), ["sink_mass"], engine="hooks", chunk=None, per_text=True)
    last = [total(report, "sink_mass", f"text {n}") for n in range(256, 259)]
    assert last[0] == pytest.approx(last[1], abs=1e-6) == pytest.approx(last[2], abs=1e-6)


def test_idle_hook_points_are_passed_by(bridge_of, monkeypatch):
    model, fired = bridge_of("llama"), set()
    point = type(model.hook_dict["blocks.0.hook_in"])
    monkeypatch.setattr(point, "forward", lambda self, value: fired.add(self.name) or value)
    names = {"blocks.0.ln1.hook_out", "blocks.0.mlp.hook_out", "blocks.0.attn.q.hook_out"}
    batch = next(ss.tokenize(None, IDS).batches(8))
    with flash.flash(adapt(model), frozenset({frozenset({"mass"})}), "test") as capture:
        capture.run(batch, lambda block, group: None, lambda: None)
    assert not names & fired
    model(batch.ids)
    assert names <= fired


class Late(torch.nn.Module):
    """What somebody puts in a hook point's place, as autoencoders are; behind the proof's tokens it does something."""

    def forward(self, value):
        return torch.cat([value[:, :32], -2 * value[:, 32:]], 1)


@pytest.mark.parametrize("part", ["mlp", "attn"])
@pytest.mark.parametrize("how", ["module", "forward"])
def test_what_stands_for_a_hook_point_works(how, part):
    model, ids = tiny_model("llama"), [list(range(3, 51))]
    untouched = ss.measure(model, ids, ["sink_mass"])
    place = getattr(model.blocks[0], part)
    if how == "module":
        place.hook_out = Late()
    else:
        place.hook_out.forward = Late().forward
    spliced = ss.measure(model, ids, ["sink_mass"])
    same_frames(spliced, ss.measure(model, ids, ["sink_mass"], engine="hooks"))
    assert not spliced.frame.equals(untouched.frame)


def test_a_plain_model_has_no_hook_points(plain):
    check_interfaces()
    residual = ss.metric(needs="residual", name="residual")(lambda block: block.residual.norm(dim=-1)[:, None])
    with pytest.raises(
        ss.SinkscopeError, match=r"needs 'residual', and a plain Hugging Face model has no hook points. If Tr.*, wrap"
    ):
        ss.measure(plain("llama"), IDS, [residual])
    with pytest.raises(ss.SinkscopeError, match=r"no hooks on attention: leave engine out \(flash\), or wrap it"):
        ss.measure(plain("llama"), IDS, engine="hooks")


@pytest.mark.parametrize("family", ["bloom", "mamba"])
def test_plain_models_that_it_can_not_run(plain, family):
    check_interfaces()
    because = INTERFACE if family == "bloom" else "has no attention sink to measure here"
    with pytest.raises(ss.SinkscopeError, match=because):
        ss.measure(plain(family), IDS)


def test_bad_arguments(bridge_of):
    with pytest.raises(ss.SinkscopeError, match=r"unknown engine 'flesh'; did you mean 'flash'\?"):
        ss.measure(bridge_of("llama"), IDS, engine="flesh")
    with pytest.raises(ss.SinkscopeError, match="chunk=16 belongs to engine='hooks'"):
        ss.measure(bridge_of("llama"), IDS, engine="flash", chunk=16)
    with pytest.raises(ss.SinkscopeError, match="a Linear is neither a TransformerLens nor a Hugging Face model"):
        ss.measure(torch.nn.Linear(1, 1), IDS)
    assert ss.measure(bridge_of("llama"), IDS, chunk=16).about["engine"] == "hooks"


@pytest.mark.parametrize("kind", ["bridge", "plain"])
def test_nan_names_where_it_begins(kind):
    model = tiny_model("llama") if kind == "bridge" else tiny_hf_model("llama")
    network = model.original_model if kind == "bridge" else model
    with torch.no_grad():
        network(torch.tensor([[1, 4, 5]]))  # the first pass leaves TransformerLens's own marks
        network.get_parameter(next(n for n, _ in network.named_parameters() if "layers.1." in n and "down_proj" in n))[
            0, 0
        ] = float("nan")
    where = "in layer 1" if kind == "bridge" else r"in model\.layers\.1\.mlp\.down_proj"
    before = state(model)
    with pytest.raises(ss.SinkscopeError, match=f"NaN or infinity {where} of .*Nothing was reported"):
        ss.measure(model, IDS)
    assert state(model) == before


# --- the model is left as it was --------------------------------------------------------------------------------------


def state(model):
    """All that the swap touches: modules and their places, hooks, every config, the registries."""
    adapter = adapt(model)
    configs = {id(c): repr(sorted(vars(c).items(), key=str)) for m in model.modules() if (c := vars(m).get("config"))}
    found = fingerprint(model) if adapter.kind == "bridge" else {}
    return found | {
        "places": [(name, list(map(id, m._modules.values())), list(m._modules)) for name, m in model.named_modules()],
        "modes": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "configs": configs,
        "registries": [sorted(i._global_mapping) for i in INTERFACES],
        "implementation": adapter.network.config._attn_implementation,
    }


@pytest.mark.parametrize("when", ["never", "metric", "interrupt", "swap"])
@pytest.mark.parametrize("kind", ["bridge", "plain"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bert"])
def test_the_model_is_left_as_it_was(bridge_of, plain, monkeypatch, family, kind, when):
    model = (bridge_of if kind == "bridge" else plain)(family)
    registered = []

    def breaks(block):
        registered.append([name for name in INTERFACES[0]._global_mapping if name.startswith("sinkscope")])
        if block.layer == 1 and when in ("metric", "interrupt"):
            raise KeyboardInterrupt if when == "interrupt" else ZeroDivisionError("no")
        return block.row_sum

    if when == "swap":  # the last step of entering fails
        monkeypatch.setattr("sinkscope.capture.swap._way_past", lambda module: 1 / 0)
        monkeypatch.setattr(proof, "plan", lambda adapter, groups, tokens: flash.flash(adapter, groups, "test"))
    model.train()
    before = state(model)
    raised = {"never": (), "metric": ss.SinkscopeError, "interrupt": KeyboardInterrupt, "swap": ZeroDivisionError}[when]
    if raised:
        with pytest.raises(raised):
            ss.measure(model, IDS, [breaks], engine="flash")
    else:
        assert total(ss.measure(model, IDS, [breaks], engine="flash"), "breaks") == pytest.approx(1, abs=1e-5)
    assert state(model) == before
    assert all(len(names) == 1 for names in registered)  # so that the fingerprint could have seen it
    model.eval()


def test_importing_registers_nothing():
    assert not [name for interface in INTERFACES for name in interface._global_mapping if "sinkscope" in name]


def test_two_models_at_once(bridge_of):
    """A metric that itself measures another model: neither sees the other's attention."""
    inner = []

    def nested(block):
        if block.layer == 0:
            inner.append(ss.measure(bridge_of("gpt2"), IDS, ["sink_mass"], engine="flash"))
        return block.row_sum

    ss.measure(bridge_of("llama"), IDS, [nested], engine="flash")
    same_frames(inner[0], ss.measure(bridge_of("gpt2"), IDS, ["sink_mass"], engine="hooks"))


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_is_the_same_by_both_engines(smollm2):
    how = {"max_tokens": 1024, "key": [0, 7]}
    ours, hooks = (ss.measure(smollm2, novel(1024), engine=engine, **how) for engine in ("auto", "hooks"))
    assert (ours.about["engine"], hooks.about["engine"]) == ("flash", "hooks")
    same_frames(ours, hooks)


def test_a_model_is_proved_anew_at_every_call(monkeypatch):
    """What a proof has shown holds for the model as it was: its weights, hooks and code may be others a moment later."""
    proved, prove = [], proof._prove
    monkeypatch.setattr(proof, "_prove", lambda *given: (proved.append(given[0].network), prove(*given))[1])
    model = tiny_hf_model("llama")
    for calls in (1, 2):
        ss.measure(model, IDS, ["sink_mass"])
        assert len(proved) == calls


@pytest.mark.parametrize("sums", ["entropy", "received"])
def test_sums_that_are_wrong_are_found_out(sums, monkeypatch):
    """A kernel may be wrong on a GPU that nobody has tried: the proof compares it with rows that are formed."""
    model, right = ss.testing.tiny_hf_model("llama"), getattr(ScoredRows, sums)
    assert ss.measure(model, [[1, 5, 6, 7]], ["row_entropy", "head_profile"]).about["engine"] == "flash"
    monkeypatch.setattr(ScoredRows, sums, lambda self, *given: right(self, *given) * 1.01)
    with pytest.raises(ss.SinkscopeError, match="rows miss their sums"):
        ss.measure(model, [[1, 5, 6, 7]], ["row_entropy", "head_profile"])
