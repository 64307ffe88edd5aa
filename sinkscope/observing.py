"""The loop that the observing verbs share: texts -> tokens -> capture -> blocks -> an Observer per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sinkscope.capture import Capture, cached, choose
from sinkscope.metrics.base import Metric
from sinkscope.metrics.observer import Key, Observer
from sinkscope.models import Adapter
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, Corpus, TextTokens, Tokens, key_positions

#: Texts whose finest rows are kept if nothing is said, and batches of a stream that are read and sorted at a time.
PER_TEXT, PORTION = 100, 32


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
    """

    adapter: Adapter
    metrics: Sequence[Metric]
    keys: Sequence[Key]
    tokenizing: dict[str, Any]
    engine: str = "auto"
    chunk: int | str | None = "auto"
    cache: Any = None
    batch_size: int = 8

    def corpus(self, texts: Any) -> Corpus[Capture]:
        """Read texts portion by portion, each with the engine that will run it; bad input is said before anything runs."""
        return Corpus(texts, max(PORTION * self.batch_size, 2 * PER_TEXT), self._prepare)

    def _prepare(self, first: int, some: Any) -> tuple[Tokens, Capture]:
        tokens = self.adapter.tokenize(some, first=first, **self.tokenizing)
        self.adapter.check(tokens)
        for key in self.keys:
            key_positions(key, tokens.sequences)
        groups = frozenset(m.group for m in self.metrics)
        if self.cache is not None:
            return tokens, cached.plan(self.adapter, groups, self.cache, tokens)
        return tokens, choose(self.engine, self.adapter, groups, self.chunk, tokens)

    def run(
        self,
        corpus: Corpus[Capture],
        skip: Callable[[Sequence[TextTokens]], bool],
        keep: Callable[[Batch, Observer], None],
        tick: Callable[[int], None],
    ) -> None:
        """Run every batch that is not to be skipped, and hand over what its observer has seen; `tick` counts text-layers."""
        for tokens, capture in corpus:
            with surely(capture):
                for batch in tokens.batches(self.batch_size, self.adapter.device):
                    n = len(batch.sequences)
                    if skip(batch.sequences):
                        tick(n * len(self.adapter.layers))
                        continue
                    observer = self.observer(batch)
                    capture.run(batch, observer, partial(tick, n))
                    keep(batch, observer)

    def observer(self, batch: Batch) -> Observer:
        """Make the one who looks at a batch."""
        return Observer(self.metrics, [key_positions(k, batch.sequences) for k in self.keys], self.adapter.layers)
