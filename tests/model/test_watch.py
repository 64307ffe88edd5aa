"""`ss.watch`: anybody's code runs as without it, and what is kept equals Hugging Face's own attentions, reduced in loops."""

import copy
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy

import sinkscope as ss
from sinkscope.interventions import StreamingWindow, ZeroAttention
from sinkscope.models.versions import check_lookup
from sinkscope.testing import tiny_hf_model, tiny_model
from tests.conftest import EMPTY_CACHES, fingerprint, fresh
from tests.model.compare import NOT_FLASH, TL4, attentions
from tests.oracles import attend_by

pytestmark = pytest.mark.classes
IDS = torch.randint(3, 60, (3, 40), generator=torch.Generator().manual_seed(2))
#: The interface is asked by all of these, with a mask or without one, soft caps, learned sinks, windows.
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi", "phi3"]
METRICS = ["sink_mass", "sink_rate", "row_entropy", "row_deficit", "head_profile"]
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
NEW = 8


def at_sdpa(family):
    """The model as most people have it, where its attention can be so."""
    model = tiny_hf_model(family)
    if family not in ("gemma2", "gpt_oss"):
        attend_by(model, "sdpa")
    return model


def marks(model):
    """What is on a model, but the patterns that a bridge keeps of whatever ran last."""
    for module in model.modules():
        if "_pattern" in vars(module):
            module._pattern = None
    with torch.enable_grad():
        return fingerprint(model)


def same(report, reference):
    """Every row of every text, its null beside it; the texts come in the same order under other names."""
    ours, theirs = (r.frame[r.frame["text"] != "all"] for r in (report, reference))
    assert ours["metric"].tolist() == theirs["metric"].tolist()
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=2e-6)
    np.testing.assert_allclose(ours["null"], theirs["null"], atol=1e-12)
    theirs = reference.summary("all").set_index("metric")
    for column in ("value", "null", "std_error"):
        np.testing.assert_allclose(report.summary("all").set_index("metric")[column], theirs[column], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_and_the_series_is_that_of_output_attentions(family):
    """Greedy, drawn, with beams, a prompt in chunks: the same tokens, and nothing stays."""
    model, network = at_sdpa(family), tiny_hf_model(family)
    before = fingerprint(model)
    ways = [{}, {"do_sample": True}, {"num_beams": 3}, {"prefill_chunk_size": 16}]
    for way in ways:
        how = PLAIN | way | {"max_new_tokens": NEW}
        torch.manual_seed(0)
        plain = model.generate(IDS, **how)
        torch.manual_seed(0)
        with ss.watch(model, METRICS, key=[0, 2]) as seen:
            made = model.generate(IDS, **how)
        assert torch.equal(made, plain)
        assert fingerprint(model) == before
        if "num_beams" not in way:
            same(seen.report(), ss.measure(model, made[:, :-1], METRICS, key=[0, 2]))
    ends = [16, 32, 40, *range(41, 40 + NEW)]  # of the passes: the last way's
    pattern = [attentions(network, row) for row in made[:, :-1]]
    series = seen.series()
    for name, of in {
        "sink_mass[key=2]": lambda rows: rows[..., 2].mean(-1).mean(),
        "sink_rate@0.3[key=0]": lambda rows: (rows[..., 0].mean(-1) > 0.3).float().mean(),
        "row_entropy": lambda rows: -torch.special.xlogy(rows, rows).sum(-1).mean(-1).mean(),
    }.items():
        rows = series[series["metric"] == name]
        assert rows["position"].tolist() == [0, *ends[:-1]]
        expected = [np.mean([float(of(p[:, :, a:b])) for p in pattern]) for a, b in zip([0, *ends], ends, strict=False)]
        np.testing.assert_allclose(rows["value"], expected, atol=1e-6)
    first = series[series["metric"] == "sink_mass[key=0]"]
    np.testing.assert_allclose(first["null"].iloc[1], np.mean([1 / (i + 1) for i in range(16, 32)]))
    np.testing.assert_allclose(first["null"].iloc[3:], [1 / (i + 1) for i in range(40, 39 + NEW)])


@pytest.mark.parametrize("family", [*FAMILIES, *sorted(NOT_FLASH), "bert"])
def test_a_bridge_shows_what_measure_finds(bridge_of, family):
    model = bridge_of(family)
    how = {"max_new_tokens": NEW, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with torch.no_grad():
        plain = model(IDS)
        made = None if family == "bert" or EMPTY_CACHES else model.generate(IDS[:1, :12], **how)
        before = marks(model)  # TransformerLens's own generation leaves a mark
        with ss.watch(model, METRICS, key=[0, 2]) as seen:
            assert torch.equal(model(IDS), plain)
        same(seen.report(), ss.measure(model, IDS, METRICS, key=[0, 2]))
        if made is not None:
            with ss.watch(model, METRICS, key=[0, 2]) as seen:
                assert torch.equal(model.generate(IDS[:1, :12], **how), made)
            same(seen.report(), ss.measure(model, made[:, :-1], METRICS, key=[0, 2]))
    assert marks(model) == before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "gemma3"])
def test_pads_on_either_side(family, side):
    """A prompt of texts of three lengths, then token by token; a row without pads, and one with fifteen."""
    model, lengths, width = at_sdpa(family), [20, 12, 5], 20
    ids, mask = torch.zeros(3, 28, dtype=torch.long), torch.ones(3, 28, dtype=torch.long)
    mask[:, :width] = 0
    for row, n in enumerate(lengths):
        at = slice(width - n, width) if side == "left" else slice(0, n)
        ids[row, at], mask[row, at] = IDS[row, :n], 1
    ids[:, width:] = IDS[:, 20:28]
    end = width if family == "bert" or (family, side) == ("gemma3", "right") else 28  # whose windows count pads in between
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    metrics = METRICS if family != "gpt2" else ["sink_mass", "sink_rate"]  # one column alone: tokens are looked at together
    with torch.no_grad(), ss.watch(model, metrics, key=[0, 2]) as seen:
        if family == "bert":
            model(ids[:, :width], attention_mask=mask[:, :width], position_ids=positions[:, :width])
        else:
            cache = model(ids[:, :width], attention_mask=mask[:, :width], position_ids=positions[:, :width]).past_key_values
            for at in range(width, end):
                step = {"attention_mask": mask[:, : at + 1], "position_ids": positions[:, at : at + 1]}
                model(ids[:, at : at + 1], past_key_values=cache, **step)
    texts = [row[keep.bool()] for row, keep in zip(ids[:, :end], mask[:, :end], strict=True)]
    same(seen.report(), ss.measure(model, texts, metrics, key=[0, 2]))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_static_cache_and_masks_that_are_made_beforehand(family):
    model = at_sdpa(family)
    how = PLAIN | {"max_new_tokens": NEW, "cache_implementation": "static"}
    mask = torch.ones_like(IDS)
    mask[1, :30] = 0
    with ss.watch(model, METRICS) as seen:
        made = model.generate(IDS, attention_mask=mask, **how)[:, :-1]
    same(seen.report(), ss.measure(model, [made[0], made[1, 30:], made[2]], METRICS))


def test_every_nth_pass():
    """Means and nulls are over the queries of these; texts and positions are followed in between."""
    model = at_sdpa("llama")
    with ss.watch(model, ["sink_mass", "sink_rate"], every=3) as seen:
        made = model.generate(IDS, max_new_tokens=NEW, **PLAIN)[:, :-1]
    looked = torch.zeros(made.shape, dtype=torch.bool)
    looked[:, :40], looked[:, [42, 45]] = True, True
    assert seen.series()["step"].unique().tolist() == [0, 3, 6]
    reference = ss.measure(model, made, ["sink_mass", "sink_rate"], where=looked).summary("all").set_index("metric")
    ours = seen.report().summary("all").set_index("metric")
    for column in ("value", "null"):
        np.testing.assert_allclose(ours[column], reference.loc[ours.index, column], atol=1e-7)


EDITS = [ss.MaskKeys(0), ss.Window(7), ss.SinkWindow(7, sinks=1), StreamingWindow(7, sinks=1), ZeroAttention(0)]


@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_inside_an_edit_it_sees_the_edited_model(edit):
    """The same tokens as without it; the attention is what `evaluate` says, and what the edit says."""
    for model in (at_sdpa("llama"), fresh(tiny_model("llama"))):
        network = getattr(model, "original_model", model)
        before = fingerprint(model)
        with edit.on(model):
            plain = network.generate(IDS[:1], max_new_tokens=NEW, **PLAIN)
        with edit.on(model), ss.watch(model, ["sink_mass", "row_deficit", "head_profile"], key=[0, 10]) as seen:
            made = network.generate(IDS[:1], max_new_tokens=NEW, **PLAIN)
        assert torch.equal(made, plain)
        assert fingerprint(model) == before
        report = seen.report()
        row = ss.evaluate(model, [made[0, :-1]], edit).summary().set_index("intervention").loc[str(edit)]
        profile = report.frame.query("metric == 'head_profile' and text == 'all'").groupby("key")["value"].mean()
        assert profile.idxmax() == row["sink_position"]
        assert profile[0] == pytest.approx(row["sink_mass"], abs=1e-6)
        late = seen.series().query("position > 20")
        if isinstance(edit, ss.Window):
            assert late.query("metric == 'sink_mass[key=10]'")["value"].max() == 0


def test_a_sink_that_an_edit_makes_is_seen():
    """A token that looks at itself alone, as the first does: its own row says so, and the others look at it more or less."""
    model = at_sdpa("llama")
    with torch.no_grad(), ss.interventions.SelfOnly(10).on(model), ss.watch(model, ["query_profile"], key=[0, 10]) as seen:
        model(IDS[:1])
    rows = seen.report().frame.query("text == 'all' and query == 10")
    np.testing.assert_allclose(rows.query("key == 10")["value"], 1, atol=1e-6)
    np.testing.assert_allclose(rows.query("key == 0")["value"], 0, atol=1e-6)


def test_an_edit_at_hook_points_is_seen_too(tiny):
    model = tiny("bloom")
    with torch.no_grad(), ZeroAttention(0).on(model), ss.watch(model, ["sink_mass", "row_deficit"]) as seen:
        model(IDS)
    values = seen.series().set_index("metric")["value"]
    assert values["sink_mass"] == 0
    assert values["row_deficit"] > 0.05


def test_an_edit_begun_inside_is_refused():
    model = at_sdpa("llama")
    with ss.watch(model), pytest.raises(ss.SinkscopeError, match="enter the edit first"), ss.Window(4).on(model):
        pass
    with ss.watch(model) as seen, ss.interventions.ReplaceToken(0, 9).on(model):  # is on the way in: no attention is edited
        model(IDS)
    assert seen.series()["step"].unique().tolist() == [0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_training_steps_have_the_same_gradients(autocast, checkpointing):
    """With dropout, under autocast, with activations that are computed once more on the way back."""

    def gradients(metrics):
        model = at_sdpa("llama").train()
        model.config.attention_dropout = 0.1
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        with ss.watch(model, metrics, every=2) if metrics else nullcontext() as seen:
            for _ in range(3):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = model(IDS, labels=IDS).loss
                loss.backward()
        return [p.grad for p in model.parameters()], seen

    plain, _ = gradients([])
    for metrics in (["sink_mass"], METRICS):
        watched, seen = gradients(metrics)
        assert all(torch.equal(a, b) for a, b in zip(watched, plain, strict=True))
        assert seen.series()["step"].unique().tolist() == [0, 2]
        plainly = ss.measure(at_sdpa("llama"), IDS, ["sink_mass"]).frame.query("text == 'all' and layer == 0")["value"]
        value = seen.series(by="layer").query("metric == 'sink_mass' and layer == 0")["value"]  # before anything is dropped
        np.testing.assert_allclose(value, plainly.mean(), atol=3e-3 if autocast else 1e-6)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays_after_an_interrupt(error):
    model, calls = at_sdpa("llama"), []
    before = fingerprint(model)

    def fail(module, args, output):
        calls.append(1)
        if len(calls) == 5:
            raise error

    handle = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(error), ss.watch(model) as seen:
        model.generate(IDS, max_new_tokens=NEW, **PLAIN)
    handle.remove()
    assert fingerprint(model) == before
    assert seen.series()["step"].unique().tolist() == [0, 1, 2, 3]  # the pass that was broken off is not there
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_passes_of_this_library_are_not_the_users(tiny):
    for model in (at_sdpa("llama"), tiny("llama")):
        with torch.no_grad(), ss.watch(model, ["sink_mass"]) as seen:
            model(IDS)
            ss.measure(model, IDS, ["sink_mass"])
            ss.measure(model, IDS, ["sink_mass"], engine="hooks") if hasattr(model, "original_model") else None
            ss.evaluate(model, IDS[:1], ss.Window(8))
            model(IDS[:, :9])
        assert seen.series()["queries"].tolist() == [120, 27]


def test_two_at_once_other_threads_other_models_and_copies():
    model, other = at_sdpa("llama"), at_sdpa("gpt2")
    with ss.watch(model, ["sink_mass"]) as first:
        with ss.watch(model, ["row_entropy"]) as second, torch.no_grad():
            model(IDS)
            other(IDS)
            copy.deepcopy(model)(IDS)
        thread = threading.Thread(target=lambda: model.generate(IDS, max_new_tokens=3, **PLAIN))
        thread.start()
        thread.join()
    assert first.series()["queries"].tolist() == [120, 120, 3, 3]
    assert second.series()["metric"].tolist() == ["row_entropy"]
    assert first.report().texts == [f"pass {step}, row {row}" for step in (0, 1) for row in range(3)]


def test_what_can_not_be_read_is_said_and_the_code_goes_on(monkeypatch):
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def doubled(*given, **more):
        return 2 * sdpa_attention_forward(*given, **more)[0], None

    model = at_sdpa("llama")
    with torch.no_grad(), ss.watch(model) as seen:
        model(IDS, position_ids=torch.arange(40).remainder(20)[None])
        assert "1 not read: its position_ids begin anew" in repr(seen)
        model(IDS)
    assert seen.series()["step"].unique().tolist() == [1]
    assert "1 of 2 passes were not read" in seen.report().about["notes"][-1]
    monkeypatch.setitem(AttentionInterface._global_mapping, "doubled", doubled)
    attend_by(model, "doubled")
    with torch.no_grad(), ss.watch(model) as seen:
        model(IDS)
    with pytest.raises(ss.SinkscopeError, match="layer 0 attends otherwise than by its scores"):
        seen.report()
    with ss.watch(model) as seen, pytest.raises(ss.SinkscopeError, match="run the model inside"):
        seen.series()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"metrics": ["value_drain"]}, "watch sees attention alone"),
        ({"metrics": ["last_row_share"]}, "needs the end of a text"),
        ({"metrics": ["sinkmass"]}, "did you mean 'sink_mass'"),
        ({"key": -1}, "positions from 0 on"),
        ({"key": "[SEP]"}, "positions from 0 on"),
        ({"every": 0}, "every=0"),
    ],
)
def test_bad_input(how, says):
    check_lookup()
    with pytest.raises(ss.SinkscopeError, match=says):
        ss.watch(at_sdpa("llama"), **how)


def test_a_model_whose_attention_nobody_sees():
    with pytest.raises(ss.InertHookError, match="TransformerBridge"):
        ss.watch(tiny_hf_model("bloom"))


@pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_hooked_transformer(hooked, family):
    model = hooked(family)
    before = fingerprint(model)
    with torch.no_grad():
        plain = model(IDS)
        with ss.watch(model, METRICS, key=[0, 2]) as seen:
            assert torch.equal(model(IDS), plain)
            model.generate(IDS[:1, :12], max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False)
    assert seen.series().query("metric == 'sink_mass[key=0]'")["position"].tolist() == [0, 0, 12, 13, 14]
    with torch.no_grad(), ss.watch(model, METRICS, key=[0, 2]) as seen:
        model(IDS)
    same(seen.report(), ss.measure(model, IDS, METRICS, key=[0, 2]))
    assert fingerprint(model) == before


def test_a_learned_sink_takes_its_share():
    """gpt_oss: rows sum to less than 1, beside a softmax written out."""
    model = tiny_hf_model("gpt_oss")
    with torch.no_grad(), ss.watch(model, ["row_deficit"]) as seen:
        model(IDS[:1])
    expected = 1 - attentions(model, IDS[0]).sum(-1).mean()
    assert seen.series()["value"][0] == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) > 0.05


def test_the_report_is_one_as_any(tmp_path):
    """Saved, loaded, compared, shown."""
    model = at_sdpa("llama")
    with ss.watch(model, ["sink_mass", "sink_rate"]) as seen:
        loss = cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten())
        assert loss.requires_grad
    report = seen.report()
    report.save(tmp_path / "seen")
    again = ss.load_report(tmp_path / "seen")
    pd.testing.assert_frame_equal(again.summary(), report.summary(), atol=1e-15, check_dtype=False)
    assert (report.compare(ss.measure(model, IDS, ["sink_mass"]))["difference"].abs() < 1e-6).all()
    assert "engine watch" in str(report)


#: What a researcher wants, in at most so many lines.
TASKS = {
    "the sink's share over a continuation": (
        4,
        """
with ss.watch(model, ["sink_mass"]) as seen:
    model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
found = seen.series().query("step > 0")["value"]
""",
    ),
    "what an autoencoder may be trained on, of a JSONL file": (
        4,
        """
mask, real = ss.sink_mask(bridge, Path("corpus.jsonl")).padded()
found = real & ~mask
""",
    ),
    "the mean over queries whose next token is hard": (
        1,
        """
found = ss.measure(bridge, texts, ["sink_mass"], where=ss.where.next_loss(above=3.5)).summary("all")["value"].iloc[-1]
""",
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_researchers_task_takes_few_lines(task, tiny, tmp_path, monkeypatch):
    lines, code = TASKS[task]
    assert len(code.strip().splitlines()) <= lines
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "so it goes"}\n{"text": "and on it goes"}\n', encoding="utf-8")
    there = {"ss": ss, "Path": Path, "model": at_sdpa("llama"), "bridge": tiny("llama"), "ids": IDS[:1]}
    there["texts"] = ["so it goes"]
    exec(code, there)
    found = there["found"]
    if "share" in task:
        made = there["model"].generate(IDS[:1], max_new_tokens=8, **PLAIN)[0, :-1]
        expected = attentions(tiny_hf_model("llama"), made)[:, :, 40:, 0].mean((0, 1))
        np.testing.assert_allclose(found, expected, atol=1e-6)
    elif "JSONL" in task:
        assert found.shape == (2, 15)
        assert 0 < int(found.sum()) < int(there["real"].sum())
    else:
        assert 0 < found < 1


def test_what_fails_at_the_end_of_a_pass_is_not_raised_into_the_users_code(tiny, monkeypatch):
    def fails(calls, columns):
        raise RuntimeError("no memory")

    monkeypatch.setattr("sinkscope.watched.masses", fails)
    model = tiny("llama")
    with ss.watch(model, ["sink_mass"]) as seen, torch.no_grad():
        model(torch.tensor([[1, 5, 9]]))
    assert "no memory" in repr(seen)
