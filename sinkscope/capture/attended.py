"""Attended: attention rows from what an attention function was given, or as somebody shows them.

The mask is the one that the function was given, so that pads, windows and caches of any kind are in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkscope.capture.cuts import BYTES, cuts
from sinkscope.capture.op import attention_with_lse, scores_of
from sinkscope.errors import SinkscopeError


@runtime_checkable
class Rows(Protocol):
    """Some query rows of a layer, by column: consecutive queries, and the keys from column `first_key` on."""

    first_key: int

    def weights(self) -> Float[Tensor, "batch head query key"]:
        """Give the whole rows."""
        ...

    def mass(self, columns: list[list[int]]) -> Float[Tensor, "batch head query looked"]:
        """Give the attention to some columns, `[looked][batch]`; 0 where a column is not held."""
        ...

    def row_sum(self) -> Float[Tensor, "batch head query"] | None:
        """Give the sums; None where they are 1."""
        ...


@dataclass
class Pattern:
    """Rows as they are; `sums` are theirs where they are known, and `ones` says that they are 1."""

    values: Float[Tensor, "batch head query key"]
    first_key: int = 0
    sums: Tensor | None = None
    ones: bool = False

    def weights(self) -> Tensor:
        """Give the rows, at least float32."""
        return self.values.to(torch.promote_types(self.values.dtype, torch.float32))

    def mass(self, columns: list[list[int]]) -> Tensor:
        """Pick columns."""
        held = self.values.shape[-1]
        if all(len(set(one)) == 1 for one in columns):  # the same column in every row of the batch
            at = [one[0] - self.first_key for one in columns]
            parts = [self.values[..., i] if 0 <= i < held else torch.zeros_like(self.values[..., 0]) for i in at]
            picked = torch.stack(parts, -1)
        else:
            index = torch.tensor(columns, device=self.values.device).T - self.first_key
            there, index = (index >= 0) & (index < held), index.clamp(0, held - 1)
            wide = index[:, None, None, :].expand(*self.values.shape[:3], -1)
            picked = torch.where(there[:, None, None, :], self.values.gather(-1, wide), 0)
        return picked.to(torch.promote_types(picked.dtype, torch.float32))

    def row_sum(self) -> Tensor | None:
        """Sum in float32, unless that is known."""
        if self.ones:
            return None
        wide = torch.promote_types(self.values.dtype, torch.float32)
        return self.values.sum(-1, dtype=wide) if self.sums is None else self.sums


@dataclass
class Fused:
    """All rows of a causal layer without a mask, whose log-sum-exps a fused kernel gives: no pattern is formed."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    first_key: int = 0

    def weights(self) -> Tensor:
        """Refuse: who needs whole rows is given others."""
        raise NotImplementedError

    def mass(self, columns: list[list[int]]) -> Tensor:
        """Give exp(score - lse) of a few keys."""
        lse = attention_with_lse(self.q, self.k, self.v, scale=self.scale, causal=True)[1]
        queries, parts = torch.arange(self.q.shape[2], device=self.q.device), []
        for column in (one[0] for one in columns):  # without a mask there are no pads: the same in every row of the batch
            if not 0 <= column < self.k.shape[2]:
                parts.append(torch.zeros_like(lse))
                continue
            shares = (scores_of(self.q, self.k[:, :, column : column + 1], self.scale)[..., 0] - lse).clamp(max=0).exp()
            parts.append(shares.where(queries >= column, 0))
        return torch.stack(parts, -1)

    def row_sum(self) -> None:
        """Every row sums to 1."""
        return


@dataclass
class Attended:
    """What a layer's attention function was given; rows are computed from it as they are asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    mask: Tensor | None
    causal: bool
    softcap: float | None
    sinks: Tensor | None
    first_key: int

    @classmethod
    def of(cls, name: str, module: nn.Module, given: tuple[Any, ...], more: dict[str, Any], total: int) -> Attended:
        """Read a call, as the attention function of this name does.

        Raises:
            SinkscopeError: it is given what is not known here.
        """
        query, key, value = (x.detach() for x in given[:3])
        mask = given[3] if len(given) > 3 else more.get("attention_mask")
        if not isinstance(mask, Tensor | None) or (mask is not None and mask.ndim != 4):
            raise SinkscopeError(f"{name!r} attention has a mask of its own: model.set_attn_implementation('sdpa')")
        causal = more.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        scale, held = more.get("scaling"), key.shape[2]
        return cls(
            query,
            key.to(query.dtype),
            value.to(query.dtype),
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            mask,
            mask is None and bool(causal) and name != "eager" and query.shape[2] > 1,
            more.get("softcap"),
            None if more.get("s_aux") is None else more["s_aux"].detach(),
            max(0, total - held),
        )

    def rows(self, whole: bool) -> Iterator[tuple[int, int, Rows]]:
        """Cut into pieces of a few rows, unless the masses alone are needed and a kernel can give them."""
        b, h, n, _ = self.q.shape
        if not whole and self.causal and self.softcap is None and self.sinks is None and n == self.k.shape[2]:
            yield 0, n, Fused(self.q, self.k, self.v, self.scale)
            return
        if not whole and n == 1 and self.mask is None and self.softcap is None and self.sinks is None:
            yield 0, n, Later(self, self.first_key)
            return
        for start, stop in cuts(n, BYTES / (4 * b * h), self.k.shape[2]):
            yield start, stop - start, self.pattern(start, stop)

    def pattern(self, start: int, stop: int) -> Pattern:
        """Compute some rows."""
        held = self.k.shape[2]
        scores = scores_of(self.q[:, :, start:stop], self.k, self.scale, self.softcap)
        if self.mask is not None:
            rows = self.mask if self.mask.shape[2] == 1 else self.mask[:, :, start:stop]
            rows = rows[..., :held]
            scores = scores.masked_fill_(~rows, float("-inf")) if rows.dtype == torch.bool else scores.add_(rows)
        elif self.causal:
            queries = torch.arange(start, stop, device=scores.device)[:, None]
            scores.masked_fill_(queries < torch.arange(held, device=scores.device), float("-inf"))
        if self.sinks is None:
            return Pattern(scores.softmax(-1), self.first_key, ones=True)
        sinks = self.sinks.to(scores.dtype)[:, None, None]
        lse = torch.logaddexp(scores.logsumexp(-1, keepdim=True), sinks)
        return Pattern(scores.sub_(lse).exp_(), self.first_key, 1 - (sinks - lse).exp()[..., 0])

    @property
    def kind(self) -> tuple[Any, ...]:
        """What calls must have in common to be computed together."""
        return self.q.shape, self.k.shape, self.q.dtype, self.k.dtype, self.q.device, self.scale, self.first_key

    def misses(self, output: Tensor) -> float:
        """Tell by how much the last row of an output, `[batch, position, head, d]`, is another: relative to its largest."""
        n, (b, h, _, _) = self.q.shape[2], self.q.shape
        weights = self.pattern(n - 1, n).weights().reshape(b, self.k.shape[1], -1, self.k.shape[2])
        ours = (weights @ self.v.to(weights.dtype)).reshape(b, h, -1).nan_to_num()
        theirs = output[:, -1].to(ours.dtype).nan_to_num()
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


@dataclass
class Later:
    """The one query of a step of generation: cheaper at the end of the pass, together with other layers' (:func:`masses`)."""

    of: Attended
    first_key: int

    def weights(self) -> Tensor:
        """Give the row now."""
        return self.of.pattern(0, 1).weights()

    def mass(self, columns: list[list[int]]) -> Tensor:
        """Give the attention to some columns now."""
        return self.of.pattern(0, 1).mass(columns)

    def row_sum(self) -> None:
        """Every row sums to 1."""
        return


def masses(
    calls: Mapping[int, Attended], columns: list[list[int]]
) -> Iterator[tuple[int, Float[Tensor, "batch head query looked"]]]:
    """Give the attention to some columns, layer by layer, with one product for as many alike layers as `BYTES` hold."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for layer, call in calls.items():
        kinds.setdefault(call.kind, []).append(layer)
    for alike in kinds.values():
        first = calls[alike[0]]
        n = max(1, BYTES // max(1, first.k.numel() * first.k.element_size()))
        for layers in (alike[start : start + n] for start in range(0, len(alike), n)):
            q, k = (torch.cat([getattr(calls[layer], name) for layer in layers]) for name in ("q", "k"))
            pattern = Pattern(scores_of(q, k, first.scale).softmax(-1), first.first_key, ones=True)
            yield from zip(layers, pattern.mass([one * len(layers) for one in columns]).chunk(len(layers)), strict=True)
