"""Caches of transformers and of our own, right ones and five planted mistakes, on five families."""

import pytest
import torch
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import Cache

import sinkscope as ss
from sinkscope import SinkscopeError
from sinkscope.testing import check_cache, tiny_hf_model
from tests.conftest import attempt
from tests.conftest import fingerprint as state

if not hasattr(cache_utils, "DynamicLayer"):
    pytest.skip("these caches are made of layers, which transformers has from 4.54 on", allow_module_level=True)
FAMILIES = ["llama", "qwen3", "gpt_neox", "phi", "gpt2"]
SIZE, SINKS, TOKENS = 10, 3, 32


class Held(cache_utils.DynamicLayer):
    """`size` keys, of which the first `sinks` stay; `inside`: the query stands at its place in the cache."""

    size, sinks, inside = SIZE, SINKS, False

    def __init__(self, turn):
        super().__init__()
        self.seen, self.turn = 0, turn

    def update(self, keys, values, *args, **kwargs):
        full, values = super().update(self.came(keys), values)
        while full.shape[2] > self.size:
            full = self.moved(full)
            full, values = (torch.cat([x[:, :, : self.sinks], x[:, :, self.sinks + 1 :]], 2) for x in (full, values))
        self.keys, self.values, self.seen = full, values, self.seen + 1
        return self.given(full), values

    def came(self, keys):
        return keys

    def moved(self, keys):
        """The one after the sinks is about to go, and the last has just come."""
        return keys

    def given(self, keys):
        return keys

    def get_seq_length(self):
        return min(self.seen, self.size - 1) if self.inside else self.seen

    def get_mask_sizes(self, query_length):
        return min(self.seen + query_length, self.size), 0


class Inside(Held):
    """As StreamingLLM: keys move up one position when one before them is evicted."""

    inside = True

    def moved(self, keys):
        return torch.cat([keys[:, :, : self.sinks], self.turn(keys[:, :, self.sinks : -1], -1), keys[:, :, -1:]], 2)


class NoShift(Held):
    inside = True


class Smaller(Held):
    size = SIZE - 1


class Larger(Held):
    size = SIZE + 1


class NoSinks(Held):
    sinks = 0


class FewerSinks(Inside):
    sinks = SINKS - 1


class Twice(Held):
    """Keys that are rotated already, rotated once more to their place."""

    def given(self, keys):
        return torch.cat([self.turn(keys[:, :, slot : slot + 1], slot) for slot in range(keys.shape[2])], 2)


class MovedTwice(Inside):
    def moved(self, keys):
        return torch.cat([keys[:, :, : self.sinks], self.turn(keys[:, :, self.sinks : -1], -2), keys[:, :, -1:]], 2)


def maker(model, kind):
    turns = next((m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")), None)

    def turn(keys, by):
        half = len(turns)
        a, b, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        cos, sin = (by * turns).cos(), (by * turns).sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    return lambda: Cache(layers=[kind(turn) for _ in range(model.config.num_hidden_layers)])


def check(family, kind, **how):
    model = tiny_hf_model(family)
    return check_cache(model, maker(model, kind), SIZE, SINKS, tokens=TOKENS, **how)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_right_caches_are_equal(family):
    assert str(check(family, Held)) == "equal to 0.0001 over 32 tokens (original positions)"
    if family != "gpt2":
        assert str(check(family, Inside)) == "equal to 0.0001 over 32 tokens (positions inside the cache)"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_caches(family):
    model = tiny_hf_model(family)
    layers = model.config.num_hidden_layers

    def sliding():
        return Cache(layers=[cache_utils.DynamicSlidingWindowLayer(SIZE) for _ in range(layers)])

    assert check_cache(model, sliding, SIZE, tokens=TOKENS).equal
    for cache, sinks, mistake in (
        (sliding, SINKS, "sinks are evicted: of the first 3 tokens it keeps 1-2"),
        (DynamicCache, SINKS, "nothing is evicted"),
        (lambda: DynamicCache(config=model.config), SINKS, "nothing is evicted"),
    ):
        found = check_cache(model, cache, SIZE, sinks, tokens=TOKENS)
        assert (found.token, found.layer, found.mistake) == (SIZE, 0, mistake)


MISTAKES = {
    NoShift: (SIZE, "no position shift"),
    Smaller: (SIZE - 1, "off by one in size: it keeps 9 keys where 10 are expected"),
    Larger: (SIZE, "off by one in size: it keeps 11 keys where 10 are expected"),
    NoSinks: (SIZE, "sinks are evicted: of the first 3 tokens it keeps 1-2"),
    FewerSinks: (SIZE, "sinks are evicted: of the first 3 tokens it keeps 0-1"),
    Twice: (1, "keys are rotated twice: token 1 at 2"),
    MovedTwice: (SIZE, "keys are rotated twice: token 4 at 2"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_every_planted_mistake_is_named(family, kind):
    if family == "gpt2" and kind in (FewerSinks, Twice, MovedTwice):
        return  # nothing rotates
    found, (token, mistake) = check(family, kind), MISTAKES[kind]
    if kind is Larger:
        assert found.held[:4] == (0, 1, 2, 3)
    assert not found.equal
    assert (found.token, found.layer) == (token, 0)
    assert mistake in str(found)
    assert f"at token {token}, layer 0 with the keys of tokens" in str(found)


def test_a_cache_of_any_kind_and_a_model_left_as_it_was():
    """An object without `update` that the model takes: what it keeps can't be seen, where it leaves can."""
    model = tiny_hf_model("llama")
    model(input_ids=torch.tensor([[1, 2]]))
    before = state(model)

    class Hidden:
        def __init__(self):
            self.inner = DynamicCache()

        def __getattr__(self, name):
            if name == "update":
                raise AttributeError(name)
            return getattr(self.inner, name)

    forward = type(model).forward

    def unwrapped(self, *args, past_key_values=None, **given):
        return forward(self, *args, past_key_values=getattr(past_key_values, "inner", past_key_values), **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", unwrapped)
        found = check_cache(model, Hidden, SIZE, SINKS, tokens=TOKENS)
    assert (found.token, found.layer, found.held) == (SIZE, 0, ())
    assert "can't be seen" in str(found)
    assert state(model) == before


def test_bad_input_is_refused(llama):
    model = tiny_hf_model("llama")
    words = {
        "plain Hugging Face decoder": lambda: check_cache(llama, DynamicCache, 8),
        "plain Hugging Face decoder;": lambda: check_cache(tiny_hf_model("bert"), DynamicCache, 8),
        "something is evicted": lambda: check_cache(model, DynamicCache, 40, tokens=40),
        "the size must be": lambda: check_cache(model, DynamicCache, 3, 3, tokens=40),
    }
    for expected, call in words.items():
        found = attempt(call)
        assert isinstance(found, SinkscopeError), expected
        assert expected in str(found)
    assert ss.testing.check_cache is check_cache
