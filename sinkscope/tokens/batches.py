"""Sequences, ragged and without pads, and batches with a validity mask.

A batch is right-padded only for the forward pass, and its mask comes from the lengths, never from the ids, since ids do
not tell a pad from BOS or EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.features import Mixed


@dataclass(frozen=True, eq=False)
class TextTokens:
    """One text: its label, its ids `[position]`, and its tokens as strings.

    What the decoder of an encoder-decoder is given has a `source`, which the encoder reads; where the source's positions are
    the keys that are looked at, it is `crossed`. An image or a sound has `inputs`, what the model reads in place of ids; its
    ids then only number its positions, and its strings name them. Text with images in it has what the model is given beside
    its ids, as `Mixed`.
    """

    label: str
    ids: Int[Tensor, " position"]
    strings: tuple[str, ...]
    source: TextTokens | None = None
    crossed: bool = False
    inputs: Shaped[Tensor, ...] | Mixed | None = None

    def __len__(self) -> int:
        """Count its tokens, BOS included."""
        return len(self.ids)

    @property
    def keyed(self) -> TextTokens:
        """The text whose positions are the keys: this one, or its source."""
        return self.source if self.crossed and self.source is not None else self

    @property
    def shape(self) -> tuple[int, ...]:
        """What texts that share a batch have in common: of images and sound, their shape."""
        return tuple(self.inputs.shape) if isinstance(self.inputs, Tensor) else ()

    @property
    def mixed(self) -> Mixed | None:
        """What is given beside its ids, where there are images or sound in it: it is then run by itself."""
        return self.inputs if isinstance(self.inputs, Mixed) else None

    @property
    def ends(self) -> Int[Tensor, " position"] | None:
        """The key after the last that each query sees, where some see later ones; None where causality alone says it."""
        return self.mixed.ends if self.mixed is not None and self.mixed.both_ways else None

    def ends_within(self, window: int | None) -> Int[Tensor, " position"] | None:
        """Give the same for a layer of this sliding window."""
        return None if self.ends is None or (self.mixed is not None and self.mixed.near and window is None) else self.ends

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What it is besides its ids: the numbers of images and sound."""
        if self.mixed is not None:
            return tuple(self.mixed.values.values())
        return (self.inputs,) if isinstance(self.inputs, Tensor) else ()

    def first(self, n: int) -> TextTokens:
        """Give the first tokens, and as many of the source's; an image or a sound is whole."""
        if self.inputs is not None:
            return self
        source = None if self.source is None else self.source.first(n)
        return replace(self, ids=self.ids[:n], strings=self.strings[:n], source=source)


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded ids of a few sequences and which of them are real; their sources or inputs, where they have any."""

    sequences: tuple[TextTokens, ...]
    ids: Int[Tensor, "batch position"]
    valid: Bool[Tensor, "batch position"]
    sources: Batch | None = None
    inputs: Shaped[Tensor, "batch ..."] | Mixed | None = None

    def ends_within(self, window: int | None) -> Int[Tensor, "batch position"] | None:
        """Give the key after the last that each query sees in a layer of this sliding window, where some see later ones."""
        ends = self.sequences[0].ends_within(window)
        return None if ends is None else ends[None].to(self.ids.device)

    @property
    def beside(self) -> dict[str, Any]:
        """What the model is given besides the ids, as keywords of `Adapter.body`."""
        return {"sources": self.sources, "inputs": self.inputs}

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Real tokens of each sequence."""
        return self.valid.sum(-1)

    @property
    def crossed(self) -> Batch | None:
        """The sources, where keys are their positions."""
        return self.sources if self.sequences[0].crossed else None


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokenised texts and how BOS was decided.

    Attributes:
        sequences: one per text, in the caller's order.
        bos: one sentence: whether a BOS token stands first, which, and who decided.
    """

    sequences: tuple[TextTokens, ...]
    bos: str

    def __len__(self) -> int:
        """Count the texts."""
        return len(self.sequences)

    def batches(self, size: int, device: torch.device | str = "cpu") -> Iterator[Batch]:
        """Group texts of similar length, at most `size` in a batch, shortest first.

        A batch also ends where padding to its longest text would more than double the shortest; images and sound share one
        with those of their own shape, so that they are not padded, and text with images in it shares none.
        """
        order = sorted(self.sequences, key=lambda s: (len(s), s.shape))
        group: list[TextTokens] = []
        for sequence in order:
            long = bool(group) and (len(sequence) > 2 * len(group[0]) or sequence.shape != group[0].shape)
            alone = bool(group) and (sequence.mixed or group[0].mixed) is not None
            if long or alone or len(group) == size:
                yield _pad(group, device)
                group = []
            group.append(sequence)
        if group:
            yield _pad(group, device)


def _pad(group: Sequence[TextTokens], device: torch.device | str) -> Batch:
    ids = torch.nn.utils.rnn.pad_sequence([s.ids for s in group], batch_first=True, padding_value=0)
    lengths = torch.tensor([len(s) for s in group])
    valid = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    sources = [s.source for s in group if s.source is not None]
    rows = [s.inputs for s in group if isinstance(s.inputs, Tensor)]
    inputs = torch.stack(rows).to(device) if rows else group[0].mixed
    return Batch(tuple(group), ids.to(device), valid.to(device), _pad(sources, device) if sources else None, inputs)


def key_positions(key: int | str, sequences: Sequence[TextTokens]) -> Int[Tensor, " batch"]:
    """Find the position that `key` names in each sequence; in cross-attention, of its source.

    Args:
        key: a 0-based position; negative counts from the end (-1 is the last token); or a token's text, such as
            `"[SEP]"`, whose first occurrence counts.
        sequences: the sequences to look in.

    Raises:
        SinkscopeError: a position outside a sequence, or a token that does not occur in it.
    """
    found = []
    for s in (sequence.keyed for sequence in sequences):
        if isinstance(key, str):
            if key not in s.strings:
                raise SinkscopeError(f"key={key!r} does not occur in {s.label!r}; its first tokens are {s.strings[:8]}")
            found.append(s.strings.index(key))
        else:
            position = key + len(s) if key < 0 else key
            if not 0 <= position < len(s):
                raise SinkscopeError(f"key={key} lies outside {s.label!r}, whose positions are 0 to {len(s) - 1}")
            found.append(position)
    return torch.tensor(found)
