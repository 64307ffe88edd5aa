"""Engine `hooks`: forward hooks on every layer's attention pattern, reduced and let go layer by layer.

For any TransformerLens model. Hooks alone do not stream: TransformerBridge asks Hugging Face for all attentions, and
some of its attention modules keep their last pattern. So the body runs with `output_attentions=False`, and every
attention module is made to drop its pattern as soon as it has returned: at most one earlier layer's pattern is alive
inside any hook. Long texts run as a chunked prefill with the KV cache, `chunk` query rows at a time, so that a pattern
is `[batch, head, chunk, keys]` and never T x T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sinkscope.block import HOOK_OF
from sinkscope.capture.blocks import ATTENTION
from sinkscope.capture.engine import Capture, Take
from sinkscope.capture.swap import attention_bridges
from sinkscope.errors import InertHookError
from sinkscope.models import Adapter
from sinkscope.models.versions import cache_keyword
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Batch


@dataclass
class Hooks:
    """A feed of forward hooks, one per layer and need."""

    adapter: Adapter
    needs: frozenset[str]
    name: str = "hooks"

    @contextmanager
    def attached(self, take: Take) -> Iterator[None]:
        """Hook the model, and have it let go of its patterns."""
        with dropping_patterns(self.adapter), knowing_caches(self.adapter), observed(self.adapter, self.needs, take):
            yield

    def begin(self) -> None:
        """Do nothing: a hook has no memory."""

    def inert(self, layer: int) -> InertHookError:
        """Say which hooks never fired."""
        asked = {HOOK_OF.get(need, "attn.hook_pattern" if need in ATTENTION else need) for need in self.needs}
        return InertHookError(
            f"{' or '.join(sorted(asked))} never fired in layer {layer} of {self.adapter.name}. Where attention is delegated "
            "to Hugging Face, its implementation must be eager: model.original_model.set_attn_implementation('eager'); or "
            "load the model with ss.load_model. A point that a switch of TransformerLens turns on must be on"
        )

    def first_bad(self, batch: Batch) -> str:
        """Look at the residual stream before and after each layer."""
        return first_bad_layer(self.adapter, batch)


def hooks(adapter: Adapter, groups: frozenset[frozenset[str]], why: str, chunk: int | None = None) -> Capture:
    """Give the engine."""
    needs = frozenset().union(*groups) - {"gate"}  # which is open, where there is none
    return Capture(adapter, groups, Hooks(adapter, needs or frozenset({"pattern"})), why, chunk)


def first_bad_layer(adapter: Adapter, batch: Batch) -> str:
    """Run once more, looking at the residual stream before and after each layer: where does it first go wrong?"""
    bad: list[str] = []

    def look(layer: int, need: str, value: Tensor) -> None:
        rows = value[batch.valid] if value.ndim == 3 else value.transpose(1, 2)[batch.valid]
        if not bad and not bool(torch.isfinite(rows).all()):
            bad.append("in the embeddings" if need == "hook_resid_pre" and layer == 0 else f"in layer {layer}")

    with observed(adapter, frozenset({"hook_resid_pre", "pattern", "residual"}), look):
        adapter.body(batch.ids, batch.valid, **batch.beside)
    return bad[0] if bad else "after the last layer"


@contextmanager
def observed(adapter: Adapter, needs: frozenset[str], take: Take) -> Iterator[None]:
    """Add a forward hook per layer and need beside whatever hooks there are; take away those alone."""
    wanted = {"pattern" if need in ATTENTION else need for need in needs}
    names = {need: "attn.hook_pattern" if need == "pattern" else HOOK_OF.get(need, need) for need in sorted(wanted)}
    with hooked(adapter, names, lambda layer, need: partial(_observe, take=take, layer=layer, need=need)):
        yield


def _observe(value: Tensor, hook: Any, *, take: Take, layer: int, need: str) -> None:
    take(layer, need, value.detach())


@contextmanager
def hooked(
    adapter: Adapter,
    names: Mapping[str, str],
    make: Callable[[int, str], Callable[..., Any]],
    layers: Sequence[int] | None = None,
) -> Iterator[None]:
    """Add the function `make(layer, what)` at hook point `names[what]` of every layer, or some; take away those alone."""
    with Undo() as undo:
        with uninterrupted():
            for layer in adapter.layers if layers is None else layers:
                for what, name in names.items():
                    point = adapter.hook_point(layer, name)
                    point.add_hook(make(layer, what))
                    undo.callback(_unhook, point, point.fwd_hooks[-1])
        yield


def _unhook(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


@contextmanager
def knowing_caches(adapter: Adapter) -> Iterator[None]:
    """Call the KV cache of transformers 5.24 (`cache`) as TransformerLens 4.3 does where a bridge attends by itself."""
    modules = [module for _, module in attention_bridges(adapter).values()]
    with Undo() as undo:
        with uninterrupted():
            for module in modules if cache_keyword(adapter.trunk) == "cache" else []:
                undo.callback(_renaming(module, "cache", "past_key_values"))
                undo.callback(_renaming(module.original_component, "past_key_values", "cache"))  # asked by some bridges
        yield


def _renaming(module: Any, old: str, new: str) -> Callable[[], None]:
    """Have a module's keyword come under another name; gives what undoes it."""

    def rename(module: Any, args: Any, given: dict[str, Any]) -> Any:
        return args, {new if name == old else name: value for name, value in given.items()}

    undo: Callable[[], None] = module.register_forward_pre_hook(rename, with_kwargs=True).remove
    return undo


@contextmanager
def dropping_patterns(adapter: Adapter) -> Iterator[None]:
    """Make attention modules drop the pattern that they keep for later, as soon as they return."""

    def drop(module: Any, args: Any, output: Any) -> None:
        module._pattern = None

    with Undo() as undo:
        with uninterrupted():
            for module in adapter.attention_modules():
                undo.callback(setattr, module, "_pattern", module._pattern)
                undo.callback(module.register_forward_hook(drop).remove)
        yield
