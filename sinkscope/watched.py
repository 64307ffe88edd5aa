"""What is kept of the passes that `watch` sees: by pass, and by text, whose queries come in one pass or in hundreds.

Rows of passes that give one token each are put together, and metrics are computed of many at once: they are the consecutive
queries of a block like any others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.block import Block, PatternRows
from sinkscope.capture.attended import Attended, Later, Rows, masses
from sinkscope.capture.blocks import NoRows
from sinkscope.capture.layout import Layout
from sinkscope.metrics.accumulate import RowMean, accumulator, grown
from sinkscope.metrics.base import Array, Metric
from sinkscope.metrics.observer import WHERE, Observer
from sinkscope.steps import Step, Watched
from sinkscope.tokens import TextTokens, tokenize

#: Passes of one token whose metrics are computed at once.
TOGETHER = 64


@dataclass(frozen=True, eq=False)
class Masses:
    """The attention that queries pay to the keys looked at, and their sums; whole rows are not there."""

    values: Float[Tensor, "batch head query looked"]
    sums: Float[Tensor, "batch head query"] | None
    keys: Sequence[int]

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give that to one key, the same position in every text."""
        return self.values[..., self.keys.index(int(keys[0]))]

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give the sums."""
        return torch.ones_like(self.values[..., 0]) if self.sums is None else self.sums

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Refuse, as where nothing is declared."""
        return NoRows().pattern("pattern")


class Pass:
    """One forward pass: what its layers have shown so far."""

    def __init__(self, number: int, layout: Layout, run: Run, watched: Watched) -> None:
        self.number, self.layout, self.run, self.watched = number, layout, run, watched
        self.why: str | None = None
        self.columns = [layout.column_of(key) for key in watched.keys]
        self.masses: dict[int, list[Tensor]] = {}
        self.sums: dict[int, list[Tensor | None]] = {}
        self.later: dict[int, Attended] = {}
        self.means = Means(watched.adapter.layers, 1)

    def take(self, layer: int, first: int, n: int, rows: Rows) -> None:
        """Take some rows of a layer."""
        if isinstance(rows, Later) and self.watched.thin:
            self.later[layer] = rows.of
            return
        self.masses.setdefault(layer, []).append(rows.mass(self.columns) if self.watched.thin else torch.zeros(0))
        self.sums.setdefault(layer, []).append(rows.row_sum())
        if not self.watched.whole:
            return
        part = self.layout.part(first, first + n)
        seen = part if self.watched.adapter.causal else self.layout  # whose keys these queries can see
        values = part.queries(rows.weights())
        for start in sorted(set(part.starts)):
            n_keys = start + n if self.watched.adapter.causal else int(seen.lengths.max())
            pattern = PatternRows(seen.keys(values, rows.first_key, n_keys))
            block = self.run.block(layer, start, n, seen, pattern, values.device)
            counted = _counted(part, start, n)
            self.means.update(self.watched.whole, block, self.watched.keys, counted, torch.zeros(n, dtype=torch.long))

    @property
    def missing(self) -> list[int]:
        """Layers of which nothing came."""
        return [layer for layer in self.watched.adapter.layers if layer not in self.masses and layer not in self.later]

    def settle(self) -> None:
        """Compute what was put off to the end of the pass."""
        with torch.no_grad(), torch.autocast(self.watched.adapter.device.type, enabled=False):
            for layer, mass in masses(self.later, self.columns):
                self.masses[layer], self.sums[layer] = [mass], [None]
        self.later = {}

    def joined(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """Give a layer's masses and sums, in the order of positions."""
        sums = [s for s in self.sums[layer] if s is not None]
        return (
            self.layout.queries(torch.cat(self.masses[layer], 2)),
            self.layout.queries(torch.cat(sums, 2)) if sums else None,
        )


def _counted(layout: Layout, start: int, n: int) -> Tensor:
    """Mark the queries of the rows that begin at a position, `[batch, query]`."""
    here = torch.tensor([s == start for s in layout.starts])[:, None]
    return here & (torch.arange(n) < torch.tensor(layout.counts)[:, None])


@dataclass
class Means:
    """Means over queries of every metric, pass by pass: `[pass, layer, batch, head]`, or with a key behind."""

    layers: Sequence[int]
    passes: int
    sums: dict[tuple[str, int], Array] = field(default_factory=dict)
    rows: dict[tuple[str, int], Array] = field(default_factory=dict)
    series: dict[tuple[str, int], RowMean] = field(default_factory=dict)
    heads: dict[tuple[str, int], NDArray[np.int_]] = field(default_factory=dict)

    def update(
        self, metrics: Sequence[Metric], block: Block, keys: Sequence[int], counted: Tensor, owner: Int[Tensor, " query"]
    ) -> None:
        """Add a block; `owner` says to which pass each query belongs."""
        place = list(self.layers).index(block.layer)
        for index, key in enumerate(keys):
            here = block.at(torch.full((len(block.lengths),), key, device=block.lengths.device))
            for m in metrics:
                if index and not m.at_key:
                    continue
                values, chosen = RowMean(m).chosen(here, counted)
                values = values.movedim(2, 0).cpu().double()
                shape = (self.passes, *values.shape[1:])
                sums = torch.zeros(shape, dtype=torch.float64).index_add_(0, owner, values).numpy()
                rows = torch.zeros(self.passes, len(chosen), dtype=torch.float64)
                rows.index_add_(0, owner, chosen.T.cpu().double())
                self._add((m.name, index), place, sums, rows.numpy())
                if m.per_query:
                    series = self.series.setdefault((m.name, index), accumulator(m, len(self.layers)))
                    series.update(here, place, counted)

    def _add(self, at: tuple[str, int], place: int, sums: Array, rows: Array) -> None:
        shape = (self.passes, len(self.layers), *sums.shape[1:])
        self.sums[at], self.rows[at] = grown(self.sums.get(at), shape), grown(self.rows.get(at), shape[:3])
        self.sums[at][:, place][tuple(map(slice, sums.shape))] += sums
        self.rows[at][:, place] += rows
        self.heads.setdefault(at, np.zeros(len(self.layers), dtype=int))[place] = sums.shape[2]

    def mean(self, at: tuple[str, int], place: int) -> Array:
        """Give the means of one pass: NaN where no row entered, and for heads that other layers have."""
        one = RowMean(WHERE, len(self.layers))
        one.add(self.sums[at][place], self.rows[at][place], slice(None), self.heads[at])
        return one.mean()


class Run(Observer):
    """The texts of one batch, from the first pass that is given them to the last that goes on with its cache."""

    def __init__(self, watched: Watched, layout: Layout, number: int, keep: Callable[[Step], None]) -> None:
        super().__init__(watched.metrics, [], watched.adapter.layers)
        self.watched, self.number, self.keep = watched, number, keep
        self.batch, self.layout = layout.batch, Layout(layout.batch, 0, layout.cached, None, None)
        self.ids = torch.zeros(layout.batch, layout.cached, dtype=torch.long)
        self.spans: list[tuple[list[int], list[int]]] = []
        self._waiting: list[Pass] = []

    def goes_on(self, batch: int, cached: int) -> bool:
        """Tell whether a pass goes on where this one's last ended, or before (a cache was cut)."""
        return 0 < cached <= self.layout.total and batch == self.batch

    def extend(self, layout: Layout) -> None:
        """Note what a pass was given."""
        new = torch.zeros(layout.batch, layout.n, dtype=torch.long) if layout.ids is None else layout.ids.cpu()
        self.ids = torch.cat([self.ids[:, : layout.cached], new], 1)
        self.layout = layout

    def block(self, layer: int, start: int, n: int, layout: Layout, rows: Any, device: torch.device) -> Block:
        """Make a block of some queries."""
        adapter, lengths = self.watched.adapter, layout.lengths.to(device)
        return Block(
            layer=layer,
            start=start,
            rows=rows,
            n_queries=n,
            lengths=lengths,
            keys=torch.zeros_like(lengths),
            causal=adapter.causal,
            window=adapter.windows.get(layer),
            tokens=self._tokens()[:, : start + n if adapter.causal else int(lengths.max())].to(device),
        )

    def _tokens(self) -> Int[Tensor, "batch position"]:
        """Give the ids by position, as far as the model was given them."""
        at = self.layout.columns
        return self.ids if at is None else self.ids.gather(1, at.cpu())

    def add(self, done: Pass) -> None:
        """Take a pass that has ended; a pass of one token waits for others, so that metrics are computed of many at once."""
        if self._waiting and (self._waiting[-1].number != done.number - 1 or not _follows(self._waiting[-1], done)):
            self.settle()
        self._waiting.append(done)
        self.spans.append((done.layout.starts, done.layout.counts))
        if done.layout.n > 1 or len(self._waiting) >= TOGETHER:
            self.settle()

    def settle(self) -> None:
        """Compute what waits."""
        passes, self._waiting = self._waiting, []
        if not passes:
            return
        means = passes[0].means if len(passes) == 1 else Means(self.watched.adapter.layers, len(passes))
        first, last = passes[0].layout, passes[-1].layout
        if self.watched.thin:
            n = sum(p.layout.n for p in passes)
            owner = torch.arange(len(passes)) if len(passes) > 1 else torch.zeros(n, dtype=torch.long)
            ends = Layout(last.batch, last.total - n, n, None, last.real)
            for layer in self.watched.adapter.layers:
                parts = [p.joined(layer) for p in passes]
                values = torch.cat([v for v, _ in parts], 2).cpu()
                sums = None if parts[0][1] is None else torch.cat([s for _, s in parts if s is not None], 2).cpu()
                for start in sorted(set(first.starts)):
                    block = self.block(layer, start, n, ends, Masses(values, sums, self.watched.keys), values.device)
                    means.update(self.watched.thin, block, self.watched.keys, _counted(ends, start, n), owner)
        for m, index in means.sums:
            self._merge(m, index, means)
        for place, one in enumerate(passes):
            self.keep(self._step(one, means, place))

    def _merge(self, name: str, index: int, means: Means) -> None:
        at = (name, index, 0)
        metric = next(m for m in self.metrics if m.name == name)
        kept = self.rows.setdefault(at, accumulator(metric, len(self.place)))
        self.means.clear()
        if metric.per_query:
            self.rows[at] = kept.merge(means.series[name, index])
        else:
            kept.add(means.sums[name, index].sum(0), means.rows[name, index].sum(0), slice(None), means.heads[name, index])

    def _step(self, one: Pass, means: Means, place: int) -> Step:
        values: dict[tuple[str, int], NDArray[np.float32]] = {}
        for (name, index), sums in means.sums.items():
            if sums.ndim == 4:  # with a number per key there are five, and no course over time
                metric = next(m for m in self.metrics if m.name == name)
                mean = means.mean((name, index), place)
                values |= {(n, index): _over_texts(v) for n, v in metric.finish(mean).items()}
        layout = one.layout
        spans = tuple(zip(layout.starts, layout.counts, strict=True))
        return Step(one.number, min(layout.starts), sum(layout.counts), spans, values)

    def counted(self, index: int, row: int, side: int, length: int) -> NDArray[np.bool_] | None:
        """Tell which positions of a text had their pass looked at; None for all."""
        seen = np.zeros(length, dtype=bool)
        for starts, counts in self.spans:
            seen[starts[row] : starts[row] + counts[row]] = True
        return None if seen.all() else np.tile(seen, (len(self.place), 1))

    def texts(self, tokenizer: Any, *, read: bool) -> list[tuple[int, TextTokens]]:
        """Give the rows and their texts of two tokens or more, as far as the model was given them; `read` decodes them."""
        label = f"pass {self.number}"
        lengths = [(row, n) for row, n in enumerate(self.layout.lengths.tolist()) if n > 1]
        labels = [label if self.batch == 1 else f"{label}, row {row}" for row, _ in lengths]
        found = {name: self._tokens()[row, :n] for name, (row, n) in zip(labels, lengths, strict=True)}
        if read and found:
            texts = tokenize(tokenizer, found).sequences
        else:
            texts = tuple(TextTokens(name, ids, ()) for name, ids in found.items())
        return [(row, text) for (row, _), text in zip(lengths, texts, strict=True)]


def _over_texts(values: Array) -> NDArray[np.float32]:
    """Average `[layer, batch, head]` over the texts that have a number."""
    there = ~np.isnan(values)
    count = there.sum(1)
    sums: Array = np.where(there, values, 0).sum(1)
    means = np.full_like(sums, np.nan)
    np.divide(sums, count, out=means, where=count > 0)
    return means.astype(np.float32)


def _follows(before: Pass, after: Pass) -> bool:
    """Tell whether two passes of one token each are neighbours in every text."""
    one = before.layout.n == after.layout.n == 1 and not before.watched.whole
    return one and after.layout.starts == [start + 1 for start in before.layout.starts]
