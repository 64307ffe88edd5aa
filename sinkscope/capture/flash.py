"""Engine `flash`: fused attention that keeps each row's log-sum-exp, so that no pattern is ever formed.

For models whose attention Hugging Face's attention interface can replace, inside a TransformerBridge or plain. For the time
of a run they ask a function of ours (`swap.py`). A metric's rows are then recomputed from queries, keys and log-sum-exps,
as few of them as it asks for: see `rows.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sinkscope.capture.blocks import ATTENTION
from sinkscope.capture.call import Calls
from sinkscope.capture.cuts import Scratch
from sinkscope.capture.engine import Capture, Take
from sinkscope.capture.gates import gated
from sinkscope.capture.hooks import first_bad_layer, observed
from sinkscope.capture.masks import Masks
from sinkscope.capture.op import attention_with_lse
from sinkscope.capture.rows import Scores
from sinkscope.capture.swap import swapped
from sinkscope.errors import InertHookError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Batch

#: What the attention op is given or gives, `[batch, position, head, d_head]` to metrics: no hook is needed for it.
SUPPLIED = frozenset({"rotated_query", "rotated_key", "value", "output", "gate"})


@dataclass
class Fused:
    """A feed of fused attention: rows by their scores and log-sum-exps; the rest by hooks."""

    adapter: Adapter
    needs: frozenset[str]
    name: str = "flash"
    _calls: Calls = field(init=False, repr=False)
    _take: Take = field(init=False, repr=False)
    _scratch: Scratch = field(default_factory=Scratch, repr=False)
    _spare: Scratch = field(default_factory=Scratch, repr=False)

    @contextmanager
    def attached(self, take: Take) -> Iterator[None]:
        """Swap attention, and hook what else was asked for."""
        self._take, self._calls = take, Calls(self.adapter, self.attend)
        others = self.needs - ATTENTION - SUPPLIED
        with Undo() as undo:
            if "gate" in self.needs:
                undo.enter_context(gated(self.adapter, take))
            if others:
                undo.enter_context(observed(self.adapter, others, take))
            undo.enter_context(swapped(self.adapter, self._calls, Masks.of(self.adapter)))
            yield

    def begin(self) -> None:
        """Count calls from the first layer on."""
        self._calls.made = 0

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        """Attend, and hand the layer's rows over."""
        out, lse = attention_with_lse(query, key, value, **given)
        supplied = {"rotated_query": query, "rotated_key": key, "value": value, "output": out}
        for name in sorted(supplied.keys() & self.needs):
            self._take(layer, name, supplied[name].transpose(1, 2))
        self._take(layer, "pattern", Scores(query, key, lse, scratch=self._scratch, spare=self._spare, **given))
        return out

    def inert(self, layer: int) -> InertHookError:
        """Say what never came."""
        if self._calls.made == 0:
            return InertHookError("its attention does not ask Hugging Face's attention interface")
        others = sorted(self.needs - ATTENTION)
        what = " or ".join(others) if others and self._calls.made == len(self.adapter.layers) else "its attention"
        return InertHookError(f"{what} never came from layer {layer} once Hugging Face's own attention was in place")

    def first_bad(self, batch: Batch) -> str:
        """Look at layers, or, in a model without hook points, at modules."""
        return (first_bad_layer if self.adapter.shows_patterns else first_bad_module)(self.adapter, batch)


def flash(adapter: Adapter, groups: frozenset[frozenset[str]], why: str) -> Capture:
    """Give the engine."""
    return Capture(adapter, groups, Fused(adapter, frozenset().union(*groups)), why)


def first_bad_module(adapter: Adapter, batch: Batch) -> str:
    """Run once more, looking at what every module gives: the first to give NaN or infinity is named."""
    bad: list[str] = []

    def look(name: str, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        if not bad and isinstance(first, Tensor) and first.is_floating_point() and not bool(torch.isfinite(first).all()):
            bad.append(f"in {name}")

    modules = [(name, module) for name, module in adapter.network.named_modules() if name]
    with Undo() as undo:
        with uninterrupted():
            for name, m in modules:
                undo.callback(m.register_forward_hook(lambda _, __, output, name=name: look(name, output)).remove)
        adapter.body(batch.ids, batch.valid, **batch.beside)
    return bad[0] if bad else "after the last layer"
