"""Where an engine's attention rows come from: a layer's stored pattern, or its queries, keys and log-sum-exps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.block import PatternRows, Rows, sum_of
from sinkscope.capture.op import scores_of

#: Rows that a metric sees at a time, at most: bounds its temporaries, whatever the length.
ROWS = 256
#: Bytes of the rows that are recomputed at a time, where that is fewer, and the fewest rows.
BYTES, FEWEST = 16 << 20, 16
#: The same on a GPU, where every block costs a dozen launches: a quarter of the time (H200, 4,096 tokens).
GPU_ROWS, GPU_BYTES = 512, 256 << 20
#: The same of rows that are stored, and only looked at.
STORED = 8 << 20
#: By how much a log-sum-exp may be off and be mended: below what the proof of the engine calls wrong.
ROUNDING = 1e-3
#: The least score: exp gives 0, and 0 times it is 0, which infinity's would not be.
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

    def rows(self, start: int, stop: int) -> Rows:
        """Give some of them, counted from the first of this pass."""
        ...

    def cuts(self, formed: bool = True) -> Iterator[tuple[int, int]]:
        """Cut the rows for metrics that look at whole ones, or (not `formed`) at no more than their sums."""
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

    def rows(self, start: int, stop: int) -> PatternRows:
        """Give some rows, and the keys up to the last of them."""
        return PatternRows(self.values[:, :, start:stop, : self.start + stop if self.causal else None])

    def cuts(self, formed: bool = True) -> Iterator[tuple[int, int]]:
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
    bias: Float[Tensor, "#batch #head position key"] | None = None
    scratch: Scratch = field(default_factory=lambda: Scratch())

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

    @cached_property
    def kernels(self) -> ModuleType | None:
        """Give what adds rows up without forming them, where there is such a thing."""
        plain = self.bias is None and self.softcap is None and not self.q.requires_grad
        fits = self.q.dtype == self.k.dtype != torch.float64 and self.q.shape[3] <= 256
        if not (self.q.is_cuda and plain and fits and find_spec("triton")):
            return None
        from sinkscope.capture import kernels

        return kernels if kernels.usable(self.q.device, self.q.dtype) else None

    def rows(self, start: int, stop: int) -> ScoredRows:
        """Give some rows; nothing is computed before it is asked for."""
        return ScoredRows(self, start, stop)

    def cuts(self, formed: bool = True) -> Iterator[tuple[int, int]]:
        """Cut into blocks of about `BYTES`, and at most `ROWS` rows: fewer, where rows are long; larger ones on a GPU.

        Where they need not be formed, and a kernel adds them up, they are not cut.
        """
        if not formed and self.kernels is not None:
            yield 0, self.n
            return
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
    """Rows `start` to `stop` of :class:`Scores`."""

    of: Scores
    start: int
    stop: int

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
        band, reach = self._whole[0], self._reach
        beyond = 0 if self.of.causal else self.of.k.shape[2] - reach.stop
        return torch.nn.functional.pad(band, (reach.start, beyond)) if reach.start or beyond else band

    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Give the entropy of each row, -sum A log A: the logarithms were at hand."""
        if self._sums is None:
            return self._whole[1]
        total, product = self._sums
        factor = self._mend(total)
        return -factor * (product + factor.log() * total)

    def received(self, chosen: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
        """Give what each key receives from the chosen rows together."""
        if self._sums is None or self.of.kernels is None:
            return sum_of(self.pattern(), chosen)
        shift = self.of.lse - self._mend(self._sums[0]).log()
        return self._add_up("queries", torch.where(chosen[:, None], shift, torch.inf))[0]

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

    def _hide(self, band: Tensor, keys: slice) -> None:
        """Hide some keys from the rows that don't see them."""
        seen = self._seen(torch.arange(keys.start, keys.stop, device=band.device)[:, None])
        first = self._reach.start
        band[..., keys.start - first : keys.stop - first].masked_fill_(~seen.mT, 0)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor] | None:
        """The sums of A and of A log A over each row, where all rows are there and a kernel adds them up."""
        if self.of.kernels is None or (self.start, self.stop) != (0, self.of.n):
            return None
        return self._add_up("keys", self.of.lse)

    def _add_up(self, over: str, shift: Tensor) -> tuple[Tensor, Tensor]:
        of = self.of
        given = {"scale": of.scale, "causal": of.causal, "window": of.window, "key_mask": of.key_mask}
        return of.kernels.add_up(of.q, of.k, shift, over=over, **given)  # type: ignore[union-attr, no-any-return]

    def _mend(self, total: Float[Tensor, "batch head query"]) -> Float[Tensor, "batch head query"]:
        """Give what rows are to be multiplied by: their sum is known, and rounding, no more, is mended."""
        factor = self.row_sum() / total
        return torch.where((factor - 1).abs() < ROUNDING, factor, 1.0)  # for the proof to see what is wrong

    @cached_property
    def _whole(self) -> tuple[Float[Tensor, "batch head query key"], Float[Tensor, "batch head query"]]:
        """The keys in reach, and the entropy: its logarithms live in memory that the next block takes over."""
        of, reach, rows = self.of, self._reach, slice(self.start, self.stop)
        logs = scores_of(of.q[:, :, rows], of.k[:, :, reach], of.scale, of.softcap, of.scratch)
        if of.bias is not None:
            logs.add_(of.bias[:, :, rows, reach]).clamp_(min=NEVER)
        logs.sub_(of.lse[:, :, rows, None])
        band = logs.exp()  # before keys are hidden: exp of what it gives as 0 is many times as slow
        if of.causal:  # all keys before the block are seen
            self._hide(band, slice(self.start, self.stop))
        if of.window is not None and not of.causal:
            self._hide(band, reach)
        elif of.window is not None and reach.start < self.stop - of.window:  # of the oldest keys, each row sees one less
            self._hide(band, slice(reach.start, self.stop - of.window))
        if of.key_mask is not None:
            band.masked_fill_(~of.key_mask[:, None, None, reach], 0)
        if not of.exact:
            factor = self._mend(band @ band.new_ones(band.shape[-1]))[..., None]
            band.mul_(factor)
            logs.add_(factor.log())
        return band, -torch.linalg.vecdot(logs, band)
