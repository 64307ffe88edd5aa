"""Which queries count: rules for `measure(..., where=)`.

A rule gives, for every batch, two choices of queries: those that count, and the others, which `compare=True` puts beside
them. What belongs to neither (the last token, under a rule about the next one) stays out of both.

>>> import sinkscope as ss
>>> model = ss.testing.planted_sink([[5.0]])
>>> report = ss.measure(model, "the quick brown fox", ["sink_mass"], where=ss.where.positions(10, None), compare=True)
>>> report.summary("all")["metric"].tolist()
['where_share', 'sink_mass', 'where_share[others]', 'sink_mass[others]', 'where_share[difference]', 'sink_mass[difference]']
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from sinkscope.block import Block
from sinkscope.capture.losses import check_logits, next_losses
from sinkscope.errors import SinkscopeError
from sinkscope.metrics.base import RowChoice
from sinkscope.models import Adapter
from sinkscope.tokens import Batch, TextTokens, Tokens

__all__ = ["next_loss", "positions", "rule", "tokens"]

Sides = tuple[RowChoice, RowChoice]


@dataclass(frozen=True)
class Rule:
    """Says which queries count; made by the functions of this module."""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a block must carry for the rule."""
        return ()

    def bound(self, adapter: Adapter, first: int, given: Tokens) -> Rule:
        """Get ready for some texts, of which `first` is the number of the first; refuse what can't be done on them."""
        return self

    def sides(self, adapter: Adapter, batch: Batch, chunk: int | None) -> Sides:
        """Choose the queries that count in a batch, and the others."""
        counted, known = self._marks(adapter, batch, chunk)
        return _rows(counted & known & batch.valid.cpu()), _rows(~counted & known & batch.valid.cpu())

    def _marks(self, adapter: Adapter, batch: Batch, chunk: int | None) -> tuple[Tensor, Tensor]:
        """Mark the tokens that count, and those of which it is known, `[batch, position]` each."""
        lines = [torch.as_tensor(self._text(s)) for s in batch.sequences]
        return _padded(lines, batch), torch.ones(batch.ids.shape, dtype=torch.bool)

    def _text(self, text: TextTokens) -> Bool[Tensor, " position"]:
        """Mark the tokens of one text that count."""
        raise NotImplementedError


def positions(start: SupportsIndex | None, stop: SupportsIndex | None = None) -> Rule:
    """Count the queries from `start` to before `stop`, as a slice does: `positions(16, None)`, `positions(-64)`.

    Raises:
        SinkscopeError: no whole numbers.
    """
    try:
        return _Positions(*(None if n is None else operator.index(n) for n in (start, stop)))
    except TypeError:
        raise SinkscopeError(f"positions({start!r}, {stop!r}): give whole numbers, or None for the ends") from None


def tokens(*which: str | int | Callable[[str], bool], next: bool = False) -> Rule:
    """Count the queries that stand at certain tokens, or, with `next=True`, whose next token is one of them.

    Args:
        which: tokens as they are decoded (`"."`, `" the"`), ids, or functions of the token's string (`str.isspace`).
        next: look at the next token; the last query then has none, and is on neither side.

    Raises:
        SinkscopeError: nothing is named.
    """
    if not which or not all(isinstance(w, str | int) or callable(w) for w in which):
        raise SinkscopeError(f"tokens{which!r}: give tokens as strings or ids, or functions of a token's string")
    return _AtTokens(which, next)


def next_loss(*, above: SupportsFloat | None = None, below: SupportsFloat | None = None) -> Rule:
    """Count the queries whose next token is hard for the model, or easy: its loss in nats is above, or below.

    The unedited model is run once more per batch; the last query has no next token, and is on neither side.

    Raises:
        SinkscopeError: no bound, or two that leave nothing between.
    """
    low, high = (None if bound is None else float(bound) for bound in (above, below))
    if (low is None and high is None) or not (-np.inf if low is None else low) < (np.inf if high is None else high):
        raise SinkscopeError(f"next_loss(above={above}, below={below}): give a lower bound, an upper one, or both in order")
    return _NextLoss(low, high)


def rule(fn: Callable[[Block], Tensor], *, needs: str | Iterable[str] = "pattern") -> Rule:
    """Count the queries that a function of a block chooses, per layer.

    Args:
        fn: block -> `[batch, query]` of bool.
        needs: what it looks at, as for :func:`sinkscope.metric`.
    """
    if not callable(fn):
        raise SinkscopeError(f"where= takes a function of a block, not a {type(fn).__name__}")
    return _OfBlock(fn, (needs,) if isinstance(needs, str) else tuple(needs))


def as_rule(where: Any, attention_mask: Tensor | None = None) -> Rule:
    """Take what `where=` takes: a rule, a function of a block, or a boolean per token.

    Args:
        where: booleans come as a padded tensor `[text, position]`, as a list with a row per text, as one row for one text, or
            as a mapping from label to row.
        attention_mask: of padded ids and booleans alike: 0 marks pads.

    Raises:
        SinkscopeError: it is nothing of that.
    """
    if isinstance(where, Rule):
        return where
    if isinstance(where, Mapping):
        return _Given(by_label={str(label): _booleans(row) for label, row in where.items()})
    if callable(where):
        return rule(where)
    if not isinstance(where, Tensor | np.ndarray | Sequence) or isinstance(where, str):
        raise SinkscopeError(
            f"where={where!r}: give a rule such as ss.where.next_loss(above=2), a function of a block, or a boolean per token"
        )
    flat = len(where) > 0 and not np.ndim(where[0])
    rows = [_booleans(row) for row in ([where] if flat else where)]
    if attention_mask is not None:
        kept = attention_mask.reshape(-1, attention_mask.shape[-1]).bool().cpu()
        if [len(row) for row in rows] != [kept.shape[1]] * len(kept):
            raise SinkscopeError(f"where= must be shaped like the attention_mask {tuple(attention_mask.shape)}")
        rows = [row[keep] for row, keep in zip(rows, kept, strict=True)]
    return _Given(rows=tuple(rows), padded=not flat and isinstance(where, Tensor | np.ndarray))


def _booleans(row: Any) -> Bool[Tensor, " position"]:
    mark = torch.as_tensor(row)
    if mark.dtype != torch.bool or mark.ndim != 1:
        raise SinkscopeError(f"where= needs one boolean per token of each text, got {tuple(mark.shape)} {mark.dtype}")
    return mark.cpu()


def _padded(rows: Sequence[Tensor], batch: Batch) -> Bool[Tensor, "batch position"]:
    marks = torch.zeros(batch.ids.shape, dtype=torch.bool)
    for line, row in enumerate(rows):
        marks[line, : len(row)] = row
    return marks


def _rows(marks: Bool[Tensor, "batch position"]) -> RowChoice:
    """Choose the rows of a block by marks on tokens."""
    return lambda block: marks[:, block.start : block.start + block.n_queries]


@dataclass(frozen=True)
class _Positions(Rule):
    start: int | None
    stop: int | None

    def __repr__(self) -> str:
        return f"positions({self.start}, {self.stop})"

    def _text(self, text: TextTokens) -> Tensor:
        marks = torch.zeros(len(text), dtype=torch.bool)
        marks[slice(self.start, self.stop)] = True
        return marks


@dataclass(frozen=True)
class _AtTokens(Rule):
    which: tuple[str | int | Callable[[str], bool], ...]
    next: bool

    def __repr__(self) -> str:
        names = [getattr(w, "__qualname__", "a function") if callable(w) else repr(w) for w in self.which]
        return f"tokens({', '.join(names)}{', next=True' * self.next})"

    def _text(self, text: TextTokens) -> Tensor:
        here = [self._one_of(*pair) for pair in zip(text.strings, text.ids.tolist(), strict=True)]
        return torch.tensor([*here[1:], False] if self.next else here)

    def _one_of(self, string: str, number: int) -> bool:
        return any(bool(w(string)) if callable(w) else w in (string, number) for w in self.which)

    def _marks(self, adapter: Adapter, batch: Batch, chunk: int | None) -> tuple[Tensor, Tensor]:
        counted, known = super()._marks(adapter, batch, chunk)
        return counted, known & _before_last(batch) if self.next else known


def _before_last(batch: Batch) -> Bool[Tensor, "batch position"]:
    """Mark the tokens that have a next one."""
    return torch.arange(batch.ids.shape[1]) < batch.lengths.cpu()[:, None] - 1


@dataclass(frozen=True)
class _NextLoss(Rule):
    above: float | None
    below: float | None

    def __repr__(self) -> str:
        bounds = [f"{name}={bound:g}" for name, bound in vars(self).items() if bound is not None]
        return f"next_loss({', '.join(bounds)})"

    def bound(self, adapter: Adapter, first: int, given: Tokens) -> Rule:
        check_logits(adapter, given)
        return self

    def _marks(self, adapter: Adapter, batch: Batch, chunk: int | None) -> tuple[Tensor, Tensor]:
        losses = next_losses(adapter, batch, chunk)
        low = losses > (-torch.inf if self.above is None else self.above)
        return low & (losses < (torch.inf if self.below is None else self.below)), ~losses.isnan()


@dataclass(frozen=True)
class _OfBlock(Rule):
    fn: Callable[[Block], Tensor]
    of: tuple[str, ...]

    def __repr__(self) -> str:
        return f"rule({getattr(self.fn, '__qualname__', type(self.fn).__name__)})"

    @property
    def needs(self) -> tuple[str, ...]:
        return self.of

    def sides(self, adapter: Adapter, batch: Batch, chunk: int | None) -> Sides:
        return self._chosen, lambda block: ~self._chosen(block)

    def _chosen(self, block: Block) -> Tensor:
        try:
            marks = self.fn(block)
        except Exception as error:
            raise SinkscopeError(f"{self!r} raised {type(error).__name__} in layer {block.layer}: {error}") from error
        shape = (len(block.lengths), block.n_queries)
        if not isinstance(marks, Tensor) or marks.dtype != torch.bool or tuple(marks.shape) != shape:
            got = f"{tuple(marks.shape)} {marks.dtype}" if isinstance(marks, Tensor) else f"a {type(marks).__name__}"
            raise SinkscopeError(
                f"{self!r} gives {got} in layer {block.layer}; expected [batch, query] = {list(shape)} of bool"
            )
        return marks


@dataclass(frozen=True, eq=False)
class _Given(Rule):
    """Booleans that were given: by the text's number, or its label."""

    rows: tuple[Tensor, ...] = ()
    padded: bool = False
    by_label: Mapping[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"a boolean per token of {len(self.rows) or len(self.by_label)} text(s)"

    def bound(self, adapter: Adapter, first: int, given: Tokens) -> Rule:
        found = dict(self.by_label)
        if self.rows:
            if first + len(given) > len(self.rows):
                raise SinkscopeError(f"where= has booleans of {len(self.rows)} text(s), and there are more texts")
            found = {s.label: self.rows[first + i] for i, s in enumerate(given.sequences)}
        for s in given.sequences:
            if s.label not in found:
                raise SinkscopeError(f"where= has no booleans for {s.label!r}; it has {', '.join(list(found)[:8]) or 'none'}")
            if len(found[s.label]) < len(s) or (len(found[s.label]) > len(s) and not self.padded):
                raise SinkscopeError(
                    f"where= has {len(found[s.label])} booleans for {s.label!r}, which has {len(s)} tokens, BOS included"
                )
        return replace(self, by_label={s.label: found[s.label][: len(s)] for s in given.sequences})

    def _text(self, text: TextTokens) -> Tensor:
        return self.by_label[text.label]
