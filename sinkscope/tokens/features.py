"""What a Hugging Face processor gives in place of token ids, or beside them: images and sound, taken apart row by row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from sinkscope.errors import SinkscopeError
from sinkscope.tokens.numbers import tensor_of

#: Name of what a model reads -> what one row of it is, and how many axes a row has (a wave has one, a spectrum two).
READS: dict[str, tuple[str, frozenset[int]]] = {
    "pixel_values": ("image", frozenset({3})),
    "input_features": ("sound", frozenset({2})),
    "input_values": ("sound", frozenset({1, 2})),
}
#: What comes beside the ids of a text with images, videos or sound in it.
AMONG = frozenset({*READS, "pixel_values_videos"})
#: What may come with it: a mask of samples, which is used, and targets, which change nothing.
MASK = "attention_mask"
TARGETS = frozenset({"labels", "label", "label_ids", "return_loss"})


@dataclass(frozen=True, eq=False)
class Features:
    """One image, wave or spectrum, as a model reads it: `name` is the model's name for it."""

    name: str
    values: Shaped[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Mixed:
    """What a vision-language model is given beside the ids of one text, and what becomes of it.

    Attributes:
        values: by the model's own names; all of them are of this text.
        placed: which positions stand for images, videos or sound.
        ends: the key after the last that each query sees: i + 1, or where an image ends that sees itself both ways.
        near: whether that is so in layers with a sliding window alone, and the others are causal.
    """

    values: Mapping[str, Shaped[Tensor, ...]]
    placed: Bool[Tensor, " position"]
    ends: Int[Tensor, " position"]
    near: bool = False

    @property
    def both_ways(self) -> bool:
        """Whether any query sees a later key."""
        return bool((self.ends > torch.arange(1, len(self.ends) + 1)).any())

    def within(self, window: int | None) -> Int[Tensor, " position"]:
        """Give the ends in a layer of this sliding window."""
        return torch.arange(1, len(self.ends) + 1) if self.near and window is None else self.ends


def is_features(given: Any) -> bool:
    """Tell what holds images or sound and no text: what a processor gives."""
    return isinstance(given, Mapping) and "input_ids" not in given and any(name in given for name in READS)


def is_mixed(given: Any) -> bool:
    """Tell text with images or sound in it: what the processor of a vision-language model gives."""
    return isinstance(given, Mapping) and "input_ids" in given and any(given.get(name) is not None for name in AMONG)


def features_of(given: Mapping[str, Any], where: str) -> list[Features]:
    """Take what a processor gives apart, row by row; a wave without its pads.

    Raises:
        SinkscopeError: two kinds at once, a key that would change the result, or what are no rows of numbers.
    """
    there = {name: value for name, value in given.items() if value is not None}
    names = [name for name in READS if name in there]
    strange = [name for name in there if name not in {*names[:1], MASK} | TARGETS and not isinstance(there[name], str)]
    if strange or not names:
        raise SinkscopeError(
            f"{where} has {strange[0]!r} beside {names[0]!r}, which is not passed on to the model: leave it out"
            if strange and names
            else f"{where} holds none of {', '.join(READS)}"
        )
    name, rows = names[0], _rows(there[names[0]], names[0], where)
    if there.get(MASK) is not None and name == "input_values":
        rows = _without_pads(rows, there[MASK], where)
    return [Features(name, row) for row in rows]


def _rows(value: Any, name: str, where: str) -> list[Tensor]:
    """Take one row, or a batch of them: of two axes, `input_values` are a batch of waves."""
    kind, axes = READS[name]
    try:
        rows = [row.detach().cpu() for row in _split(value, axes)]
        fine = bool(rows) and all(row.ndim in axes and row.is_floating_point() and row.numel() for row in rows)
    except Exception:  # whatever NumPy and PyTorch raise about what is no array of numbers
        fine = False
    if not fine:
        told = {"pixel_values": "[batch, channels, height, width]", "input_features": "[batch, mel, frames]"}
        raise SinkscopeError(
            f"{name} of {where} must be floating-point numbers {told.get(name, '[batch, samples] or [batch, time, mel]')}, "
            f"as the model's processor gives them for each {kind}: processor(..., return_tensors='pt')"
        )
    return rows


def _split(value: Any, axes: frozenset[int]) -> list[Tensor]:
    """Take rows out of a list of them, which may be of unequal lengths, or out of an array, where it has an axis more."""
    if isinstance(value, list | tuple):
        rows = [tensor_of(row) for row in value]
        if rows[0].ndim in axes or rows[0].ndim + 1 not in axes:
            return rows
        value = torch.stack(rows)
    whole = tensor_of(value)
    return list(whole) if whole.ndim - 1 in axes else [whole]


def _without_pads(rows: list[Tensor], mask: Any, where: str) -> list[Tensor]:
    """Cut a wave's pads off, which stand at its end."""
    marks = torch.as_tensor(mask).cpu()
    marks = marks[None] if marks.ndim == 1 else marks
    lengths = marks.long().sum(-1)
    here = torch.arange(marks.shape[-1]) < lengths[:, None]
    if not torch.equal(marks.bool(), here) or [len(row) for row in rows] != [marks.shape[-1]] * len(marks):
        raise SinkscopeError(f"the attention_mask of {where} must be 1 at samples and 0 at the pads behind them, row by row")
    return [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]


def not_text(given: Features | Mapping[str, Any], where: str) -> SinkscopeError:
    """Say that a model of text was given something else."""
    name = given.name if isinstance(given, Features) else next(name for name in READS if name in given)
    return SinkscopeError(f"{where} holds {name}, and this model reads text: give strings or token ids, or another model")


def not_alone(given: Mapping[str, Any], where: str) -> SinkscopeError:
    """Say that text with images in it was given where text alone is taken."""
    name = next(name for name in sorted(AMONG) if given.get(name) is not None)
    return SinkscopeError(
        f"{where} has {name!r} beside its ids, which is not passed on to the model: if nothing depends on it, give "
        "{'input_ids': ..., 'attention_mask': ...}. Text with images or sound in it is taken by ss.measure, ss.attention_map "
        "and ss.attention_patterns, of a model that reads both"
    )
