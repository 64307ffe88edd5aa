"""Is somebody's evicting KV cache right? Token by token against the one banded pass that equals it, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, SinkWindow, StreamingWindow, Window
from sinkscope.models import Adapter, adapt
from sinkscope.runs.undo import Undo
from sinkscope.testing.mistakes import NEAR, kept, matched, positions_of, ranges, stands
from sinkscope.tokens import whole_number

#: Tokens that are run if nothing is said.
TOKENS = 512


@dataclass(frozen=True)
class CacheCheck:
    """What `check_cache` found; `str` says it in words.

    Attributes:
        equal: whether all tokens agree.
        tokens: how many were run.
        tolerance: what "agree" means: difference over the largest magnitude of a layer's output for a token.
        positions: the convention it agrees with, or does for longest: `"original"`, or `"cache"`, those inside the cache.
        token: position of the first token that differs, or None.
        layer: the first layer in which it does, or None.
        held: the tokens whose keys the layer was given there, in order; -1 for one that is none of the text's. Empty where
            the cache has no `update` to look at.
        expected: the tokens whose keys it should have been given.
        mistake: what it looks like.
    """

    equal: bool
    tokens: int
    tolerance: float
    positions: str
    token: int | None = None
    layer: int | None = None
    held: tuple[int, ...] = ()
    expected: tuple[int, ...] = ()
    mistake: str = ""

    def __str__(self) -> str:
        """Say it in one sentence or two."""
        how = "original positions" if self.positions == "original" else "positions inside the cache"
        if self.equal:
            return f"equal to {self.tolerance:g} over {self.tokens} tokens ({how})"
        keys = f" with the keys of tokens {ranges(self.held)} (expected {ranges(self.expected)})" if self.held else ""
        return f"leaves the banded pass ({how}) at token {self.token}, layer {self.layer}{keys}: {self.mistake}"


def check_cache(
    model: Any,
    make_cache: Callable[[], Any],
    size: SupportsIndex,
    sinks: SupportsIndex = 0,
    *,
    ids: Sequence[int] | Int[Tensor, " position"] | None = None,
    tokens: SupportsIndex | None = None,
    tolerance: float = 1e-4,
) -> CacheCheck:
    """Run a cache token by token, and compare every layer with the banded pass of `SinkWindow` and of `StreamingWindow`.

    A cache of `size` keys, of which the first `sinks` stay, gives what one dense pass gives in which query i sees key k where
    k < sinks or i - k < size - sinks; either at the tokens' own positions, or at those inside the cache. Both are tried.

    Args:
        model: a plain Hugging Face decoder, in float32 for a tolerance this small. It is left as it was.
        make_cache: gives a new, empty cache, that the model takes as `past_key_values`: of transformers, or your own.
        size: keys that a query sees, itself included.
        sinks: how many of these are the first tokens'.
        ids: what to run; random ids if nothing is said.
        tokens: how many; 512, or what the context holds.
        tolerance: see :class:`CacheCheck`.

    Raises:
        SinkscopeError: another kind of model; a size that is never reached; no tokens left to evict.

    >>> from transformers import DynamicCache
    >>> from sinkscope.testing import tiny_hf_model
    >>> check = check_cache(tiny_hf_model("llama"), DynamicCache, size=8, sinks=2, tokens=24)
    >>> check.token, check.layer, check.held, check.mistake
    (8, 0, (0, 1, 2, 3, 4, 5, 6, 7, 8), 'nothing is evicted')
    """
    adapter = adapt(model)
    if adapter.kind != "hugging_face" or not adapter.causal:
        raise SinkscopeError(f"check_cache runs a plain Hugging Face decoder; {adapter.name} is {adapter.kind}")
    size, sinks = whole_number(size, "size"), whole_number(sinks, "sinks")
    wanted = min(TOKENS, adapter.n_ctx or TOKENS) if tokens is None else whole_number(tokens, "tokens")
    if ids is None:
        ids = torch.randperm(adapter.vocabulary, generator=torch.Generator().manual_seed(0)).repeat(
            -(-wanted // adapter.vocabulary)
        )
        ids = ids[:wanted]
    given = torch.as_tensor(ids, dtype=torch.long).to(adapter.device)
    if given.ndim != 1 or len(given) <= size:
        raise SinkscopeError(
            f"size={size}: give more tokens than that, so that something is evicted; got {tuple(given.shape)}"
        )
    edits: dict[str, Intervention] = {"original": SinkWindow(size, sinks) if sinks else Window(size)}
    if sinks and adapter.rotations:
        edits["cache"] = StreamingWindow(size, sinks)
    with adapter.inference():
        banded = {name: _banded(adapter, edit, given) for name, edit in edits.items()}
        left, run = _run(adapter, make_cache(), given, banded, tolerance)
    if left is None:
        return CacheCheck(True, len(given), tolerance, run.positions)
    token, layer = left
    first = max(sinks, token - (size - sinks) + 1)
    expected = (*range(min(sinks, token + 1)), *range(first, token + 1))
    held, mistake = _diagnosed(adapter, run, banded[run.positions], token, layer, expected, sinks)
    return CacheCheck(False, len(given), tolerance, run.positions, token, layer, held, expected, mistake)


@dataclass(frozen=True, eq=False)
class _Banded:
    """One pass under a window: what every layer gives, and the keys (rotated to their own positions) and values in it."""

    hidden: Float[Tensor, "layer position d_model"]
    keys: list[Tensor]
    values: list[Tensor]


@dataclass(eq=False)
class _Run:
    """The run of the cache: the convention it agrees with for longest, and what its layers were given last."""

    positions: str
    given: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    #: How many keys more the layer was given two tokens later, or as many later as there are.
    grown: int = 0


@contextmanager
def _layers(adapter: Adapter) -> Iterator[list[Tensor]]:
    """Collect what each layer gives, `[position, d_model]`, in order."""
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple | list) else output)[0].detach())

    with Undo() as undo:
        for block in adapter.blocks:
            undo.callback(block.register_forward_hook(keep).remove)
        yield found


def _banded(adapter: Adapter, edit: Intervention, ids: Tensor) -> _Banded:
    """Run all tokens at once under a window."""
    from transformers import DynamicCache

    cache = DynamicCache()
    with edit.on(adapter.model), _layers(adapter) as found:
        adapter.model(input_ids=ids[None], past_key_values=cache, use_cache=True)
    return _Banded(torch.stack(found), [layer.keys[0] for layer in cache.layers], [layer.values[0] for layer in cache.layers])


def _run(
    adapter: Adapter, cache: Any, ids: Tensor, banded: dict[str, _Banded], tolerance: float
) -> tuple[tuple[int, int] | None, _Run]:
    """Run token by token until no convention agrees any more; give the token and the layer where the last one left."""
    agree = list(banded)
    run = _Run(agree[0])
    with _watched(cache, run.given):
        for token in range(len(ids)):
            with _layers(adapter) as found:
                output = adapter.model(input_ids=ids[None, token : token + 1], past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None) or cache
            ours = torch.stack(found)[:, 0]
            left = {}
            for name in agree:
                theirs = banded[name].hidden[:, token]
                gap = (ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)
                if not bool((gap <= tolerance).all()):
                    left[name] = int((~(gap <= tolerance)).nonzero()[0])
            if len(left) == len(agree):
                run.positions = max(left, key=lambda name: left[name])
                layer, then = left[run.positions], dict(run.given)
                for later in range(token + 1, min(token + 3, len(ids))):
                    output = adapter.model(input_ids=ids[None, later : later + 1], past_key_values=cache, use_cache=True)
                    cache = getattr(output, "past_key_values", None) or cache
                if layer in then:
                    run.grown = run.given[layer][0].shape[2] - then[layer][0].shape[2]
                run.given = then
                return (token, layer), run
            agree = [name for name in agree if name not in left]
    run.positions = agree[0]
    return None, run


@contextmanager
def _watched(cache: Any, given: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Note the keys and values that a cache hands to each layer, where it has transformers' method for that."""
    update = getattr(cache, "update", None)
    if update is None:
        yield
        return

    def noted(keys: Tensor, values: Tensor, layer: int, *args: Any, **more: Any) -> Any:
        result = update(keys, values, layer, *args, **more)
        given[layer] = result[0].detach(), result[1].detach()
        return result

    cache.update = noted
    try:
        yield
    finally:
        del cache.update


def _diagnosed(
    adapter: Adapter, run: _Run, banded: _Banded, token: int, layer: int, expected: tuple[int, ...], sinks: int
) -> tuple[tuple[int, ...], str]:
    """Find the tokens whose keys the layer was given, and name the mistake that it looks like."""
    if layer not in run.given:
        return (), "what it keeps can't be seen (it has no update(keys, values, layer) that was called)"
    keys, values = (x[0].float() for x in run.given[layer])
    known = banded.values[layer][:, : token + 1].float()
    distance = torch.cdist(values.transpose(0, 1).flatten(1), known.transpose(0, 1).flatten(1))
    norms = known.transpose(0, 1).flatten(1).norm(dim=-1)
    held = matched(distance < NEAR * norms)
    if -1 in held:
        if held[-1] == -1 and held[:-1] == expected[:-1]:
            return (
                held,
                "the token itself stands at another position: its embedding is not that of the text's (no position shift)",
            )
        return held, "values that are no token's: they are changed, or stand in the wrong place"
    if sorted(held) != sorted(expected):
        return held, kept(held, expected, sinks, evicts=len(held) <= token or run.grown == 0)
    far = 2 * len(banded.hidden[0])
    return held, positions_of(held, stands(adapter, keys, banded.keys[layer], held, far) if adapter.rotations else None)
