"""The loop that the observing verbs share: texts -> tokens -> capture -> blocks -> an Observer per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from sinkscope.capture import Capture, cached, choose
from sinkscope.metrics.base import Metric
from sinkscope.metrics.observer import Key, Observer, counting
from sinkscope.models import Adapter
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, Corpus, TextTokens, Tokens, columns_of, key_positions
from sinkscope.where import Rule

#: Texts whose finest rows are kept if nothing is said, and batches of a stream that are read and sorted at a time.
PER_TEXT, PORTION = 100, 32
#: How a portion of texts is run: by which engine, and which of their queries count.
Ready = tuple[Capture, Rule | None]


@dataclass(frozen=True, eq=False)
class Observing:
    """What is looked at, on which model, by which engine.

    Attributes:
        adapter: the model.
        metrics: block metrics.
        keys: the sink keys looked at.
        tokenizing: keywords of :meth:`Adapter.tokenize`.
        engine: as for :func:`sinkscope.measure`, like `chunk`.
        cache: the ActivationCache that is read in place of a run, or None.
        batch_size: texts per forward pass, at most.
        where: which queries count; None for all.
        sides: 2 where the other queries are looked at too.
    """

    adapter: Adapter
    metrics: Sequence[Metric]
    keys: Sequence[Key]
    tokenizing: dict[str, Any]
    engine: str = "auto"
    chunk: int | str | None = "auto"
    cache: Any = None
    batch_size: int = 8
    where: Rule | None = None
    sides: int = 1

    def corpus(self, texts: Any) -> Corpus[Ready]:
        """Read texts portion by portion, each with the engine that will run it; bad input is said before anything runs."""
        return Corpus(texts, max(PORTION * self.batch_size, 2 * PER_TEXT), self._prepare)

    def _prepare(self, first: int, some: Any) -> tuple[Tokens, Ready]:
        tokens = self.adapter.tokenize(some, first=first, **self.tokenizing)
        self.adapter.check(tokens)
        for key in self.keys:
            key_positions(key, tokens.sequences)
        where = None if self.where is None else self.where.bound(self.adapter, first, tokens)
        groups = frozenset(m.group for m in self._ready)
        if self.cache is not None:
            columns = columns_of(some, self.tokenizing.get("attention_mask"), len(tokens))
            return tokens, (cached.plan(self.adapter, groups, self.cache, tokens, columns), where)
        return tokens, (choose(self.engine, self.adapter, groups, self.chunk, tokens), where)

    def run(
        self,
        corpus: Corpus[Ready],
        skip: Callable[[Sequence[TextTokens]], bool],
        keep: Callable[[Batch, Observer], None],
        tick: Callable[[int], None],
    ) -> None:
        """Run every batch that is not to be skipped, and hand over what its observer has seen; `tick` counts text-layers."""
        formed = any(m.reads == "pattern" for m in self._ready if "pattern" in m.needs)
        for tokens, (capture, where) in corpus:
            with surely(capture) if where is None else nullcontext():
                for batch in tokens.batches(self.batch_size if self.adapter.takes_pads else 1, self.adapter.device):
                    n = len(batch.sequences)
                    if skip(batch.sequences):
                        tick(n * len(self.adapter.layers))
                        continue
                    observer = self._observer(batch, where, capture.chunk)  # a rule may run the model by itself
                    with nullcontext() if where is None else surely(capture):
                        capture.run(batch, observer, partial(tick, n), formed)
                    keep(batch, observer)

    @property
    def _ready(self) -> list[Metric]:
        """The metrics, with what the choice of queries needs."""
        return list(self.metrics) if self.where is None else counting(self.metrics, self.where.needs)

    def _observer(self, batch: Batch, where: Rule | None, chunk: int | None) -> Observer:
        """Make the one who looks at a batch."""
        positions = [key_positions(k, batch.sequences) for k in self.keys]
        sides = (None,) if where is None else where.sides(self.adapter, batch, chunk)[: self.sides]
        return Observer(self._ready, positions, self.adapter.layers, sides)
