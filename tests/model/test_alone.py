"""Halves of larger models by themselves: CLIP's text tower, and decoders of encoder-decoders, whose masks are their own."""

import functools

import numpy as np
import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.testing.architectures import tiny_architecture
from tests.conftest import most_slow, table

IDS = {"text 0": [1, 5, 6, 7, 8, 9, 10, 2], "text 1": [1, 20, 21, 22, 2]}
#: Other layers than the encoder has; a cache of transformers 5.23 is made for as many as that.
OPTIONS = {"BartForCausalLM": {"decoder_layers": 3}, "MarianForCausalLM": {"decoder_layers": 3}}


@functools.cache
def tiny(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(tiny_architecture(name, OPTIONS.get(name, {}))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(0.25 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1) * weight)
    return model


def attention(name, ids):
    """Weights of every layer's own attention, as its modules give them: `[layer, head, query, key]`."""
    model, found = tiny(name), []
    modules = [m for at, m in model.named_modules() if at.endswith("self_attn")]
    hooks = [m.register_forward_hook(lambda module, args, output: found.append(output[1])) for m in modules]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]), **({"use_cache": False} if name in OPTIONS else {}))
    for hook in hooks:
        hook.remove()
    return torch.cat(found).double().numpy()


@pytest.mark.parametrize(
    "name",
    most_slow(
        ["CLIPTextModel", "CLIPTextModelWithProjection", "SiglipTextModel", "BartForCausalLM", "MarianForCausalLM"],
        "CLIPTextModel",
        "BartForCausalLM",
    ),
)
def test_a_half_is_hugging_faces(name):
    report = ss.measure(tiny(name), IDS, ["sink_mass", "received_profile"])
    assert report.about["causal"] == (name != "SiglipTextModel")
    for label, ids in IDS.items():
        a = attention(name, ids)
        assert bool(np.triu(a[0, 0], 1).any()) == (name == "SiglipTextModel")
        sees = np.tri(len(ids)) if report.about["causal"] else np.ones((len(ids), len(ids)))
        np.testing.assert_allclose(table(report, "sink_mass", label), a[..., 0].mean(-1), atol=1e-5)
        np.testing.assert_allclose(table(report, "received_profile", label), (a.sum(2) / sees.sum(0)).mean(1), atol=1e-5)


def test_the_loss_of_a_decoder_alone():
    model = tiny("BartForCausalLM")
    effect = ss.evaluate(model, IDS, "window(size=3)")
    rows = effect.curves[(effect.curves["intervention"] == "none") & (effect.curves["text"] == "text 0")]
    ids = torch.tensor([IDS["text 0"]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    np.testing.assert_allclose(
        rows["loss"], torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none"), rtol=1e-4
    )


def test_two_towers_are_told_apart():
    with pytest.raises(ss.SinkscopeError, match=r"two towers: pass model\.text_model or model\.vision_model"):
        ss.measure(tiny("CLIPModel"), [[1, 5, 6]])
