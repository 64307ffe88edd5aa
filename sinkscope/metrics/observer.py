"""The observer: takes the blocks of one batch, and gives each text's values with the null beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from sinkscope.block import Block
from sinkscope.metrics.accumulate import RowMean
from sinkscope.metrics.base import AnyMetric, Array, Metric
from sinkscope.metrics.catalogue import BUILT_IN
from sinkscope.metrics.null import uniform_mean
from sinkscope.metrics.values import Value, values_of
from sinkscope.tokens import TextTokens, key_positions

Key = int | str
#: Numbers of nulls that are kept to be used again: 64 MB.
MOST_NULLS = 8 << 20


class Observer:
    """Takes the blocks of one batch and keeps row means per (metric, sink position)."""

    def __init__(self, metrics: Sequence[Metric], positions: Sequence[Tensor], layers: Sequence[int]) -> None:
        """Begin a batch.

        Args:
            metrics: block metrics.
            positions: one `[batch]` of positions for each sink key looked at.
            layers: the layers that will come.
        """
        self.metrics = metrics
        self.positions = positions
        self.place = {layer: place for place, layer in enumerate(layers)}
        self.rows: dict[tuple[str, int], RowMean] = {}
        self.means: dict[tuple[str, int], Array] = {}

    def __call__(self, block: Block, group: frozenset[str]) -> None:
        """Update the metrics that wait for what this block carries."""
        for index, keys in enumerate(self.positions):
            here = block.at(keys.to(block.lengths.device))
            for m in self.metrics:
                if m.group == group and (index == 0 or m.at_key):
                    rows = self.rows.setdefault((m.name, index), RowMean(m, len(self.place)))
                    rows.update(here, self.place[block.layer])

    def value(self, name: str, index: int, row: int) -> Array:
        """Give one sequence's means, `[layer, head]` or `[layer, head, key]`."""
        if (name, index) not in self.means:
            self.means[name, index] = self.rows[name, index].mean()
        return np.asarray(self.means[name, index][:, row])


@dataclass
class Finish:
    """Turns the means of one sequence into reported values, with the null beside each.

    Attributes:
        asked: the metrics to report, of which `base` are the block metrics behind them.
        keys: the sink keys looked at.
        causal: False for an encoder.
        layers: the layers that were seen.
        windows: sliding window of each layer that has one.
    """

    asked: Sequence[AnyMetric]
    base: Sequence[Metric]
    keys: Sequence[Key]
    causal: bool
    layers: Sequence[int]
    windows: Mapping[int, int]
    _nulls: dict[tuple[str, str, int, int, int | None], Array] = field(default_factory=dict, repr=False)
    _room: int = MOST_NULLS

    def __call__(self, observer: Observer, row: int, sequence: TextTokens) -> tuple[Value, ...]:
        """Give the values of the text that stands in a row of the batch."""
        values = []
        for index, key in enumerate(self.keys):
            position = int(key_positions(key, [sequence])[0])
            tag = f"[key={key}]" if len(self.keys) > 1 else ""
            means, nulls = {}, {}
            for m in self.base:
                means[m.name] = observer.value(m.name, index if m.at_key else 0, row)
                if means[m.name].ndim == 3:
                    means[m.name] = means[m.name][..., : len(sequence)]
                nulls[m.name] = self._null(m, sequence, position, means[m.name])
            for reported in self.asked:
                at_key = getattr(reported, "at_key", False)
                if at_key or index == 0:
                    at, mark = (position, tag) if at_key else (None, "")
                    values += values_of(reported, means, nulls, at, mark, len(sequence), self.causal)
        return tuple(values)

    def _null(self, m: Metric, sequence: TextTokens, position: int, like: Array) -> Array:
        """Give the null in the shape of the value: a layer's window may matter, heads never do."""
        if m.null is None:
            return np.full(like.shape, np.nan)
        # Of the built-in metrics none looks at the text, only at its length; another one may.
        text = "" if m.name in BUILT_IN else sequence.label
        rows = []
        for layer in self.layers:
            window = self.windows.get(layer) if m.null == "visible" else None
            at = (m.name, text, len(sequence), position, window)
            if at not in self._nulls:
                null = uniform_mean(m, len(sequence), position, causal=self.causal, window=window, tokens=sequence.ids)
                self._room -= null.size
                if self._room < 0:
                    self._nulls, self._room = {}, MOST_NULLS - null.size
                self._nulls[at] = null
            rows.append(self._nulls[at])
        return np.broadcast_to(np.stack(rows)[:, None], like.shape)
