"""The observer: takes the blocks of one batch, and gives each text's values with the null beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.block import Block
from sinkscope.errors import SinkscopeError
from sinkscope.metrics.accumulate import RowMean, accumulator
from sinkscope.metrics.base import AnyMetric, Array, Derived, Metric, RowChoice
from sinkscope.metrics.catalogue import BUILT_IN
from sinkscope.metrics.null import uniform_mean
from sinkscope.metrics.values import Value, difference, values_of
from sinkscope.tokens import TextTokens, key_positions, whole_number

Key = int | str
#: Numbers of nulls that are kept to be used again: 64 MB.
MOST_NULLS = 8 << 20
#: What a value of the other queries, and of the difference to them, is called after its name.
OTHERS, DIFFERENCE = "[others]", "[difference]"


def keys_of(key: Any) -> list[Key]:
    """Take one sink key or several, each once.

    Raises:
        SinkscopeError: none, or something that is neither a position nor a token.
    """
    one = isinstance(key, str) or not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0
    given = [key] if one else list(key)
    keys = [k if isinstance(k, str) else whole_number(k, "key", "a position or a token") for k in given]
    if not keys:
        raise SinkscopeError("key=[]: at least one key is needed")
    return list(dict.fromkeys(keys))


def counting(metrics: Sequence[Metric], needs: Iterable[str]) -> list[Metric]:
    """Make metrics ready for a choice of queries, which needs something of a block: that comes with every block.

    The last of what is given says which queries were chosen.
    """
    ready = [replace(m, needs=tuple(dict.fromkeys((*m.needs, *needs)))) for m in metrics]
    return [*ready, replace(WHERE, needs=ready[0].needs)]


def _chosen(block: Block) -> Tensor:
    """Share of the queries that count, by layer; 0 to 1."""
    return torch.ones(len(block.lengths), 1, block.n_queries, device=block.lengths.device)


#: Which queries were chosen: a number in their rows, NaN in the others.
WHERE = Metric("where_share", _chosen, ("mass",), null=None, at_key=True, unit="share of queries", per_query=True)


class Observer:
    """Takes the blocks of one batch and keeps row means per (metric, sink position, choice of queries)."""

    def __init__(
        self,
        metrics: Sequence[Metric],
        positions: Sequence[Tensor],
        layers: Sequence[int],
        sides: Sequence[RowChoice | None] = (None,),
    ) -> None:
        """Begin a batch.

        Args:
            metrics: block metrics.
            positions: one `[batch]` of positions for each sink key looked at.
            layers: the layers that will come.
            sides: which queries count; None for all that a metric chooses.
        """
        # Whoever has whole rows formed goes first, then who has them added up: entropies, read last, are at hand then.
        self.metrics = sorted(metrics, key=lambda m: ("pattern", "received", "entropy").index(m.reads))
        self.positions, self.sides = positions, sides
        self.place = {layer: place for place, layer in enumerate(layers)}
        self.rows: dict[tuple[str, int, int], RowMean] = {}
        self.means: dict[tuple[str, int, int], Array] = {}

    def __call__(self, block: Block, group: frozenset[str]) -> None:
        """Update the metrics that wait for what this block carries."""
        place = self.place[block.layer]
        for index, keys in enumerate(self.positions):
            waiting = [m for m in self.metrics if m.group == group and (index == 0 or m.at_key)]
            here = block.at(keys.to(block.lengths.device))
            for side, choice in enumerate(self.sides if waiting else ()):
                counted = None if choice is None else choice(here)
                for m in waiting:
                    self.rows.setdefault((m.name, index, side), accumulator(m, len(self.place))).update(here, place, counted)

    def counted(self, index: int, row: int, side: int, length: int) -> NDArray[np.bool_] | None:
        """Tell which queries of a sequence count, `[layer, query]`; None for all."""
        if self.sides[side] is None:
            return None
        return ~np.isnan(self.value(WHERE.name, index, row, side)[:, 0, :length])

    def value(self, name: str, index: int, row: int, side: int = 0) -> Array:
        """Give one sequence's means, `[layer, head]`, `[layer, head, key]` or `[layer, head, query]`."""
        at = (name, index, side)
        if at not in self.means:
            self.means[at] = self.rows[at].mean()
        return np.asarray(self.means[at][:, row])

    def heads(self, name: str, index: int, side: int = 0) -> tuple[int, ...] | None:
        """Give how many heads each layer has in a metric, where layers differ in it; None where they don't."""
        heads = tuple(self.rows[name, index, side].heads.tolist())
        return heads if len(set(heads)) > 1 else None


@dataclass
class Finish:
    """Turns the means of one sequence into reported values, with the null beside each.

    Attributes:
        asked: the metrics to report, of which `base` are the block metrics behind them.
        keys: the sink keys looked at.
        causal: False for an encoder.
        layers: the layers that were seen.
        windows: sliding window of each layer that has one.
        sides: choices of queries: 1, or 2 for the others and the difference beside.
    """

    asked: Sequence[AnyMetric]
    base: Sequence[Metric]
    keys: Sequence[Key]
    causal: bool
    layers: Sequence[int]
    windows: Mapping[int, int]
    sides: int = 1
    _nulls: dict[tuple[Any, ...], Array] = field(default_factory=dict, repr=False)
    _room: int = MOST_NULLS

    def __call__(self, observer: Observer, row: int, sequence: TextTokens) -> tuple[Value, ...]:
        """Give the values of the text that stands in a row of the batch."""
        values: list[Value] = []
        for index, key in enumerate(self.keys):
            position = int(key_positions(key, [sequence])[0])
            tag = f"[key={key}]" if len(self.keys) > 1 else ""
            first, *others = [self._side(observer, row, sequence, index, position, tag, s) for s in range(self.sides)]
            values += first
            for there in others:
                values += [replace(v, name=v.name + OTHERS) for v in there]
                values += [difference(a, b, a.name + DIFFERENCE) for a, b in zip(first, there, strict=True)]
        return tuple(values)

    def _side(
        self, observer: Observer, row: int, sequence: TextTokens, index: int, position: int, tag: str, side: int
    ) -> list[Value]:
        """Give the values at one key, of one choice of queries."""
        values: list[Value] = []
        means, nulls, heads = {}, {}, {}
        counted = observer.counted(index, row, side, len(sequence))
        if observer.sides[side] is not None and counted is not None:
            share = counted.mean(axis=-1)
            values.append(Value(WHERE.name, tag, position, ("layer",), share, share * np.nan, float(share.mean()), np.nan))
        for m in self.base:
            means[m.name] = observer.value(m.name, index if m.at_key else 0, row, side)
            if means[m.name].ndim == 3:
                means[m.name] = means[m.name][..., : len(sequence if m.per_query else sequence.keyed)]
            nulls[m.name] = self._null(m, sequence, position, means[m.name], counted)
            heads[m.name] = observer.heads(m.name, index if m.at_key else 0, side)
            if (own := heads[m.name]) is not None:
                there = np.arange(max(own)) < np.array(own)[:, None]
                nulls[m.name] = np.where(there.reshape(*there.shape, *[1] * (means[m.name].ndim - 2)), nulls[m.name], np.nan)
        for reported in self.asked:
            at_key = getattr(reported, "at_key", False)
            if at_key or index == 0:
                at, mark = (position, tag) if at_key else (None, "")
                mine, even = (self._over_those_who_see(reported, found, sequence) for found in (means, nulls))
                values += values_of(reported, mine, even, at, mark, len(sequence.keyed), self.causal, heads)
        return values

    def _null(self, m: Metric, sequence: TextTokens, position: int, like: Array, counted: np.ndarray | None) -> Array:
        """Give the null in the shape of the value: a layer's window and its queries may matter, heads never do."""
        if m.null is None:
            return np.full(like.shape, np.nan)
        # Of the built-in metrics none looks at the text, only at its length; another one may.
        text = "" if m.name in BUILT_IN and sequence.ends is None else sequence.label
        mark = None if counted is None else hashlib.sha256(counted.tobytes()).digest()
        at = (m.name, text, len(sequence), len(sequence.keyed), position, mark)
        if at not in self._nulls:
            null = self._null_by_layer(m, sequence, position, counted)
            self._room -= null.size
            if self._room < 0:
                self._nulls, self._room = {}, MOST_NULLS - null.size
            self._nulls[at] = null
        return np.broadcast_to(self._nulls[at][:, None], like.shape)

    def _null_by_layer(self, m: Metric, sequence: TextTokens, position: int, counted: np.ndarray | None) -> Array:
        """Make the null of every layer, or the one that all layers have, `[layer or 1, ...]`."""
        made: dict[tuple[Any, ...], Array] = {}
        rows = []
        for place, layer in enumerate(self.layers):
            window = self.windows.get(layer) if m.null == "visible" else None
            ends, only = sequence.ends_within(self.windows.get(layer)), None if counted is None else counted[place]
            at = (repr(window), None if only is None else only.tobytes(), ends is None)
            if at not in made:
                made[at] = uniform_mean(
                    m,
                    len(sequence),
                    position,
                    causal=self.causal,
                    window=window,
                    tokens=sequence.ids,
                    counted=None if only is None else torch.from_numpy(only),
                    n_keys=len(sequence.keyed) if sequence.crossed else None,
                    ends=ends,
                )
            rows.append(made[at])
        return np.stack(rows if len(made) > 1 else rows[:1])

    def _over_those_who_see(self, m: AnyMetric, means: dict[str, Array], text: TextTokens) -> dict[str, Array]:
        """Scale means over keys for a metric that takes T - k queries to see key k: inside an image of Gemma's more do."""
        if text.ends is None or not isinstance(m, Derived) or not m.every_query:
            return means
        keys = np.arange(len(text))
        ends = [text.ends_within(self.windows.get(layer)) for layer in self.layers]
        seeing = np.stack([len(text) - keys if end is None else (end.numpy()[:, None] > keys).sum(0) for end in ends])
        return {n: x * (len(text) - keys) / seeing[:, None] if x.ndim == 3 else x for n, x in means.items()}


def countable(asked: Sequence[AnyMetric], by_name: bool) -> list[AnyMetric]:
    """Take the metrics that have a meaning over some queries alone.

    Raises:
        SinkscopeError: one that has none was asked for by name.
    """
    refused = [m.name for m in asked if isinstance(m, Derived) and m.every_query]
    if refused and by_name:
        raise SinkscopeError(
            f"{refused[0]} averages over all queries that see a key, so that where= has no meaning for it: leave it out, or "
            "ask for 'head_profile' or 'position_profile'"
        )
    return [m for m in asked if m.name not in refused]
