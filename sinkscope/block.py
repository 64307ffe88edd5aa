"""Block: what a metric sees. A few query rows of one layer's attention, all keys, and nothing else.

An engine produces blocks; a metric turns a block into numbers; no metric knows which engine ran. All positions
are 0-based. `batch` counts sequences, `head` query heads, `query` the rows of this block, `key` the positions that
the last of these rows can see. Rows and keys past a sequence's real tokens are padding: their numbers mean nothing,
and the library drops them after the metric has run (:attr:`Block.valid`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError

#: Short names for activations that metrics may need, and the TransformerLens hook point behind each.
HOOK_OF = {
    "query": "attn.hook_q",
    "key": "attn.hook_k",
    "value": "attn.hook_v",
    "output": "attn.hook_z",
    "residual": "hook_resid_post",
    "rotated_query": "attn.hook_rot_q",
    "rotated_key": "attn.hook_rot_k",
}


@runtime_checkable
class Rows(Protocol):
    """Attention rows, however they come about: stored in a pattern, or recomputed from scores."""

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Give the whole rows."""
        ...

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Give the attention to one key position per sequence."""
        ...

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Give the sum of each row: 1, or less where a learned sink logit takes a share."""
        ...


@runtime_checkable
class SummedRows(Protocol):
    """Rows that know a cheaper way to their sums than through the pattern."""

    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Give the entropy of each row in nats, 0 log 0 = 0."""
        ...

    def received(self, chosen: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
        """Give what each key receives from the chosen rows together."""
        ...


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class PatternRows:
    """Rows held as a pattern; upcast to float32, since bfloat16 rows do not even sum to one."""

    values: Float[Tensor, "batch head query key"]

    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Give the rows in float32 (float64 stays)."""
        return _at_least_float32(self.values)

    def mass(self, keys: Int[Tensor, " batch"]) -> Float[Tensor, "batch head query"]:
        """Gather one column per sequence; 0 where the key lies beyond the columns held."""
        held = self.values.shape[-1]
        index = keys.clamp(max=held - 1)
        column = self.values[torch.arange(len(keys), device=keys.device), :, :, index]
        column = torch.where((keys < held)[:, None, None], column, torch.zeros_like(column))
        return _at_least_float32(column)

    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Sum over keys in float32, without a copy of the rows."""
        return self.values.sum(-1, dtype=torch.promote_types(self.values.dtype, torch.float32))


def sum_of(
    pattern: Float[Tensor, "*batch_head query key"], chosen: Bool[Tensor, "*batch query"]
) -> Float[Tensor, "*batch_head key"]:
    """Add up the chosen rows, of all heads or of one; the others may hold anything."""
    if not bool(chosen.all()):
        pattern = torch.where(chosen[:, None] if pattern.ndim == 2 else chosen[:, None, :, None], pattern, 0)
    return pattern.new_ones(pattern.shape[-2]) @ pattern  # faster than a sum


class Chunk(int):
    """A window that does not slide: a query sees the keys of its own chunk, `i // size == k // size` (Llama 4)."""


#: As many entries as there are.
ANY = 1 << 62


class Compressed(int):
    """A window that slides, beside entries that stand for several tokens at once (DeepSeek V4).

    Query i sees an entry for every `rate` tokens up to it; of many, the `most` that an indexer chooses.
    """

    rate: int
    most: int

    def __new__(cls, window: int, rate: int = 1, most: int = ANY) -> Compressed:
        """Make the window's size."""
        made = super().__new__(cls, window)
        made.rate, made.most = rate, most
        return made

    def __repr__(self) -> str:
        """Tell it from the window alone."""
        return f"{int(self)} and entries of {self.rate}, up to {self.most}"

    def entries(self, queries: Tensor) -> Tensor:
        """Count the entries that queries see."""
        return ((queries + 1) // self.rate).clamp(max=self.most)


def in_reach(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Tell which keys lie in a layer's window around each query; the arguments broadcast."""
    return queries // window == keys // window if isinstance(window, Chunk) else (queries - keys).abs() < window


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive query rows of one layer's attention pattern, for a batch of sequences.

    Attributes:
        layer: 0-based layer.
        start: position of the first query row.
        rows: where the attention comes from.
        n_queries: number of query rows.
        lengths: real tokens of each sequence, `[batch]`.
        keys: the sink position looked at in each sequence, `[batch]`.
        causal: False for encoders, whose queries see every key.
        window: size of the layer's sliding window (query i sees key k iff i - k < window), a :class:`Chunk`, or None.
        tokens: token ids, `[batch, position]`.
        activations: other hook points that the metric asked for, by the name it used.
        key_lengths: real tokens on the side of the keys, `[batch]`, where that is another text: in cross-attention, whose
            queries see all of the source. None where keys are the positions of the queries.
        ends: the key after the last that each query sees, `[batch, position]`, where a decoder's queries see later keys:
            images of Gemma 3 see themselves both ways. None elsewhere.
    """

    layer: int
    start: int
    rows: Rows
    n_queries: int
    lengths: Int[Tensor, " batch"]
    keys: Int[Tensor, " batch"]
    causal: bool = True
    window: int | None = None
    tokens: Int[Tensor, "batch position"] | None = None
    activations: Mapping[str, Tensor] = field(default_factory=dict)
    key_lengths: Int[Tensor, " batch"] | None = None
    ends: Int[Tensor, "batch position"] | None = None

    def at(self, keys: Int[Tensor, " batch"]) -> Block:
        """Look at other key positions, one per sequence."""
        return replace(self, keys=keys)

    def __getitem__(self, name: str) -> Tensor:
        """Give the activation at a hook point that the metric declared in `needs`, e.g. `"mlp.hook_post"`."""
        try:
            return self.activations[name]
        except KeyError:
            raise SinkscopeError(
                f"the block has no activation {name!r}: declare it, @metric(needs={name!r}). "
                f"This block has: {', '.join(sorted(self.activations)) or 'only attention'}"
            ) from None

    @property
    def n_keys(self) -> int:
        """How many keys a row has: those up to the block's last row, or all of an encoder's."""
        if self.ends is not None:
            return self.ends.shape[1]
        if self.causal:
            return self.start + self.n_queries
        if self.key_lengths is not None:
            return int(self.key_lengths.max())
        return int(self.lengths.max()) if self.tokens is None else self.tokens.shape[1]

    def rows_version(self) -> int:
        """Count the writes into a stored pattern, so that a metric that writes into it is found out."""
        stored = self.rows.values if isinstance(self.rows, PatternRows) else None
        return 0 if stored is None or stored.is_inference() else stored._version

    @cached_property
    def pattern(self) -> Float[Tensor, "batch head query key"]:
        """Post-softmax attention, float32; keys after the block's last row are left out (nobody sees them)."""
        return self.rows.pattern()

    @cached_property
    def mass(self) -> Float[Tensor, "batch head query"]:
        """Attention that each query pays to the sink key; 0 where it can't see it."""
        return self.rows.mass(self.keys)

    @cached_property
    def row_sum(self) -> Float[Tensor, "batch head query"]:
        """Sum of each row: 1, or less where a learned sink takes a share."""
        return self.rows.row_sum()

    @cached_property
    def entropy(self) -> Float[Tensor, "batch head query"]:
        """Entropy of each row in nats, 0 log 0 = 0; rows are not renormalised."""
        if isinstance(self.rows, SummedRows):
            return self.rows.entropy()
        products = self.pattern.clamp_min(torch.finfo(self.pattern.dtype).tiny).log_().mul_(self.pattern)
        return -(products @ products.new_ones(products.shape[-1]))  # a third of the time of torch.special.entr, summed

    def received(self, chosen: Bool[Tensor, "batch query"]) -> Float[Tensor, "batch head key"]:
        """Sum of the pattern over some of its rows."""
        if isinstance(self.rows, SummedRows):
            return self.rows.received(chosen)
        return sum_of(self.pattern, chosen)

    @property
    def value(self) -> Float[Tensor, "batch key kv_head d_head"]:
        """Value vectors (`needs="value"`)."""
        return self["value"]

    @property
    def key(self) -> Float[Tensor, "batch key kv_head d_head"]:
        """Key vectors before any rotation (`needs="key"`)."""
        return self["key"]

    @property
    def query(self) -> Float[Tensor, "batch query head d_head"]:
        """Query vectors before any rotation (`needs="query"`)."""
        return self["query"]

    @property
    def residual(self) -> Float[Tensor, "batch query d_model"]:
        """Residual stream after the layer (`needs="residual"`)."""
        return self["residual"]

    @cached_property
    def queries(self) -> Int[Tensor, " query"]:
        """Positions of the query rows."""
        return torch.arange(self.start, self.start + self.n_queries, device=self.lengths.device)

    @cached_property
    def distance(self) -> Int[Tensor, "query key"]:
        """Distance in tokens between each query and each key, abs(i - k); in cross-attention there is none."""
        if self.key_lengths is not None:
            raise SinkscopeError("in cross-attention keys are positions of another text: there is no distance to them")
        keys = torch.arange(self.pattern.shape[-1], device=self.lengths.device)
        return (self.queries[:, None] - keys[None, :]).abs()

    @cached_property
    def valid(self) -> Bool[Tensor, "batch query"]:
        """Which rows are real tokens."""
        return self.queries[None, :] < self.lengths[:, None]

    @cached_property
    def n_visible(self) -> Int[Tensor, "batch query"]:
        """How many keys a query sees when nothing but causality hides any: i + 1; T in an encoder, S in cross-attention."""
        if self.ends is not None:
            return self.ends[:, self.start : self.start + self.n_queries]
        if self.causal:
            return (self.queries + 1).expand(len(self.lengths), -1)
        return self.real_keys[:, None].expand(-1, self.n_queries)

    @property
    def real_keys(self) -> Int[Tensor, " batch"]:
        """Real tokens on the side of the keys."""
        return self.lengths if self.key_lengths is None else self.key_lengths

    @cached_property
    def sees_key(self) -> Bool[Tensor, "batch query"]:
        """Which queries can see the sink key (causality and sliding window respected)."""
        keys, queries = self.keys[:, None], self.queries[None, :]
        seen = keys < self.n_visible
        queries = torch.maximum(queries, keys) if self.causal else queries  # later keys are in a decoder's reach, if seen
        return seen if self.window is None else seen & in_reach(queries, keys, self.window)
