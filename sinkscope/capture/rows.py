"""Attention rows that are recomputed from a layer's queries, keys and log-sum-exps, as few of them as are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.block import sum_of
from sinkscope.capture.cuts import BYTES, GPU_BYTES, GPU_ROWS, ROWS, SQUARE, TILE, Scratch, cuts
from sinkscope.capture.op import attention_with_lse, scores_of

#: By how much a log-sum-exp may be off and be mended: below what the proof of the engine calls wrong.
ROUNDING = 1e-3
#: The least score: exp gives 0, and 0 times it is 0, which infinity's would not be.
NEVER = -1e30


@dataclass(frozen=True, eq=False)
class Scores:
    """Rows that are recomputed when asked for: `A[i, k] = exp(score(q_i, k_k) - lse_i)`, exactly.

    Attributes are those of :func:`sinkscope.capture.op.attention_with_lse`, the `lse` that it gave, and memory that all
    layers may share, for scores and for rows that nobody keeps; `folded` says that q.k is score - lse as it is, see `pieces`.
    """

    q: Float[Tensor, "*batch_head position d_head"]
    k: Float[Tensor, "*batch_kv_head key d_head"]
    lse: Float[Tensor, "batch head position"]
    scale: float
    causal: bool
    window: int | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " head"] | None = None
    key_mask: Bool[Tensor, "batch key"] | None = None
    bias: Float[Tensor, "#batch head position key"] | None = None
    entries: tuple[Tensor, Tensor, Tensor] | None = None
    scratch: Scratch = field(default_factory=Scratch)
    spare: Scratch = field(default_factory=Scratch)
    folded: bool = False

    @property
    def n(self) -> int:
        """Give the number of rows."""
        return self.q.shape[-2]

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
        """Cut into blocks; where rows need not be formed, and can be added up otherwise, they are not cut."""
        if not formed and (self.kernels is not None or self.tiled):
            return iter([(0, self.n)])
        size, most = (GPU_BYTES, GPU_ROWS) if self.q.is_cuda else (BYTES, ROWS)
        area = size / (4 * self.q.shape[0] * self.q.shape[1])
        return cuts(self.n, area, None if self.causal else self.k.shape[2], self.window, most=most)

    @property
    def tiled(self) -> bool:
        """Tell whether all rows together are too many for a processor's cache, so that their sums are made tile by tile."""
        return not self.q.is_cuda and 4 * self.lse.numel() * self.k.shape[2] > TILE

    def pieces(self) -> Iterator[tuple[tuple[slice, slice] | tuple[int, int], Scores]]:
        """Give texts and heads apart, as many together as stay in a processor's cache, each with its place among all.

        Nothing but :meth:`tiles`, :meth:`logs` and :meth:`hide` should be asked of one: its queries and keys may be `folded`,
        and a head alone, where its keys are all that there is to it, has matrices of them: half the work of calling.
        """
        b, h = self.q.shape[:2]
        each = 4 * h * self.n * self.k.shape[2]
        texts, heads = (TILE // each, h) if each <= TILE else (1, 1)
        whole = self
        if self.softcap is None:  # what is taken off every row is one more column, which spares a pass over scores
            q, k = self.q.to(self.lse.dtype) * self.scale, self.k.to(self.lse.dtype)
            q, k = torch.cat([q, -self.lse[..., None]], -1), torch.cat([k, torch.ones_like(k[..., :1])], -1)
            whole = replace(self, q=q, k=k, scale=1.0, folded=True)
        for text, head in product(range(0, b, texts), range(0, h, heads)):
            at, group = (slice(text, text + texts), slice(head, head + heads)), head * self.k.shape[1] // h
            if (texts, heads) == (1, 1) and whole.folded and self.key_mask is None and self.bias is None:
                yield (text, head), replace(whole, q=whole.q[text, head], k=whole.k[text, group], sinks=None)
                continue
            piece = replace(
                whole,
                q=whole.q[at],
                k=whole.k[at[0], slice(group, group + 1) if heads == 1 else slice(None)],
                lse=self.lse[at],
                sinks=None,
                key_mask=None if self.key_mask is None else self.key_mask[at[0]],
                bias=None if self.bias is None else self.bias[at[0] if len(self.bias) == b else slice(None), at[1]],
            )
            yield at, piece

    def reach(self, rows: slice) -> slice:
        """Give the keys that some rows may see."""
        n_keys, window = self.k.shape[-2], self.window
        first = 0 if window is None else max(0, rows.start - window + 1)
        last = n_keys if window is None else min(n_keys, rows.stop + window - 1)
        return slice(first, rows.stop if self.causal else last)

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Cut into rows and keys, so few that they stay in the cores' own caches; each row with the keys that it may see."""
        high, wide = SQUARE[0] * torch.get_num_threads(), SQUARE[1]
        for start in range(0, self.n, high):
            stop = min(start + high, self.n)
            reach = self.reach(slice(start, stop))
            for first in range(reach.start, reach.stop, wide):
                keys = slice(first, min(first + wide, reach.stop))
                last = stop if self.window is None else min(stop, keys.stop - 1 + self.window)
                yield slice(max(start, first) if self.causal else start, last), keys

    def logs(self, rows: slice, keys: slice) -> Float[Tensor, "*batch_head query key"]:
        """Give the logarithms of some rows, in memory that the next take over."""
        q, k = self.q[..., rows, :], self.k[..., keys, :]
        if q.ndim == 2:
            return torch.mm(q, k.mT, out=self.scratch(q, len(q), len(k)))
        if self.folded:
            b, h, n, _ = q.shape
            q = q.reshape(b, k.shape[1], -1, q.shape[3])
            out = self.scratch(q, *q.shape[:3], k.shape[2])
            logs = torch.matmul(q, k.mT, out=out).view(b, h, n, -1)
        else:
            logs = scores_of(q, k, self.scale, self.softcap, self.scratch).sub_(self.lse[:, :, rows, None])
        return logs if self.bias is None else logs.add_(self.bias[:, :, rows, keys]).clamp_(min=NEVER)

    def hide(self, band: Float[Tensor, "*batch_head query key"], rows: slice, keys: slice) -> None:
        """Take out of some rows those of the keys that they don't see."""
        if self.causal and rows.start < keys.stop:  # all keys before the block are seen
            band[..., rows.start - keys.start :].tril_()
        if self.window is not None:
            oldest = min(keys.stop, rows.stop - self.window) if self.causal else keys.stop  # of which each row sees one less
            if keys.start < oldest:
                seen = self.seen(rows, torch.arange(keys.start, oldest, device=band.device)[:, None])
                band[..., : oldest - keys.start].masked_fill_(~seen.mT, 0)
        if self.key_mask is not None:
            band.masked_fill_(~self.key_mask[:, None, None, keys], 0)

    def seen(self, rows: slice, keys: Int[Tensor, "*batch key"]) -> Bool[Tensor, "*batch query"]:
        """Tell which rows see a key."""
        gap = torch.arange(rows.start, rows.stop, device=self.q.device) - keys
        seen = gap >= 0 if self.causal else torch.ones_like(gap, dtype=torch.bool)
        return seen if self.window is None else seen & (gap.abs() < self.window)

    def finite(self, real: Bool[Tensor, "batch row"]) -> bool:
        """Look at the log-sum-exps: a bad score makes its row's bad."""
        return bool(torch.isfinite(self.lse.transpose(1, 2).where(real[..., None], 0)).all())


@dataclass(frozen=True, eq=False)
class ScoredRows:
    """Rows `start` to `stop` of :class:`Scores`; entropies that were made with other sums are kept."""

    of: Scores
    start: int
    stop: int
    _entropies: list[Tensor] = field(default_factory=list, repr=False)

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give the attention to one key per sequence: one thin matrix product, whatever the number of rows."""
        of = self.of
        texts = torch.arange(len(keys), device=keys.device)
        key = of.k[texts, :, keys][:, :, None]
        logs = scores_of(of.q[:, :, self.start : self.stop], key, of.scale, of.softcap)[..., 0]
        if of.bias is not None:
            logs = logs + of.bias.expand(len(keys), -1, -1, -1)[texts, :, self.start : self.stop, keys]
        seen = of.seen(slice(self.start, self.stop), keys[:, None])[:, None]
        shares = (logs - of.lse[:, :, self.start : self.stop]).clamp(max=0).exp()  # rounding must not give more than all
        return torch.where(seen, shares, 0)

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give 1, less what the learned sink takes, exp(sink - lse), and what keys take that are no tokens."""
        rows, sums = slice(self.start, self.stop), torch.ones_like(self.of.lse[:, :, self.start : self.stop])
        lse = self.of.lse[:, :, rows]
        if self.of.sinks is not None:
            sums = sums - (self.of.sinks.to(lse.dtype)[:, None] - lse).exp()
        if self.of.entries is not None:
            k, v, hidden = self.of.entries
            other = attention_with_lse(
                self.of.q[:, :, rows], k, v, scale=self.of.scale, causal=False, bias=hidden[:, :, rows]
            )
            sums = sums - (other[1] - lse).exp()
        return sums

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Give the whole rows, keys up to the last row; a window's other keys are zeros."""
        band, reach = self._whole[0], self.of.reach(slice(self.start, self.stop))
        beyond = 0 if self.of.causal else self.of.k.shape[2] - reach.stop
        return torch.nn.functional.pad(band, (reach.start, beyond)) if reach.start or beyond else band

    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Give the entropy of each row, -sum A log A: the logarithms were at hand."""
        if self._sums is None:
            if not self._in_tiles:
                return self._whole[1]
            if not self._entropies:
                self._add_tiles(None)
            return self._entropies[0]
        total, product = self._sums
        factor = self._mend(total)
        return -factor * (product + factor.log() * total)

    def received(self, chosen: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
        """Give what each key receives from the chosen rows together."""
        if self._sums is None:
            return self._add_tiles(chosen) if self._in_tiles else sum_of(self.pattern(), chosen)
        shift = self.of.lse - self._mend(self._sums[0]).log()
        return self._add_up("queries", torch.where(chosen[:, None], shift, torch.inf))[0]

    @property
    def _in_tiles(self) -> bool:
        """Tell whether sums are made tile by tile: of all rows, which were not formed."""
        return (self.start, self.stop) == (0, self.of.n) and self.of.tiled and "_whole" not in vars(self)

    def _add_tiles(self, chosen: Bool[Tensor, "batch query"] | None) -> Tensor:
        """Add up what keys receive from the chosen rows, and keep the entropies, which cost next to nothing then."""
        of = self.of
        entropy, received = torch.zeros_like(of.lse), of.lse.new_zeros(*of.lse.shape[:2], of.k.shape[2])
        ones, every = of.lse.new_ones(max(of.n, of.k.shape[2])), chosen is not None and bool(chosen.all())
        for at, piece in of.pieces():
            entropies, sums = entropy[at], received[at]
            for rows, keys in piece.tiles():
                logs = piece.logs(rows, keys)
                band = torch.exp(logs, out=of.spare(logs, *logs.shape))
                piece.hide(band, rows, keys)
                entropies[..., rows].add_(logs.mul_(band) @ ones[: logs.shape[-1]])
                if every:
                    sums[..., keys].add_(ones[: logs.shape[-2]] @ band)
                elif chosen is not None:
                    sums[..., keys].add_(sum_of(band, chosen[at[0], rows]))
        self._entropies[:] = [entropy.neg_()]
        return received

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
        of, rows = self.of, slice(self.start, self.stop)
        logs = of.logs(rows, reach := of.reach(rows))
        band = torch.exp(logs)  # before keys are hidden: exp of what it gives as 0 is many times as slow
        of.hide(band, rows, reach)
        if not of.exact:
            factor = self._mend(band @ band.new_ones(band.shape[-1]))[..., None]
            band.mul_(factor)
            logs.add_(factor.log())
        return band, -(logs.mul_(band) @ band.new_ones(band.shape[-1]))  # faster than a vecdot
