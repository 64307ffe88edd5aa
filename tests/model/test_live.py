"""`with intervention.on(model)`: any code of the user's under an edit; and where edits are live at all."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import sinkscope as ss
from sinkscope.capture import proof
from sinkscope.capture.plans import GROUPS
from sinkscope.capture.points import POINTS, is_live
from sinkscope.interventions import (
    DropTokens,
    EditActivation,
    MeanValue,
    RecomputeWindow,
    ReplaceToken,
    StreamingWindow,
    ZeroAttention,
    ZeroValue,
)
from sinkscope.models import adapt
from sinkscope.models.versions import has_bridge
from sinkscope.testing import tiny_hf_model, tiny_model
from sinkscope.tokens import TextTokens, Tokens
from tests.conftest import ASKING_GPTJ, EMPTY_CACHES, fingerprint, most_slow
from tests.model.compare import TL4

pytestmark = pytest.mark.classes
on_39 = pytest.mark.skipif(TL4, reason="TransformerLens 4 has no HookedTransformer")
IDS = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(2))
ACTIVATION = EditActivation(4.0, positions=[0, 2], dims=[3, 5], layers=1)
EDITS = [
    ss.Window(7),
    ss.SinkWindow(7, sinks=2),
    ss.MaskKeys(0),
    ss.MaskKeys([0, 3], heads=[1], layers=[1, 2]),
    ZeroAttention(0),
    ZeroValue([0, 2]),
    ReplaceToken(0, 9),
    ACTIVATION,
    ss.MaskKeys(0) & ACTIVATION & ReplaceToken(1, 5),
]
FAMILIES = ["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi"]


def logits(model, ids=IDS):
    with torch.no_grad():
        out = model(ids)
    return getattr(out, "logits", out)[0]


def evaluated(model, edit):
    """Loss by position, as `evaluate` says: every token that stands where it stood."""
    curves = ss.evaluate(model, [IDS[0]], edit).curves
    rows = curves[curves["intervention"] == str(edit)]
    return rows["position"].to_numpy(), rows["loss"].to_numpy()


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("family", most_slow(FAMILIES, "gpt2", "llama", "gemma2", "gpt_oss", "phi"))
def test_any_code_sees_what_evaluate_sees(family, edit):
    """On the bridge, and on Hugging Face's own model."""
    at, expected = evaluated(tiny_model(family), edit)
    for model in (tiny_model(family), tiny_hf_model(family)):
        plain = logits(model)
        with edit.on(model) as same:
            assert same is model
            edited = logits(model)
        found = cross_entropy(edited[:-1], IDS[0, 1:], reduction="none").numpy()[at - 1]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert float((edited - plain).abs().max()) > 1e-3, "an edit without effect"
        assert torch.equal(logits(model), plain), "an edit that stays"


@pytest.mark.parametrize("edit", [*EDITS, StreamingWindow(7, sinks=2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2", "opt"])
def test_generation_equals_a_forward_pass(family, edit):
    """With the KV cache, past sliding windows whose caches drop old keys."""
    if isinstance(edit, StreamingWindow) and family != "llama":
        pytest.skip("no streaming window there")
    for model in (tiny_hf_model(family), *([] if EMPTY_CACHES else [tiny_model(family)])):
        network = getattr(model, "original_model", model)
        how = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        with torch.no_grad(), edit.on(model):
            out = network.generate(IDS[:, :12], output_scores=True, return_dict_in_generate=True, **how)
            again = logits(network, out.sequences)[11:-1]
        np.testing.assert_allclose(torch.cat(out.scores).numpy(), again.numpy(), atol=1e-4)


def test_the_bridges_own_generation(bridge_of):
    model, edit = bridge_of("llama"), ss.SinkWindow(7, sinks=1)
    with torch.no_grad(), edit.on(model):
        made = model.generate(IDS[:, :12], max_new_tokens=10, do_sample=False, stop_at_eos=False, verbose=False)
        expected = logits(model, made)[11:-1].argmax(-1)
    assert made[0, 12:].tolist() == expected.tolist()


def test_users_hooks_still_fire(tiny):
    """Those on the residual stream, norms and MLPs, and on queries, keys and values (TransformerLens 4); beside an edit."""
    model, seen = tiny("llama"), []
    names = ["blocks.1.hook_resid_post", "blocks.1.ln1.hook_scale", "blocks.1.hook_mlp_out"]
    names += ["blocks.0.attn.hook_q", "blocks.2.attn.hook_v"] if TL4 else []
    with ss.MaskKeys(0).on(model), torch.no_grad():
        model.run_with_hooks(IDS, fwd_hooks=[(name, lambda value, hook: seen.append(hook.name)) for name in names])
    assert len(seen) == len(names)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_gradients_flow(family):
    """A window as long as the text is no edit: its gradients are the model's own; a shorter one has others."""
    model = tiny_hf_model(family)

    def gradient(edit):
        model.zero_grad()
        with edit.on(model):
            cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:]).backward()
        return model.get_input_embeddings().weight.grad.clone()

    plain = cross_entropy(model(IDS).logits[0, :-1], IDS[0, 1:])
    plain.backward()
    own = model.get_input_embeddings().weight.grad.clone()
    np.testing.assert_allclose(gradient(ss.Window(40)), own, atol=1e-5)
    assert float((gradient(ss.Window(4) & ZeroAttention(3)) - own).abs().max()) > 1e-3


def test_right_padding_changes_nothing_and_left_padding_is_refused():
    model, edit = tiny_hf_model("llama"), ss.SinkWindow(7, sinks=1)
    alone = IDS[:, :20]
    with torch.no_grad(), edit.on(model):
        expected = model(alone).logits[0]
        mask = (torch.arange(40) < torch.tensor([[20], [40]])).long()
        both = torch.cat([torch.cat([alone, torch.zeros_like(alone)], 1), IDS])
        np.testing.assert_allclose(model(both, attention_mask=mask).logits[0, :20], expected, atol=1e-5)
        with pytest.raises(ss.SinkscopeError, match="padded on the left"):
            model(both, attention_mask=mask.flip(1))


def test_measure_is_refused_inside_and_edits_of_the_stream_are_measured(tiny):
    model = tiny("llama")
    with ss.MaskKeys(0).on(model):
        for call in (lambda: ss.measure(model, IDS), lambda: ss.Window(4).on(model).__enter__()):
            with pytest.raises(ss.SinkscopeError, match="leave the block first"):
                call()
    plain = ss.measure(model, IDS, ["sink_mass"])
    swapped = IDS.clone()
    swapped[0, 0] = 9
    with ReplaceToken(0, 9).on(model):
        inside = ss.measure(model, IDS, ["sink_mass"])
    other = ss.measure(model, swapped, ["sink_mass"])
    np.testing.assert_allclose(inside.frame["value"], other.frame["value"], atol=1e-7)
    assert np.abs(inside.frame["value"] - plain.frame["value"]).max() > 1e-3


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (DropTokens(0), "change the ids"),
        (RecomputeWindow(4), "change the ids"),
        (MeanValue(0), "whole text is not known before"),
        (ss.MaskKeys(-1), "from the end"),
        (ReplaceToken(-1, 4), "from the end"),
        (EditActivation(), "not located"),
        (ss.Window(4, layers=7), "layers"),
        (ss.MaskKeys(0, heads=9), "heads"),
        (EditActivation(0.0, positions=0, dims=99, layers=0), "dimensions 0 to 31"),
    ],
    ids=str,
)
def test_what_cannot_be_done(tiny, edit, says):
    model = tiny("llama")
    before = fingerprint(model)
    with pytest.raises(ss.SinkscopeError, match=says), edit.on(model):
        model(IDS)
    assert fingerprint(model) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_stays(tiny, error):
    model = tiny("llama")
    before = fingerprint(model)

    def fail(value: torch.Tensor, hook: object) -> None:
        raise error

    edit = ss.MaskKeys(0) & ACTIVATION & ReplaceToken(0, 4)
    with pytest.raises(error), edit.on(model):
        model.run_with_hooks(IDS, fwd_hooks=[("blocks.1.hook_resid_post", fail)])
    model.reset_hooks()
    assert fingerprint(model) == before
    ss.measure(model, IDS, ["sink_mass"])


# --- where edits are live ------------------------------------------------------------------------------------------

#: Edits inside Hugging Face's attention interface; and at hook_attn_scores, hook_pattern, hook_v, hook_k, hook_rot_k (hook_k
#: where nothing is rotated), hook_z. The same on 3.9 and 4.3.
ALL, DELEGATED = (True,) * 7, (True, False, False, True, True, True, True)
LIVE = {
    **dict.fromkeys(["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "phi", "phi3"], ALL),
    **dict.fromkeys(["opt", "bert"], DELEGATED),
    "gptj": (ASKING_GPTJ, False, False, True, True, False, True),
    "gpt_neo": (False, False, False, True, True, True, True),
    "bloom": (False, *ALL[1:]),
}
LIVE_ON_HOOKED_TRANSFORMER = dict.fromkeys(
    ["gpt2", "gpt_neox", "llama", "mistral", "bloom", "opt", "gptj", "qwen3", "phi3", *(["gpt_oss"] if has_bridge() else [])],
    (False, *ALL[1:]),
)


def live(model):
    adapter, ids = adapt(model), torch.arange(1, 9)
    engine = proof.plan(adapter, GROUPS, Tokens((TextTokens("proof", ids, ("",) * 8),), ""))
    return (not isinstance(engine, str), *(is_live(adapter, point) for point in POINTS))


@pytest.mark.parametrize("family", LIVE)
def test_where_edits_are_live_on_a_bridge(bridge_of, family):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert live(bridge_of(family)) == LIVE[family]


@pytest.mark.parametrize("family", [f for f in LIVE if f != "bert"])
def test_a_discarded_edit_is_an_error_and_the_one_named_works(bridge_of, family):
    """By hand: a hook on the pattern of a delegated family changes nothing, as this table says."""
    model = bridge_of(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            plain = model(IDS)
            edited = model.run_with_hooks(
                IDS, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", _column) for layer in range(3)]
            )
    assert bool((edited != plain).any()) is LIVE[family][2]
    edit = ZeroAttention(0)
    if LIVE[family][0] or LIVE[family][2]:
        assert evaluated(model, edit)[1] == pytest.approx(evaluated(model, ZeroValue(0))[1], abs=1e-4)
        return
    for call in (lambda: ss.evaluate(model, [IDS[0]], edit), lambda: edit.on(model).__enter__()):
        with pytest.raises(ss.InertHookError, match=r"zero_value \(the same as zero_attention\)"):
            call()
    for works in (ZeroValue(0), DropTokens(0), ReplaceToken(0, 9), RecomputeWindow(6), ACTIVATION):
        row = ss.evaluate(model, [IDS[0]], works).summary().set_index("intervention").loc[str(works)]
        assert row["kl"] > 1e-5


def _column(value: torch.Tensor, hook: object) -> torch.Tensor:
    value = value.clone()
    value[..., 0] = 0
    return value


@on_39
@pytest.mark.parametrize("family", LIVE_ON_HOOKED_TRANSFORMER)
def test_where_edits_are_live_on_hooked_transformer(hooked, family):
    assert live(hooked(family)) == LIVE_ON_HOOKED_TRANSFORMER[family]


@on_39
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gpt_oss"])
def test_hooked_transformer_equals_the_bridge(hooked, bridge_of, family):
    """Two ways to make the same edits, by two libraries' attention."""
    edits = [*EDITS, DropTokens(0), RecomputeWindow(6), MeanValue(0)]
    ours, theirs = (ss.evaluate(m, [IDS[0]], edits) for m in (hooked(family), bridge_of(family)))
    assert (ours.about["engine"], theirs.about["engine"]) == ("hooks", "flash")
    np.testing.assert_allclose(ours.curves["loss"], theirs.curves["loss"], atol=1e-4)
    a, b = ours.summary(), theirs.summary()
    np.testing.assert_allclose(a["sink_mass"], b["sink_mass"], atol=1e-6)
    assert a["sink_position"].equals(b["sink_position"])


@on_39
@pytest.mark.parametrize("edit", EDITS, ids=str)
def test_hooked_transformer_under_an_edit(hooked, edit):
    model = hooked("llama")
    before, (at, expected) = fingerprint(model), evaluated(model, edit)
    with torch.no_grad(), edit.on(model):
        found = cross_entropy(model(IDS)[0, :-1], IDS[0, 1:], reduction="none").numpy()[at - 1]
        if "input" in edit.touches:
            with pytest.raises(ss.SinkscopeError, match="was given embeddings"):
                model.generate(IDS[:, :12], max_new_tokens=8, verbose=False)
        else:
            made = model.generate(IDS[:, :12], max_new_tokens=8, do_sample=False, stop_at_eos=False, verbose=False)
            assert made[0, 12:].tolist() == model(made)[0, 11:-1].argmax(-1).tolist()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert fingerprint(model) == before


@on_39
def test_a_streaming_window_on_hooked_transformer_is_refused(hooked):
    with pytest.raises(ss.SinkscopeError, match="load the model as a TransformerBridge"):
        ss.evaluate(hooked("llama"), [IDS[0]], StreamingWindow(8))
