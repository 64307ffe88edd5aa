"""Where an engine's attention rows come from: a layer's stored pattern, or its queries, keys and log-sum-exps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.block import PatternRows, Rows
from sinkscope.capture.op import scores_of

#: Rows that a metric sees at a time, at most: bounds its temporaries, whatever the length.
ROWS = 256
#: Bytes of the rows that are recomputed at a time, where that is fewer, and the fewest rows.
BYTES, FEWEST = 16 << 20, 16
#: The same on a GPU, where every block costs a dozen launches: a quarter of the time (H200, 4,096 tokens).
GPU_ROWS, GPU_BYTES = 512, 256 << 20
#: Bytes, and keys, of the tiles in which rows are summed up: two of them should stay in a processor's cache.
TILE, KEYS = 4 << 20, 2048
#: The same of rows that are stored, and only looked at.
STORED = 8 << 20
#: By how much a log-sum-exp may be off and be mended: below what the proof of the engine calls wrong.
ROUNDING = 1e-3
#: The logarithm of no attention: exp gives 0, and 0 times it is 0, which infinity's would not be.
NEVER = -1e30


@runtime_checkable
class Source(Protocol):
    """All attention rows of one layer in one forward pass."""

    @property
    def n(self) -> int:
        """Give the number of rows."""
        ...

    @property
    def device(self) -> torch.device:
        """Tell where the layer is."""
        ...

    def rows(self, start: int, stop: int, real: Bool[Tensor, "batch row"] | None = None) -> Rows:
        """Give some of them, counted from the first of this pass; `real` are the rows that sums over rows take in."""
        ...

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Cut the rows for metrics that look at whole ones."""
        ...

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look whether the real rows are free of NaN and infinity."""
        ...


@dataclass(frozen=True, eq=False)
class StoredPattern:
    """A pattern as TransformerLens hands it over; `start` is the position of its first row."""

    values: Float[Tensor, "batch head query key"]
    start: int
    causal: bool

    @property
    def n(self) -> int:
        """Give the number of rows."""
        return self.values.shape[2]

    @property
    def device(self) -> torch.device:
        """Tell where the layer is."""
        return self.values.device

    def rows(self, start: int, stop: int, real: Bool[Tensor, "batch row"] | None = None) -> PatternRows:
        """Give some rows, and the keys up to the last of them."""
        return PatternRows(self.values[:, :, start:stop, : self.start + stop if self.causal else None])

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Cut into blocks that stay in a processor's cache, as far as that goes."""
        b, h, n, keys = self.values.shape
        rows = min(max(FEWEST, STORED // (4 * b * h * keys)), ROWS)
        return ((row, min(row + rows, n)) for row in range(0, n, rows))

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look at the first column: a row with a bad score is bad everywhere."""
        return bool(torch.isfinite(self.values[..., 0].transpose(1, 2).where(real[..., None], 0)).all())


class Scratch:
    """Memory that is used again and again: fresh pages for every block's scores would double the time of making them."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def __call__(self, like: Tensor, *shape: int) -> Tensor:
        """Give an uninitialised tensor of this shape, which the next call takes back."""
        size = math.prod(shape)
        if self._memory.numel() < size or (self._memory.dtype, self._memory.device) != (like.dtype, like.device):
            self._memory = torch.empty(size, dtype=like.dtype, device=like.device)
        return self._memory[:size].view(shape)


@dataclass(frozen=True, eq=False)
class Scores:
    """Rows that are recomputed when asked for: `A[i, k] = exp(score(q_i, k_k) - lse_i)`, exactly.

    Attributes are those of :func:`sinkscope.capture.op.attention_with_lse`, the `lse` that it gave, and memory for scores
    that all layers may share.
    """

    q: Float[Tensor, "batch head position d_head"]
    k: Float[Tensor, "batch kv_head key d_head"]
    lse: Float[Tensor, "batch head position"]
    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    key_mask: Bool[Tensor, "batch key"] | None = None
    bias: Float[Tensor, "#batch head position key"] | None = None
    scratch: tuple[Scratch, Scratch] = field(default_factory=lambda: (Scratch(), Scratch()))

    @property
    def n(self) -> int:
        """Give the number of rows."""
        return self.q.shape[2]

    @property
    def device(self) -> torch.device:
        """Tell where the layer is."""
        return self.q.device

    @property
    def exact(self) -> bool:
        """Tell whether the log-sum-exps are good to float32: CUDA's kernels multiply in parts, 1e-5 off for large scores."""
        return not self.q.is_cuda

    def queries_of(self, heads: slice) -> slice:
        """Give the query heads of some key heads."""
        each = self.q.shape[1] // self.k.shape[1]
        return slice(heads.start * each, heads.stop * each)

    def rows(self, start: int, stop: int, real: Bool[Tensor, "batch row"] | None = None) -> ScoredRows:
        """Give some rows; nothing is computed before it is asked for."""
        return ScoredRows(self, start, stop, real)

    def cuts(self) -> Iterator[tuple[int, int]]:
        """Cut into blocks of about `BYTES`, and at most `ROWS` rows: fewer, where rows are long; larger ones on a GPU."""
        size, most = (GPU_BYTES, GPU_ROWS) if self.q.is_cuda else (BYTES, ROWS)
        area = size / (4 * self.q.shape[0] * self.q.shape[1])
        start = 0
        while start < self.n:
            before = min(start, self.window or start)
            # rows x keys = area, where the keys of a causal block are those before it and its own
            rows = (math.sqrt(before**2 + 4 * area) - before) / 2 if self.causal else area / self.k.shape[2]
            stop = min(start + min(max(FEWEST, int(rows)), most), self.n)
            yield start, stop
            start = stop

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look at the log-sum-exps: a bad score makes its row's bad."""
        return bool(torch.isfinite(self.lse.transpose(1, 2).where(real[..., None], 0)).all())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows `start` to `stop` of :class:`Scores`; of `real`, all rows of the pass, those are summed over; None for all."""

    of: Scores
    start: int
    stop: int
    real: Bool[Tensor, "batch row"] | None = None

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give the attention to one key per sequence: one thin matrix product, whatever the number of rows."""
        of = self.of
        texts = torch.arange(len(keys), device=keys.device)
        key = of.k[texts, :, keys][:, :, None]
        logs = scores_of(of.q[:, :, self.start : self.stop], key, of.scale, of.softcap)[..., 0]
        if of.bias is not None:
            logs = logs + of.bias.expand(len(keys), -1, -1, -1)[texts, :, self.start : self.stop, keys]
        seen = self._seen(keys[:, None])[:, None]
        shares = (logs - of.lse[:, :, self.start : self.stop]).clamp(max=0).exp()  # rounding must not give more than all
        return torch.where(seen, shares, 0)

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give 1, less what the learned sink takes: exp(sink - lse)."""
        lse = self.of.lse[:, :, self.start : self.stop]
        if self.of.sinks is None:
            return torch.ones_like(lse)
        return 1 - (self.of.sinks.to(lse.dtype)[:, None] - lse).exp()

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Give the whole rows, keys up to the last row; a window's other keys are zeros."""
        band, reach = self._whole, self._reach
        beyond = 0 if self.of.causal else self.of.k.shape[2] - reach.stop
        return torch.nn.functional.pad(band, (reach.start, beyond)) if reach.start or beyond else band

    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Give the entropy of each row, -sum A log A: the logarithms are at hand."""
        return self._sums[0]

    def columns(self) -> Float[Tensor, "batch head key"]:
        """Give what each key gets from the real rows."""
        return self._sums[1]

    @property
    def _reach(self) -> slice:
        of = self.of
        first = 0 if of.window is None else max(0, self.start - of.window + 1)
        last = of.k.shape[2] if of.window is None else min(of.k.shape[2], self.stop + of.window - 1)
        return slice(first, self.stop if of.causal else last)

    def _seen(self, keys: Int[Tensor, "*batch key"]) -> Bool[Tensor, "*batch query"]:
        """Tell which rows see a key."""
        queries = torch.arange(self.start, self.stop, device=self.of.q.device)
        gap = queries - keys
        seen = gap >= 0 if self.of.causal else torch.ones_like(gap, dtype=torch.bool)
        return seen if self.of.window is None else seen & (gap.abs() < self.of.window)

    @cached_property
    def _whole(self) -> Float[Tensor, "batch head query key"]:
        """The keys in reach."""
        return self._tile(slice(None), slice(0, self.of.k.shape[1]), self._reach, Scratch())[1]

    @cached_property
    def _sums(self) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head key"]]:
        """Entropies and columns, from tiles that stay in a processor's cache: whole rows never exist."""
        of, n = self.of, self.stop - self.start
        entropy = of.lse.new_zeros(*of.q.shape[:2], n)
        columns = of.lse.new_zeros(*of.q.shape[:2], self.stop if of.causal else of.k.shape[2])
        real = entropy.new_ones(len(of.q), n) if self.real is None else self.real[:, self.start : self.stop].to(entropy.dtype)
        for batch, heads, keys in self._tiles():
            logs, band = self._tile(batch, heads, keys, of.scratch[1])
            at = batch, of.queries_of(heads)
            entropy[at] -= torch.linalg.vecdot(logs, band)  # no product is written
            columns[*at, keys] += (real[batch, None, None] @ band)[:, :, 0]
        return entropy, columns

    def _tiles(self) -> Iterator[tuple[slice, slice, slice]]:
        """Cut texts, key heads and keys in reach."""
        of, reach = self.of, self._reach
        size, most = (TILE, KEYS) if of.exact else (GPU_BYTES, reach.stop)
        kv, width = of.k.shape[1], min(reach.stop - reach.start, most)
        blocks = max(1, size // (4 * (of.q.shape[1] // kv) * (self.stop - self.start) * width))
        texts, heads = max(1, blocks // kv), min(blocks, kv)
        for text in range(0, len(of.q), texts):
            for head in range(0, kv, heads):
                for key in range(reach.start, reach.stop, width):
                    yield (
                        slice(text, text + texts),
                        slice(head, min(head + heads, kv)),
                        slice(key, min(key + width, reach.stop)),
                    )

    def _hide(self, logs: Tensor, keys: slice, some: slice) -> None:
        """Hide some of the keys from the rows that don't see them."""
        seen = self._seen(torch.arange(some.start, some.stop, device=logs.device)[:, None])
        logs[..., some.start - keys.start : some.stop - keys.start].masked_fill_(~seen.mT, NEVER)

    def _tile(self, batch: slice, heads: slice, keys: slice, memory: Scratch) -> tuple[Tensor, Tensor]:
        """Give logarithms and weights of some key heads' queries; the next tile takes the logarithms' memory over."""
        of, rows, own = self.of, slice(self.start, self.stop), self.of.queries_of(heads)
        logs = scores_of(of.q[batch, own, rows], of.k[batch, heads, keys], of.scale, of.softcap, of.scratch[0])
        if of.bias is not None:
            logs.add_(of.bias.expand(len(of.q), -1, -1, -1)[batch, own, rows, keys])
        logs.sub_(of.lse[batch, own, rows, None])
        if of.causal and keys.stop > self.start:  # all keys before the block are seen
            self._hide(logs, keys, slice(max(keys.start, self.start), keys.stop))
        if of.window is not None and not of.causal:
            self._hide(logs, keys, keys)
        elif of.window is not None and keys.start < self.stop - of.window:  # of the oldest keys, each row sees one less
            self._hide(logs, keys, slice(keys.start, min(keys.stop, self.stop - of.window)))
        if of.key_mask is not None:
            logs.masked_fill_(~of.key_mask[batch, None, None, keys], NEVER)
        band = torch.exp(logs, out=memory(logs, *logs.shape))
        if not of.exact:
            total = band @ band.new_ones(band.shape[-1])
            factor = (self.row_sum()[batch, own] / total)[..., None]
            factor = torch.where((factor - 1).abs() < ROUNDING, factor, 1.0)  # for the proof to see what is wrong
            band.mul_(factor)
            logs.add_(factor.log())
        return logs, band
