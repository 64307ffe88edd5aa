"""Engine `flash`: equal to `hooks` wherever it is taken. What it refuses is in `test_swap.py`.

Families against Hugging Face's own attentions are in `test_families.py`; the arithmetic is in `unit/test_op.py`.
"""

import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models import bridge
from sinkscope.testing import FAMILIES, tiny_hf_model, tiny_tokenizer
from tests.conftest import table
from tests.model.compare import IDS, check, novel, same_frames, text_ids, tiny_reference

pytestmark = pytest.mark.classes
INTERFACE = "its attention does not ask Hugging Face's attention interface"
NOT_FLASH = dict.fromkeys(("gptj", "bloom", "gpt_neo"), INTERFACE)
WITH_ATTENTION = [family for family in FAMILIES if family != "mamba"]
TAKEN = [family for family in WITH_ATTENTION if family not in NOT_FLASH]


@pytest.fixture(scope="module")
def plain():
    return functools.cache(tiny_hf_model)


# --- the same numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TAKEN)
def test_equal_to_hooks(tiny, plain, family):
    """Every metric, batches of unequal lengths, several keys; also without any TransformerLens."""
    hooks = ss.measure(tiny(family), IDS, key=[0, 3, -1], engine="hooks")
    for model in (tiny(family), plain(family)):
        ours = ss.measure(model, IDS, key=[0, 3, -1])
        assert ours.about["engine"] == "flash"
        assert "proved equal" in ours.about["engine_why"]
        same_frames(ours, hooks)


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_what_auto_takes(tiny, family):
    """Pinned: it fails in either direction when Hugging Face or TransformerLens changes."""
    about = ss.measure(tiny(family), IDS, ["sink_mass"]).about
    assert about["engine"] == ("hooks" if family in NOT_FLASH else "flash")
    if family in NOT_FLASH:
        assert about["engine_why"].endswith(f"; not flash: {NOT_FLASH[family]}")
        with pytest.raises(ss.SinkscopeError, match=rf"'flash' can't run this on tiny-{family}: {INTERFACE}"):
            ss.measure(tiny(family), IDS, engine="flash")


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


@pytest.mark.parametrize("base", ["GPT2Model", "BertModel"])
def test_a_body_without_a_head(plain, base):
    family = "gpt2" if base == "GPT2Model" else "bert"
    body = plain(family).base_model
    assert type(body).__name__ == base
    same_frames(ss.measure(body, IDS), ss.measure(plain(family), IDS), 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
@pytest.mark.parametrize("need", ["value", "residual", "mlp.hook_post"])
def test_other_hooks_fire_or_hooks_it_is(family, need, tiny):
    norm = ss.metric(needs=("mass", need), name="norm")(
        lambda block: block.mass * block[need].flatten(2).norm(dim=-1)[:, None]
    )
    ours, hooks = (ss.measure(tiny(family), IDS, [norm, "row_entropy"], engine=engine) for engine in ("auto", "hooks"))
    same_frames(ours, hooks, 1e-4)
    if family == "gpt2" and need == "value":  # its queries, keys and values come apart in the bridge alone
        assert ours.about["engine_why"].endswith(
            "not flash: value never came from layer 0 once Hugging Face's own attention was in place"
        )
    else:
        assert ours.about["engine"] == "flash"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "gpt_oss", "bert"])
def test_half_precision_is_near_float32(tiny, family, dtype):
    """Within 0.02 of float32's sink mass and 0.06 nats of its entropy, per head; and no farther than hooks is."""
    model = bridge(tiny_hf_model(family).to(dtype), tiny_tokenizer(family), "half")
    reference = ss.measure(tiny(family), IDS, ["sink_mass", "row_entropy"])
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
def test_mass_metrics_see_a_layer_at_once_and_no_row(tiny, engine):
    seen = []

    @ss.metric(needs="mass", null=None)
    def look(block):
        seen.append((block.layer, block.start, block.n_queries))
        return block.mass

    @ss.metric(needs="mass")
    def greedy(block):
        return block.pattern[..., 0]

    ss.measure(tiny("llama"), [text_ids(120)], [look, "row_entropy"], engine=engine)
    assert seen == [(layer, 0, 120) for layer in range(3)]
    with pytest.raises(ss.SinkscopeError, match=r"'greedy' raised .* declares needs='mass': declare needs='pattern'"):
        ss.measure(tiny("llama"), IDS, [greedy], engine=engine)


def test_whole_rows_come_in_blocks(tiny, monkeypatch):
    expected = ss.measure(tiny("gemma3"), IDS)
    monkeypatch.setattr("sinkscope.capture.rows.ROWS", 7)
    same_frames(ss.measure(tiny("gemma3"), IDS), expected, 1e-6)


# --- real weights -----------------------------------------------------------------------------------------------------


@pytest.mark.model
def test_smollm2_is_the_same_by_both_engines(smollm2):
    how = {"max_tokens": 1024, "key": [0, 7]}
    ours, hooks = (ss.measure(smollm2, novel(1024), engine=engine, **how) for engine in ("auto", "hooks"))
    assert (ours.about["engine"], hooks.about["engine"]) == ("flash", "hooks")
    same_frames(ours, hooks)
