"""Every attention family on TransformerBridge, against Hugging Face's own attentions.

The expected numbers come from a fresh Hugging Face model (eager, float32, `output_attentions=True`), that no bridge has
touched, and from plain loops (`tests.oracles`). A family whose attention TransformerLens gets wrong would be named here
and pinned to fail: on 3.9.0 and 4.3.0 there is none.
"""

import numpy as np
import pytest

import sinkscope as ss
from sinkscope.models import adapt
from sinkscope.testing import FAMILIES
from tests import oracles
from tests.conftest import most_slow, table, total
from tests.model.compare import IDS, NOT_FLASH, check, check_all, same, tiny_reference, windows_of

pytestmark = pytest.mark.classes
#: One of each way to attend; the others are slow, and have their rows in the table of architectures.
FEW = ("gpt2", "bloom", "llama", "mistral", "gemma3", "gpt_oss", "bert")
WITH_ATTENTION = most_slow([family for family in FAMILIES if family != "mamba"], *FEW)


def test_the_texts_are_padded():
    sizes = [[len(s) for s in batch.sequences] for batch in ss.tokenize(None, IDS).batches(8)]
    assert sizes == [[7, 13], [24, 40]]


@pytest.mark.parametrize("chunk", [None, 5, 16])
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_every_default_metric_is_hugging_faces(bridge_of, family, chunk):
    if family == "bert" and chunk is not None:
        with pytest.raises(ss.SinkscopeError, match="encoder"):
            ss.measure(bridge_of(family), IDS, engine="hooks", chunk=chunk)
        return
    report = ss.measure(bridge_of(family), IDS, engine="hooks", chunk=chunk)
    assert (report.about["engine"], report.about["arguments"]["chunk"]) == ("hooks", chunk)
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_the_engine_taken_by_itself_gives_the_same(bridge_of, family):
    report = ss.measure(bridge_of(family), IDS)
    assert report.about["engine"] == ("hooks" if family in NOT_FLASH else "flash")
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


@pytest.mark.parametrize("engine", ["hooks", "auto"])
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_a_text_is_the_same_in_a_padded_batch_and_alone(bridge_of, family, engine):
    together = ss.measure(bridge_of(family), IDS, engine=engine)
    for label, ids in IDS.items():
        same(together, label, ss.measure(bridge_of(family), [ids], engine=engine), "text 0", 1e-6)


@pytest.mark.parametrize("how", [{"engine": "hooks"}, {"chunk": 5}, {}], ids=["hooks", "chunks", "auto"])
@pytest.mark.parametrize("key", [3, -1])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3", "gpt_oss", "bert"])
def test_another_sink_position(bridge_of, family, key, how):
    report = ss.measure(bridge_of(family), IDS, key=key, **({} if family == "bert" and "chunk" in how else how))
    for label, ids in IDS.items():
        check(report, tiny_reference(family, ids, key=key), label)


def test_where_there_is_no_sink_the_list_is_empty(bridge_of):
    report = ss.measure(bridge_of("llama"), {"long": IDS["text 2"]}, ["sink_mass", "sink_positions"])
    assert total(report, "sink_positions", "long") == 0
    assert report.sink_positions().empty


@pytest.mark.parametrize("engine", ["hooks", "auto"])
@pytest.mark.parametrize("family", WITH_ATTENTION)
def test_windows(bridge_of, family, engine):
    """On a local layer late queries don't see key 0: their attention to it is 0, and they don't count as seeing it."""
    windows = windows_of(family)
    assert adapt(bridge_of(family)).windows == {layer: size for layer, size in enumerate(windows) if size}
    wanted = ["sink_mass", "visible_sink_mass", "last_row_share"]
    report = ss.measure(bridge_of(family), {"long": IDS["text 2"]}, wanted, engine=engine)
    mass, visible, last = (table(report, m, "long") for m in wanted)
    null = table(report, "visible_sink_mass", "long", "null")
    for layer, size in enumerate(windows):
        np.testing.assert_allclose(visible[layer], mass[layer] * (40 / size if size else 1), rtol=1e-5)
        assert (last[layer] == 0).all() == bool(size)
        expected = oracles.null("visible_sink_mass", 40, causal=family != "bert", window=size)
        np.testing.assert_allclose(null[layer], expected, atol=1e-6)


@pytest.mark.parametrize("how", [{"engine": "hooks"}, {"chunk": 16}, {"engine": "flash"}])
def test_a_learned_sink_takes_its_share(bridge_of, how):
    report = ss.measure(bridge_of("gpt_oss"), IDS, ["row_deficit", "position_profile"], **how)
    for label in IDS:
        deficit = table(report, "row_deficit", label)
        assert (deficit > 0).all()
        assert deficit.mean() > 0.05
        given = table(report, "position_profile", label).sum(-1)
        np.testing.assert_allclose(given, 1 - deficit.mean(1), atol=1e-5)
    assert abs(total(ss.measure(bridge_of("llama"), IDS, ["row_deficit"]), "row_deficit")) < 1e-6


@pytest.mark.parametrize("engine", ["hooks", "flash"])
@pytest.mark.parametrize(("key", "name"), [(0, "[CLS]"), (-1, "[SEP]")])
def test_an_encoder_can_be_asked_about_both_ends(bridge_of, key, name, engine):
    texts = {"a": "so it goes", "b": "attention, please", "c": "a sink"}
    tokenizer = bridge_of("bert").tokenizer
    by_place, by_name = (ss.measure(bridge_of("bert"), texts, key=k, engine=engine) for k in (key, name))
    assert by_place.about["bos"] == "special tokens added (the model's convention)"
    for label, text in texts.items():
        ids = tokenizer(text)["input_ids"]
        assert (ids[0], ids[-1]) == (1, 2)
        for report in (by_place, by_name):
            check(report, tiny_reference("bert", ids, key=key), label)


def test_a_model_without_attention_is_refused(bridge_of):
    with pytest.raises(ss.SinkscopeError, match=r"[Mm]amba.*no attention pattern"):
        ss.measure(bridge_of("mamba"), IDS)
