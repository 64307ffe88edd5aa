"""Engine `hooks`: forward hooks on every layer's attention pattern, reduced and let go layer by layer.

For any TransformerLens model. Hooks alone do not stream: TransformerBridge asks Hugging Face for all attentions, and
some of its attention modules keep their last pattern. So the body runs with `output_attentions=False`, and every
attention module is made to drop its pattern as soon as it has returned: at most one earlier layer's pattern is alive
inside any hook. Long texts run as a chunked prefill with the KV cache, `chunk` query rows at a time, so that a pattern
is `[batch, head, chunk, keys]` and never T x T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.block import HOOK_OF, Block, Rows
from sinkscope.capture.rows import MassAlone, NoRows, Source, StoredPattern
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Batch

if TYPE_CHECKING:
    from sinkscope.capture import OnBlock

#: Needs that attention itself satisfies; the others are hook points.
ATTENTION = frozenset({"mass", "pattern"})


@dataclass
class HooksCapture:
    """The engine, for one call of `measure`.

    Attributes:
        adapter: the model.
        groups: what blocks must carry, one set per group of metrics; a block is made as soon as a set is complete.
        chunk: query rows per step, or None for one shot.
        why: what ran, in words, for the report.
    """

    adapter: Adapter
    groups: frozenset[frozenset[str]]
    chunk: int | None
    why: str
    name: str = "hooks"
    _undo: ExitStack = field(default_factory=Undo, repr=False)
    _pass: _Pass | None = field(default=None, repr=False)

    def __enter__(self) -> HooksCapture:
        """Hook the model."""
        with Undo() as undo:
            undo.enter_context(self.adapter.quiet())
            undo.enter_context(dropping_patterns(self.adapter))
            undo.enter_context(_hooked(self.adapter, frozenset().union(*self.groups), self._on_activation))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Unhook it."""
        self.close()

    def close(self) -> None:
        """Unhook it, if it is hooked."""
        self._pass = None
        self._undo.close()

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None]) -> Tensor:
        """Run the body over one batch, in one shot or chunk by chunk.

        Returns:
            The last hidden state, `[batch, position, d_model]`; of the last chunk alone, where there are several.

        Raises:
            SinkscopeError: NaN or infinity in the activations; names the first layer.
            InertHookError: a layer's pattern hook never fired.
        """
        length = batch.ids.shape[1]
        step = self.chunk or length
        cache = self.adapter.new_cache(len(batch.sequences)) if self.chunk else None
        ticks = _Ticks(tick, len(self.adapter.layers), -(-length // step))
        try:
            for start in range(0, length, step):
                stop = min(start + step, length)
                self._pass = _Pass(self.adapter, self.groups, batch, start, on_block, ticks)
                hidden = self.adapter.body(batch.ids[:, start:stop], batch.valid[:, start:stop], cache)
                if self._pass.unseen:
                    raise self._inert(self._pass.unseen[0])
                if not bool(torch.isfinite(hidden[batch.valid[:, start:stop]]).all()):
                    raise _NotFiniteError
            return hidden
        except _NotFiniteError:
            self._pass = None
            where = self._first_bad(batch)
            labels = ", ".join(repr(s.label) for s in batch.sequences)
            raise SinkscopeError(
                f"NaN or infinity {where} of {self.adapter.name} (text {labels}). Nothing was reported. Check the weights; "
                "in float16, try bfloat16 or float32"
            ) from None
        finally:
            self._pass = None

    def _on_activation(self, layer: int, need: str, value: Tensor) -> None:
        if self._pass is not None:
            stored = need == "pattern"
            self._pass.take(layer, need, StoredPattern(value, self._pass.start, self.adapter.causal) if stored else value)

    def _first_bad(self, batch: Batch) -> str:
        """Run once more, looking at the residual stream before and after each layer: where does it first go wrong?"""
        bad: list[str] = []

        def look(layer: int, need: str, value: Tensor) -> None:
            rows = value[batch.valid] if value.ndim == 3 else value.transpose(1, 2)[batch.valid]
            if not bad and not bool(torch.isfinite(rows).all()):
                bad.append("in the embeddings" if need == "hook_resid_pre" and layer == 0 else f"in layer {layer}")

        with _hooked(self.adapter, frozenset({"hook_resid_pre", "pattern", "residual"}), look):
            self.adapter.body(batch.ids, batch.valid)
        return bad[0] if bad else "after the last layer"

    def _inert(self, layer: int) -> InertHookError:
        asked = {HOOK_OF.get(n, "attn.hook_pattern" if n in ATTENTION else n) for g in self.groups for n in g}
        return InertHookError(
            f"{' or '.join(sorted(asked))} never fired in layer {layer} of {self.adapter.name}. Where attention is delegated "
            "to Hugging Face, its implementation must be eager: model.original_model.set_attn_implementation('eager'); or "
            "load the model with ss.load_model"
        )


class _NotFiniteError(Exception):
    """NaN or infinity was met; the first layer is looked for afterwards."""


@dataclass
class _Ticks:
    """Turns `parts` reports per layer into one tick per layer."""

    tick: Callable[[], None]
    layers: int
    parts: int
    seen: int = 0

    def __call__(self) -> None:
        self.seen += 1
        if self.seen > (self.parts - 1) * self.layers:
            self.tick()


class _Pass:
    """One forward pass: collects a layer's activations until a group is complete, makes its block, and lets go."""

    def __init__(
        self,
        adapter: Adapter,
        groups: frozenset[frozenset[str]],
        batch: Batch,
        start: int,
        on_block: OnBlock,
        tick: Callable[[], None],
    ) -> None:
        self.adapter, self.groups, self.batch, self.start = adapter, groups, batch, start
        self.on_block, self.tick = on_block, tick
        self.layer = -1
        self.held: dict[str, Any] = {}
        self.waiting: set[frozenset[str]] = set()
        self.seen: set[int] = set()

    @property
    def unseen(self) -> list[int]:
        """Layers of which something never came."""
        return [layer for layer in self.adapter.layers if layer not in self.seen]

    def take(self, layer: int, need: str, value: Tensor | Source) -> None:
        if layer != self.layer:
            self.layer, self.held, self.waiting = layer, {}, set(self.groups)
        if not self.waiting:
            return
        if isinstance(value, Tensor):
            self.held[need] = value
        else:
            if not value.finite(self.batch.valid[:, self.start : self.start + value.n].to(value.device)):
                raise _NotFiniteError
            self.held |= dict.fromkeys(ATTENTION, value)
        for group in [g for g in self.waiting if g <= self.held.keys()]:
            self.waiting.discard(group)
            for block in self._blocks(group):
                self.on_block(block, group)
        self.held = {name: kept for name, kept in self.held.items() if any(name in g for g in self.waiting)}
        if not self.waiting:
            self.seen.add(layer)
            self.tick()

    def _blocks(self, group: frozenset[str]) -> Iterator[Block]:
        """Cut a layer's rows where a metric looks at whole ones and nothing else; otherwise give them all at once."""
        source: Source | None = next((self.held[name] for name in group & ATTENTION), None)
        rest = {name: self.held[name] for name in group - ATTENTION}
        n = source.n if source is not None else min(value.shape[1] for value in rest.values())
        device = next(iter(rest.values())).device if source is None else source.device
        lengths = self.batch.lengths.to(device)
        for start, stop in source.cuts() if source is not None and group == {"pattern"} else [(0, n)]:
            rows: Rows = NoRows() if source is None else source.rows(start, stop)
            yield Block(
                layer=self.layer,
                start=self.start + start,
                rows=rows if source is None or "pattern" in group else MassAlone(rows),
                n_queries=stop - start,
                lengths=lengths,
                keys=torch.zeros_like(lengths),
                causal=self.adapter.causal,
                window=self.adapter.windows.get(self.layer),
                tokens=self.batch.ids.to(device),
                activations=rest,
            )


@contextmanager
def _hooked(adapter: Adapter, needs: frozenset[str], on_activation: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Add a forward hook per layer and need beside whatever hooks there are; take away those alone."""
    wanted = {"pattern" if need in ATTENTION else need for need in needs}
    names = {need: "attn.hook_pattern" if need == "pattern" else HOOK_OF.get(need, need) for need in sorted(wanted)}
    with hooked(adapter, names, lambda layer, need: partial(_observe, on_activation=on_activation, layer=layer, need=need)):
        yield


@contextmanager
def hooked(adapter: Adapter, names: Mapping[str, str], make: Callable[[int, str], Callable[..., Any]]) -> Iterator[None]:
    """Add the function `make(layer, what)` at hook point `names[what]` of every layer; take away those alone."""
    with Undo() as undo:
        with uninterrupted():
            for layer in adapter.layers:
                for what, name in names.items():
                    point = adapter.hook_point(layer, name)
                    point.add_hook(make(layer, what))
                    undo.callback(_unhook, point, point.fwd_hooks[-1])
        yield


def _unhook(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


def _observe(value: Tensor, hook: Any, *, on_activation: Callable[[int, str, Tensor], None], layer: int, need: str) -> None:
    on_activation(layer, need, value.detach())


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
