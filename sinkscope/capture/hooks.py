"""Engine `hooks`: forward hooks on every layer's attention pattern, reduced and let go layer by layer.

For any TransformerLens model. Hooks alone do not stream: TransformerBridge asks Hugging Face for all attentions, and
some of its attention modules keep their last pattern. So the body runs with `output_attentions=False`, and every
attention module is made to drop its pattern as soon as it has returned: at most one earlier layer's pattern is alive
inside any hook. Long texts run as a chunked prefill with the KV cache, `chunk` query rows at a time, so that a pattern
is `[batch, head, chunk, keys]` and never T x T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sinkscope.block import HOOK_OF, Block, PatternRows, Rows
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import Batch

if TYPE_CHECKING:
    from sinkscope.capture import OnBlock

#: Rows that a metric sees at a time: bounds its temporaries, whatever the length.
ROWS = 256
ATTENTION = frozenset({"pattern"})


class _NoRows:
    """Stands where a metric did not ask for attention."""

    def pattern(self) -> Tensor:
        raise SinkscopeError("the block has no attention: declare it, @metric(needs=('pattern', ...))")

    def mass(self, keys: Tensor) -> Tensor:
        return self.pattern()

    def row_sum(self) -> Tensor:
        return self.pattern()


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
    _stack: ExitStack = field(default_factory=ExitStack, repr=False)
    _pass: _Pass | None = field(default=None, repr=False)

    def __enter__(self) -> HooksCapture:
        """Hook the model."""
        with ExitStack() as stack:
            stack.enter_context(self.adapter.quiet())
            stack.enter_context(_dropping_patterns(self.adapter))
            stack.enter_context(_hooked(self.adapter, frozenset().union(*self.groups), self._on_activation))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Unhook it."""
        self._pass = None
        self._stack.close()

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None]) -> None:
        """Run the body over one batch, in one shot or chunk by chunk.

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
                self._pass.done()
                if not bool(torch.isfinite(hidden[batch.valid[:, start:stop]]).all()):
                    raise _NotFiniteError
        except _NotFiniteError:
            self._pass = None
            raise _first_bad_layer(self.adapter, batch) from None
        finally:
            self._pass = None

    def _on_activation(self, layer: int, need: str, value: Tensor) -> None:
        if self._pass is not None:
            self._pass.take(layer, need, value)


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
        self.held: dict[str, Tensor] = {}
        self.waiting: set[frozenset[str]] = set()
        self.seen: set[int] = set()

    def take(self, layer: int, need: str, value: Tensor) -> None:
        if layer != self.layer:
            self.layer, self.held, self.waiting = layer, {}, set(self.groups)
        if not self.waiting:
            return
        self.held[need] = value
        for group in [g for g in self.waiting if g <= self.held.keys()]:
            self.waiting.discard(group)
            for block in self._blocks(group):
                self.on_block(block, group)
        self.held = {name: kept for name, kept in self.held.items() if any(name in g for g in self.waiting)}
        if not self.waiting:
            self.seen.add(layer)
            self.tick()

    def _blocks(self, group: frozenset[str]) -> Iterator[Block]:
        """Cut a layer's rows where a metric looks at attention alone; otherwise give them all at once."""
        batch, causal = self.batch, self.adapter.causal
        pattern = self.held.get("pattern") if "pattern" in group else None
        n = pattern.shape[2] if pattern is not None else min(v.shape[1] for k, v in self.held.items() if k in group)
        lengths = batch.lengths
        rest = {name: self.held[name] for name in group - ATTENTION}
        step = ROWS if group == ATTENTION else n
        for row in range(0, n, step):
            stop = min(row + step, n)
            first = self.start + row
            rows: Rows = _NoRows()
            if pattern is not None:
                seen = self.start + stop if causal else pattern.shape[3]
                rows = PatternRows(pattern[:, :, row:stop, :seen])
                real = batch.valid[:, first : first + stop - row, None]
                if not bool(torch.isfinite(rows.values[..., 0].transpose(1, 2).where(real, 0)).all()):
                    raise _NotFiniteError
            yield Block(
                layer=self.layer,
                start=first,
                rows=rows,
                n_queries=stop - row,
                lengths=lengths,
                keys=torch.zeros_like(lengths),
                causal=causal,
                window=self.adapter.windows.get(self.layer),
                tokens=batch.ids,
                activations=rest,
            )

    def done(self) -> None:
        """Check that every layer has been seen.

        Raises:
            InertHookError: a hook never fired.
        """
        missing = [layer for layer in self.adapter.layers if layer not in self.seen]
        if missing:
            asked = {HOOK_OF.get(n, "attn.hook_pattern" if n == "pattern" else n) for g in self.groups for n in g}
            needs = " or ".join(sorted(asked))
            raise InertHookError(
                f"{needs} never fired in layer {missing[0]} of {self.adapter.name}. Where attention is delegated to Hugging "
                "Face, its implementation must be eager: model.original_model.set_attn_implementation('eager'); or load the "
                "model with ss.load_model"
            )


@contextmanager
def _hooked(adapter: Adapter, needs: frozenset[str], on_activation: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """Add a forward hook per layer and need beside whatever hooks there are; take away those alone."""
    added = []
    try:
        for layer in adapter.layers:
            for need in needs:
                point = adapter.hook_point(layer, "attn.hook_pattern" if need == "pattern" else HOOK_OF.get(need, need))
                point.add_hook(partial(_observe, on_activation=on_activation, layer=layer, need=need))
                added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            point.fwd_hooks[:] = [kept for kept in point.fwd_hooks if kept is not handle]


def _observe(value: Tensor, hook: Any, *, on_activation: Callable[[int, str, Tensor], None], layer: int, need: str) -> None:
    on_activation(layer, need, value.detach())


@contextmanager
def _dropping_patterns(adapter: Adapter) -> Iterator[None]:
    """Make attention modules drop the pattern that they keep for later, as soon as they return."""
    modules = list(adapter.attention_modules())
    kept = [module._pattern for module in modules]

    def drop(module: Any, args: Any, output: Any) -> None:
        module._pattern = None

    handles = [module.register_forward_hook(drop) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, pattern in zip(modules, kept, strict=True):
            module._pattern = pattern


def _first_bad_layer(adapter: Adapter, batch: Batch) -> SinkscopeError:
    """Run once more, looking at the residual stream before and after each layer, and name where it first goes wrong."""
    bad: list[str] = []

    def look(layer: int, need: str, value: Tensor) -> None:
        rows = value[batch.valid] if value.ndim == 3 else value.transpose(1, 2)[batch.valid]
        if not bad and not bool(torch.isfinite(rows).all()):
            bad.append("in the embeddings" if need == "hook_resid_pre" and layer == 0 else f"in layer {layer}")

    with _hooked(adapter, frozenset({"hook_resid_pre", "pattern", "residual"}), look):
        adapter.body(batch.ids, batch.valid)
    where = bad[0] if bad else "after the last layer"
    labels = ", ".join(repr(s.label) for s in batch.sequences)
    return SinkscopeError(
        f"NaN or infinity {where} of {adapter.name} (text {labels}). Nothing was reported. Check the weights; in float16, "
        "try bfloat16 or float32"
    )
