"""The versions that people have: what is right on every one of them, and what is refused where it is not there."""

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.capture.masks import Masks, OtherwiseError
from sinkscope.models import versions
from sinkscope.testing import FAMILIES, tiny_hf_model
from tests.model.compare import IDS, NOT_FLASH, check_all, losses, tiny_reference

pytestmark = pytest.mark.classes
PLAIN = [family for family in FAMILIES if family not in {*NOT_FLASH, "mamba"}]
HOOKED = pytest.mark.skipif(not versions.has_hooked_transformer(), reason="TransformerLens 4 has no HookedTransformer")
#: What transformers 4 still computes without its interfaces.
OWN = {"opt": "its attention mask is its own", "bert": "its attention does not ask Hugging Face's attention interface"}
OWN = OWN if versions.installed("transformers") < (5, 0) else {}
EDITS = {
    "window": ss.Window(9),
    "sink window": ss.SinkWindow(9, sinks=3),
    "mask": ss.MaskKeys(0),
}


def banded_losses(family: str, ids: torch.Tensor, edit: str) -> np.ndarray:
    """Hugging Face's own losses, eager, under a mask that says who sees whom."""
    query, key = torch.arange(len(ids))[:, None], torch.arange(len(ids))[None]
    seen = {
        "window": query - key < 9,
        "sink window": (query - key < 6) | (key < 3),
        "mask": (key != 0) | (query == key),
    }[edit] & (key <= query)
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        logits = tiny_hf_model(family)(input_ids=ids[None], attention_mask=mask[None, None]).logits[0, :-1].double()
    return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].numpy()


@pytest.mark.parametrize("family", PLAIN)
def test_a_plain_model_is_hugging_faces(family):
    model = tiny_hf_model(family)
    if versions.has_interfaces() and family in OWN:
        with pytest.raises(ss.SinkscopeError, match=rf"engine 'flash' can't run this on .*: {OWN[family]}"):
            ss.measure(model, IDS)
        return
    report = ss.measure(model, IDS)
    assert report.about["engine"] == "flash"
    check_all(report, {label: tiny_reference(family, ids) for label, ids in IDS.items()})


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_edits_of_a_plain_model_are_hugging_faces(family, edit):
    ids = torch.tensor(IDS["text 2"])
    ours = losses(ss.evaluate(tiny_hf_model(family), [ids], EDITS[edit]), EDITS[edit])
    np.testing.assert_allclose(ours, banded_losses(family, ids, edit), atol=1e-4)


@HOOKED
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_edits_of_a_hooked_transformer_are_hugging_faces(hooked, family, edit):
    ids = torch.tensor(IDS["text 2"])
    ours = losses(ss.evaluate(hooked(family), [ids], EDITS[edit]), EDITS[edit])
    np.testing.assert_allclose(ours, banded_losses(family, ids, edit), atol=1e-4)


@HOOKED
def test_a_saved_model_is_hugging_faces(saved_model):
    report = ss.measure(ss.load_model(saved_model, backend="hooked_transformer"), IDS)
    check_all(report, {label: tiny_reference("llama", ids) for label, ids in IDS.items()})


@pytest.mark.skipif(versions.has_bridge(), reason="there is a TransformerBridge")
def test_without_a_bridge_the_error_names_what_works(saved_model):
    for call in (lambda: ss.load_model(saved_model), ss.testing.tiny_model):
        with pytest.raises(ss.SinkscopeError, match=r"has no TransformerBridge.*backend='hooked_transformer'"):
            call()


def test_without_an_interface_for_masks_a_plain_model_is_refused(monkeypatch):
    monkeypatch.setattr(versions, "has_interfaces", lambda: False)
    model = tiny_hf_model("gpt2")
    for call in (lambda: ss.measure(model, IDS), lambda: ss.evaluate(model, IDS, ss.MaskKeys(0))):
        with pytest.raises(ss.SinkscopeError, match=r"an interface for attention masks.*of_pattern"):
            call()


@pytest.mark.parametrize("window", [None, 4])
def test_a_mask_that_is_told_positions_is_the_one_that_is_told_sizes(window):
    def causal(batch, head, query, key):
        return (key <= query) if window is None else (key <= query) & (query - key < window)

    given = {"kv_length": 9, "mask_function": causal, "local_size": window}
    for how in ({"q_length": 9, "q_offset": 0}, {"cache_position": torch.arange(9)}):
        assert Masks(True)(**given, **how) is None
        with pytest.raises(OtherwiseError, match="neither causal"):
            Masks(True)(**given | {"mask_function": lambda b, h, q, k: k >= q}, **how)
    assert Masks(True, live=True)(**given | {"kv_length": 12}, cache_position=torch.arange(9, 12)) is None


def test_rotary_options_in_old_words():
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0, "partial_rotary_factor": 0.5}, "other": 1}
    assert versions.as_configured(new, {"rope_parameters", "other"}) == new
    assert versions.as_configured(new, {"rope_theta", "rope_scaling"}) == {
        "other": 1,
        "rope_theta": 5.0,
        "rope_scaling": None,
    }
    old = versions.as_configured(new, {"rotary_emb_base", "rotary_pct"})
    assert old == {"other": 1, "rotary_emb_base": 5.0, "rotary_pct": 0.5}


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ss.SinkscopeError, match=r"has no NoSuchModel: pip install --upgrade transformers"):
        versions.class_of("NoSuchModel")
