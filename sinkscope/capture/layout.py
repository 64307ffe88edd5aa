"""Layout: where the tokens of one forward pass stand in their texts: behind a cache, behind pads on either side.

A model counts columns: of a batch with pads and of a KV cache. Everything else in this library counts positions in a text,
pads left out. The mask that the model was given leads from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError


@dataclass(frozen=True, eq=False)
class Layout:
    """The columns of one forward pass, or of a part of one.

    Attributes:
        batch: rows.
        cached: columns before the first, which a KV cache holds.
        n: columns of this pass, one query each.
        ids: the token ids, or None where the model was given embeddings.
        real: which columns are tokens, `[batch, cached + n]`; None where all are.
    """

    batch: int
    cached: int
    n: int
    ids: Int[Tensor, "batch n"] | None
    real: Bool[Tensor, "batch total"] | None

    @classmethod
    def of(cls, given: Mapping[str, Any], cached: int, before: Bool[Tensor, "batch cached"] | None = None) -> Layout:
        """Read the keywords of a forward pass.

        Args:
            given: the keywords.
            cached: columns in its cache.
            before: which of these are tokens, as far as that is known; None where all are.

        Raises:
            SinkscopeError: what it is given does not say where each token stands.
        """
        ids = given.get("input_ids")
        batch, n = size(given)
        real = _real(given.get("attention_mask"), cached, n, before)
        real = None if real is None or bool(real.all()) else real.expand(batch, -1)
        _check_positions(given.get("position_ids"), None if real is None else real[:, cached:])
        return cls(batch, cached, n, None if ids is None else ids.detach(), real)

    @property
    def total(self) -> int:
        """Count the columns up to the last of this pass."""
        return self.cached + self.n

    @cached_property
    def starts(self) -> list[int]:
        """Give the position of each row's first token in this pass."""
        return [self.cached] * self.batch if self.real is None else self.real[:, : self.cached].sum(1).tolist()

    @cached_property
    def counts(self) -> list[int]:
        """Count each row's tokens in this pass."""
        return [self.n] * self.batch if self.real is None else self.real[:, self.cached :].sum(1).tolist()

    @cached_property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Count each row's tokens up to the end of this pass."""
        return torch.tensor([start + count for start, count in zip(self.starts, self.counts, strict=True)])

    @cached_property
    def columns(self) -> Int[Tensor, "batch total"] | None:
        """Give the column of each position, those of pads after the last; None where they are the same."""
        return None if self.real is None else _first(self.real)

    @cached_property
    def order(self) -> Int[Tensor, "batch n"] | None:
        """Give this pass's columns in the order of positions, those of pads after the last."""
        return None if self.real is None else _first(self.real[:, self.cached :])

    def part(self, start: int, stop: int) -> Layout:
        """Take some of the columns."""
        if (start, stop) == (0, self.n):
            return self
        ids = None if self.ids is None else self.ids[:, start:stop]
        real = None if self.real is None else self.real[:, : self.cached + stop]
        return Layout(self.batch, self.cached + start, stop - start, ids, real)

    def column_of(self, key: int) -> list[int]:
        """Give the column in which each row has the token of a position; -1 where it has none yet."""
        if self.columns is None:
            return [key if key < self.total else -1] * self.batch
        if key >= self.total:
            return [-1] * self.batch
        known = zip(self.columns[:, key].tolist(), self.lengths.tolist(), strict=True)
        return [column if key < length else -1 for column, length in known]

    def queries(self, rows: Tensor) -> Tensor:
        """Put what was found for each column, `[batch, head, n, ...]`, into the order of positions."""
        if self.order is None:
            return rows
        index = self.order.to(rows.device).view(self.batch, 1, self.n, *[1] * (rows.ndim - 3))
        return rows.gather(2, index.expand(-1, rows.shape[1], -1, *rows.shape[3:]))

    def keys(self, rows: Tensor, first: int, n_keys: int) -> Tensor:
        """Give whole rows by position, `[..., n_keys]`: `first` is the column of the first key that they hold."""
        held = rows.shape[-1]
        if self.columns is None:
            whole = torch.nn.functional.pad(rows, (first, max(0, n_keys - first - held)))
            return whole[..., :n_keys]
        at = torch.nn.functional.pad(self.columns, (0, max(0, n_keys - self.total)), value=-1)[:, :n_keys].to(rows.device)
        there = (at >= first) & (at < first + held) & (torch.arange(n_keys) < self.lengths[:, None]).to(rows.device)
        index = (at - first).clamp(0, held - 1)[:, None, None, :].expand(*rows.shape[:3], -1)
        return torch.where(there[:, None, None, :], rows.gather(-1, index), 0)


def size(given: Mapping[str, Any]) -> tuple[int, int]:
    """Read how many rows and columns a forward pass has.

    Raises:
        SinkscopeError: it is given nothing that has any.
    """
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        raise SinkscopeError("it was given neither input_ids nor inputs_embeds in rows")
    return tokens.shape[0], tokens.shape[1]


def _first(real: Tensor) -> Tensor:
    """Give the columns of tokens, then those of pads."""
    return (~real).to(torch.uint8).argsort(dim=1, stable=True)


def _real(mask: Any, cached: int, n: int, before: Tensor | None) -> Tensor | None:
    """Read which columns are tokens off the mask that a model was given, in any of the forms that it takes.

    Raises:
        SinkscopeError: another form.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer
        mask = next(iter(mask.values()), None)
    total = cached + n
    if mask is None and before is None:
        return None
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= total:
        return mask[:, :total].bool()
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-1] >= n:  # a token is seen by itself, at least
        seen = (mask if mask.dtype == torch.bool else mask >= 0)[:, 0].any(1)
        first = max(0, total - seen.shape[1])
        new = seen[:, cached - first : total - first]
    elif mask is None and before is not None:
        new = before.new_ones(len(before), n)
    else:
        raise SinkscopeError("its attention_mask does not tell which columns are tokens")
    old = new.new_ones(len(new), cached) if before is None else before.to(new.device)
    return torch.cat([old, new], 1)


def _check_positions(positions: Any, real: Tensor | None) -> None:
    """Refuse rows in which positions begin anew: packed texts, which do not see each other.

    Raises:
        SinkscopeError: names what it was given.
    """
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] < 2:
        return
    anew = positions.diff(dim=1) <= 0
    if real is not None:
        anew = anew & (real[:, 1:] & real[:, :-1]).to(anew.device)
    if bool(anew.any()):
        raise SinkscopeError("its position_ids begin anew within a row (packed texts?): give each text a row of its own")
