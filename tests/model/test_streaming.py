"""What `measure` must not do: keep patterns, compute logits, touch the model or its users' hooks, trust a KV cache."""

import contextlib
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import sinkscope as ss
from sinkscope.models import Adapter, adapt
from sinkscope.models.legacy import convert
from sinkscope.testing import FAMILIES, planted_sink, tiny_hf_model, tiny_model, tiny_tokenizer
from tests.conftest import fingerprint, fresh, most_slow
from tests.model.compare import NOT_FLASH, TL4, text_ids

pytestmark = pytest.mark.classes
on_39 = pytest.mark.skipif(TL4, reason="TransformerLens 4 has neither HookedTransformer nor HookedEncoder")
WITH_ATTENTION = [family for family in FAMILIES if family != "mamba"]
MODELS = [("bridge", family) for family in WITH_ATTENTION]
MODELS += [] if TL4 else [("hooked", family) for family in ("gpt2", "llama", "bert")]
#: Those that keep patterns of their own accord, deepened so that all of them can't be mistaken for one.
DEEP = dict.fromkeys(("gpt2", "gpt_neox", "bloom", "opt"), 6)
IDS = [text_ids(24), text_ids(20)]
HOWS = {"one shot": {"engine": "hooks", "chunk": None}, "chunks": {"engine": "hooks", "chunk": 8}, "auto": {}}
RUNS = [(*model, how) for model in MODELS for how in HOWS if (model[1], how) != ("bert", "chunks")]
#: One of each way to attend; the others are slow.
FEW = [run for run in RUNS if run[1] in ("gpt2", "bloom", "llama", "mistral", "gemma3", "gpt_oss", "bert")]


@pytest.fixture
def build(monkeypatch):
    def build(kind, family):
        recipe = FAMILIES[family]
        layers = DEEP.get(family, len(recipe.local))
        monkeypatch.setitem(FAMILIES, family, replace(recipe, local=(recipe.local * layers)[:layers]))
        if kind == "bridge":
            return fresh(tiny_model(family))
        return fresh(convert(tiny_hf_model(family), tiny_tokenizer(family), "tiny"))

    return build


@contextlib.contextmanager
def hooks_on_patterns(model, look):
    """A user's own hooks: `look(layer, pattern)` at every layer's `attn.hook_pattern`."""
    points = [model.hook_dict[f"blocks.{layer}.attn.hook_pattern"] for layer in range(model.cfg.n_layers)]
    for layer, point in enumerate(points):
        point.add_hook(lambda pattern, hook, layer=layer: look(layer, pattern))
    try:
        yield points
    finally:
        for point in points:
            point.remove_hooks("fwd")


class Alive:
    """Counts, inside every pattern hook, the patterns of earlier layers whose memory is still held by anybody."""

    def __init__(self):
        self.refs, self.counts = {}, []

    def __call__(self, layer, pattern):
        if layer == 0:
            self.refs.clear()
        self.counts.append(sum(not ref.expired() for ref in self.refs.values()))
        self.refs[layer] = StorageWeakRef(pattern.untyped_storage())


@pytest.mark.parametrize(("kind", "family", "how"), most_slow(RUNS, *FEW))
def test_at_most_one_earlier_pattern_is_alive(build, kind, family, how):
    model, alive = build(kind, family), Alive()
    with hooks_on_patterns(model, alive):
        ss.measure(model, IDS, **HOWS[how])
    assert len(alive.counts) >= model.cfg.n_layers >= 3
    assert max(alive.counts) <= 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_left_to_themselves_these_keep_all(build, family):
    """So the test above can fail: hooks alone don't stream, and one pass of the bridge holds every layer's pattern."""
    model, alive = build("bridge", family), Alive()
    with hooks_on_patterns(model, alive), torch.no_grad():
        model(torch.tensor([text_ids(24)]))
    assert max(alive.counts) == 5


@pytest.mark.parametrize(("kind", "family", "how"), most_slow(RUNS, *FEW))
def test_no_logits_are_computed(build, kind, family, how):
    class UnembeddingError(Exception):
        pass

    def refuse(module, args):
        raise UnembeddingError

    model = build(kind, family)
    unembed = {model.unembed, model.original_model.get_output_embeddings()} if kind == "bridge" else {model.unembed}
    handles = [module.register_forward_pre_hook(refuse) for module in unembed]
    ss.measure(model, IDS, **HOWS[how])
    with pytest.raises(UnembeddingError):
        model(torch.tensor([text_ids(24)]))
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("kind", "family", "how"), most_slow(RUNS, *FEW))
def test_the_model_is_left_as_it_was(build, kind, family, how):
    model = build(kind, family)
    model.train()
    before = fingerprint(model)
    kept = {name: module._pattern for name, module in model.named_modules() if hasattr(module, "_pattern")}
    ss.measure(model, IDS, **HOWS[how])
    assert fingerprint(model) == before
    assert all(module._pattern is kept[name] for name, module in model.named_modules() if name in kept)


def test_a_kept_pattern_is_given_back(build):
    model = build("bridge", "gpt2")
    held = [module for module in adapt(model).attention_modules() if module._pattern is not None]
    assert held, "nothing kept a pattern: the test above shows nothing"


@pytest.mark.parametrize("when", ["metric", "interrupt"])
@pytest.mark.parametrize(("kind", "family", "how"), [run for run in RUNS if run[1] in ("gpt2", "llama")])
def test_the_model_is_left_as_it_was_when_something_raises(build, kind, family, how, when):
    def breaks(block):
        if block.layer == 1:
            raise KeyboardInterrupt if when == "interrupt" else ZeroDivisionError("no")
        return block.pattern[..., 0]

    model = build(kind, family)
    before = fingerprint(model)
    with pytest.raises(KeyboardInterrupt if when == "interrupt" else ss.SinkscopeError):
        ss.measure(model, IDS, [breaks], **HOWS[how])
    assert fingerprint(model) == before


@pytest.mark.parametrize(("kind", "family"), MODELS)
def test_users_hooks_see_the_same_patterns_and_survive(build, kind, family):
    """Also where an engine could run that forms no pattern: it is not taken then, and the report says why."""
    model, seen = build(kind, family), []
    with hooks_on_patterns(model, lambda layer, pattern: seen.append((layer, pattern.clone()))) as points:
        with torch.no_grad():
            model(torch.tensor([text_ids(24)]))
        plain = seen.copy()
        seen.clear()
        about = ss.measure(model, [text_ids(24)]).about
        assert about["engine"] == "hooks"
        assert "hooks on the attention of layer 0" in about["engine_why"] or kind == "hooked" or family in NOT_FLASH
        assert [layer for layer, _ in seen] == [layer for layer, _ in plain] == list(range(model.cfg.n_layers))
        for (_, during), (_, before) in zip(seen, plain, strict=True):
            torch.testing.assert_close(during, before, atol=1e-6, rtol=0)
        assert [len(point.fwd_hooks) for point in points] == [1] * len(points)
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([text_ids(24)]))
        assert len(seen) == len(plain)


# --- a KV cache is proved before it is used ---------------------------------------------------------------------------


def no_cache(monkeypatch, model):
    monkeypatch.setattr(Adapter, "new_cache", lambda self, batch: None)


def bridge_that_does_not_see_it(monkeypatch, model):
    """The fault of TransformerLens's bridge with transformers 5.24: attention is not told of the cache."""

    def strip(module, args, kwargs):
        return args, kwargs | {"past_key_values": None, "cache": None, "layer_past": None}

    for block in model.blocks:
        block.attn.register_forward_pre_hook(strip, with_kwargs=True, prepend=True)


def cache_that_forgets(monkeypatch, model):
    from transformers import DynamicCache

    class Forgetful(DynamicCache):
        def update(self, keys, values, layer, *args, **kwargs):
            super().update(keys, values, layer, *args, **kwargs)
            return keys, values

    monkeypatch.setattr(Adapter, "new_cache", lambda self, batch: Forgetful())


def windowed_cache(monkeypatch, model):
    """Hugging Face's default: local layers drop old keys, so that column 0 is not position 0."""
    from transformers import DynamicCache

    config = model.original_model.config
    monkeypatch.setattr(Adapter, "new_cache", lambda self, batch: DynamicCache(config=config))


FAULTS = [no_cache, bridge_that_does_not_see_it, cache_that_forgets]
LONG = text_ids(1024)


@pytest.fixture
def planted():
    return fresh(planted_sink())


def test_a_cache_that_works_is_used(planted):
    why = ss.measure(planted, [LONG], ["sink_mass"], engine="hooks").about["engine_why"]
    assert why == "hooks on attn.hook_pattern, chunked prefill of 128 rows (KV cache proved right on this model)"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_cache_is_noticed(planted, monkeypatch, fault):
    expected = ss.measure(planted, [LONG], ["sink_mass"], chunk=None)
    fault(monkeypatch, planted)
    before = fingerprint(planted)
    report = ss.measure(planted, [LONG], ["sink_mass"], engine="hooks")
    assert "one shot (its KV cache" in report.about["engine_why"]
    assert "wrong" in report.about["engine_why"] or "does not work" in report.about["engine_why"]
    assert report.frame["value"].equals(expected.frame["value"])
    with pytest.raises(ss.SinkscopeError, match=r"chunk=64 can't be used: its KV cache"):
        ss.measure(planted, [LONG], ["sink_mass"], chunk=64)
    assert fingerprint(planted) == before


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma2", "bloom", "gpt_oss"])
def test_a_wrong_cache_is_noticed_on_every_kind_of_position(build, monkeypatch, family, fault):
    model = build("bridge", family)
    ss.measure(model, [text_ids(48)], chunk=16)
    fault(monkeypatch, model)
    with pytest.raises(ss.SinkscopeError, match=r"chunk=16 can't be used: its KV cache"):
        ss.measure(model, [text_ids(48)], chunk=16)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "gpt_oss"])
def test_a_cache_that_drops_keys_is_noticed(build, monkeypatch, family):
    model = build("bridge", family)
    windowed_cache(monkeypatch, model)
    with pytest.raises(ss.SinkscopeError, match=r"chunk=16 can't be used: its KV cache"):
        ss.measure(model, [text_ids(48)], chunk=16)


@on_39
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_wrong_cache_is_noticed_on_hooked_transformer(build, monkeypatch, family):
    model = build("hooked", family)
    ss.measure(model, [text_ids(48)], chunk=16)
    no_cache(monkeypatch, model)
    with pytest.raises(ss.SinkscopeError, match=r"chunk=16 can't be used: its KV cache"):
        ss.measure(model, [text_ids(48)], chunk=16)
