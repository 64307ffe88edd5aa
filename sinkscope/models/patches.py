"""What positions of images and of sound are called: `[CLS]`, `[REG1]`, `patch 3,5` (row, column), `frame 17`.

Inside a text they are numbered, too: `image 0 patch 3,5`; where the grid of patches is not known, `image 0 patch 7`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from sinkscope.errors import SinkscopeError

#: Parameters that models put before their patches, in this order, and what such a position is called.
FIRST = {"cls_token": "[CLS]", "class_embedding": "[CLS]", "distillation_token": "[DIST]", "register_tokens": "[REG{}]"}


def places_of(trunk: Any, label: str, row: Tensor) -> list[str]:
    """Name the positions that an encoder makes of one image or sound, in their order.

    Args:
        trunk: the encoder.
        label: what the row is called, for errors.
        row: an image `[channel, height, width]`, a wave `[sample]`, or a spectrum: `[time, mel]`, of Whisper `[mel, frame]`.

    Raises:
        SinkscopeError: the encoder takes another shape, or how it makes positions is not known.
    """
    config: Any = trunk.config
    if row.ndim == 3:
        named = _patches(config, trunk, label, row)
    elif row.ndim == 1:
        named = _frames(config, label, row)
    elif hasattr(config, "frequency_stride"):
        named = _spectrum(config, label, row)
    else:
        named = _mel(config, trunk, label, row)
    return [*_ahead(trunk), *named]


def _ahead(trunk: nn.Module) -> list[str]:
    """Name the tokens that a model puts before its patches: a class token, a distillation token, registers."""
    there = {name.rpartition(".")[2]: parameter for name, parameter in trunk.named_parameters()}
    return [
        name.format(n)
        for parameter, name in FIRST.items()
        if parameter in there
        for n in range(1, (there[parameter].shape[1] if "{}" in name else 1) + 1)
    ]


def _patches(config: Any, trunk: Any, label: str, image: Tensor) -> list[str]:
    channels, *size = image.shape
    patch, fixed = (_pair(getattr(config, name, None)) for name in ("patch_size", "image_size"))
    if patch is None:
        raise SinkscopeError(f"{type(trunk).__name__} says no patch_size: images are covered that are cut into patches")
    bound = "interpolate_pos_encoding" in inspect.signature(trunk.forward).parameters  # else it fits any size by itself
    _same_shape(label, channels, getattr(config, "num_channels", channels), "channels")
    if bound and fixed is not None:
        _same_shape(label, size, fixed, "pixels high and wide")
    rows, columns = (n // p for n, p in zip(size, patch, strict=True))
    if rows * columns < 2:
        raise SinkscopeError(f"{label!r} is {size[0]} x {size[1]}: fewer than two patches of {patch[0]} x {patch[1]} pixels")
    return _grid(rows, columns)


def _spectrum(config: Any, label: str, spectrum: Tensor) -> list[str]:
    """Patches of a spectrum `[time, mel]`: rows are frequencies, columns times; they may overlap."""
    _same_shape(label, list(spectrum.shape), [int(config.max_length), int(config.num_mel_bins)], "frames by mel bins")
    strides = ((config.num_mel_bins, config.frequency_stride), (config.max_length, config.time_stride))
    return _grid(*((size - config.patch_size) // stride + 1 for size, stride in strides))


def _frames(config: Any, label: str, wave: Tensor) -> list[str]:
    """Frames of a wave `[sample]`: what its convolutions leave of it."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if not kernels or not strides:
        raise SinkscopeError(
            f"{label!r} is a wave, and the model reads spectra: give input_values [batch, time, mel] (of two axes, they are "
            "taken for a batch of waves)"
        )
    count = len(wave)
    for kernel, stride in zip(kernels, strides, strict=True):
        count = (count - kernel) // stride + 1
    if count < 2:
        raise SinkscopeError(f"{label!r} has {len(wave)} samples, too few for two frames of attention: give a longer sound")
    return _numbered(count)


def _mel(config: Any, trunk: Any, label: str, spectrum: Tensor) -> list[str]:
    """Frames of a spectrum `[mel, frame]`, two at a time: Whisper's."""
    size = getattr(config, "max_source_positions", None)
    if not size or not hasattr(trunk, "conv2"):
        raise SinkscopeError(f"{type(trunk).__name__} makes positions of a spectrum in a way that is not known here")
    _same_shape(label, list(spectrum.shape), [int(config.num_mel_bins), 2 * int(size)], "mel bins by frames")
    return _numbered(int(size))


def _grid(rows: int, columns: int) -> list[str]:
    return [f"patch {row},{column}" for row in range(rows) for column in range(columns)]


def _numbered(count: int) -> list[str]:
    return [f"frame {n}" for n in range(count)]


def _pair(size: Any) -> list[int] | None:
    """Take a height and a width, which may be one number."""
    return None if size is None else [size, size] if isinstance(size, int) else list(size)


def _same_shape(label: str, given: Any, wanted: Any, what: str) -> None:
    if given != wanted:
        raise SinkscopeError(f"{label!r} has {given} {what}, and the model takes {wanted}: give what its processor gives")


def names_inside(kind: str, at: Sequence[int], given: Mapping[str, Tensor], config: Any) -> list[str]:
    """Name the positions of a text that stand for images, videos or sounds, in their order.

    Args:
        kind: `image`, `video` or `sound`.
        at: the positions, ascending.
        given: what the model is given beside the ids.
        config: of the whole model.

    >>> names_inside("sound", [3, 4, 9], {}, None)
    ['sound 0 frame 0', 'sound 0 frame 1', 'sound 1 frame 0']
    """
    part = "frame" if kind == "sound" else "patch"
    pieces = _pieces(kind, at, given, config)
    if pieces is None:
        return [f"{kind} {part} {n}" for n in range(len(at))]
    return [
        f"{kind} {number} {part} {f'{n // columns},{n % columns}' if columns else n}"
        for number, (count, columns) in enumerate(pieces)
        for n in range(count)
    ]


def _pieces(kind: str, at: Sequence[int], given: Mapping[str, Tensor], config: Any) -> list[tuple[int, int | None]] | None:
    """Give how many positions stand for each image, and in how many columns they lie, where that is known.

    None where it is not known which positions are of which image.
    """
    eye, grids, sizes = getattr(config, "vision_config", None), given.get(f"{kind}_grid_thw"), given.get("image_sizes")
    merged = getattr(eye, "spatial_merge_size", None) or getattr(config, "spatial_merge_size", None) or 1
    if grids is not None:  # frames, rows, columns before they are merged
        known = [(t * (h // merged) * (w // merged), w // merged if t == 1 else None) for t, h, w in grids.tolist()]
        return known if sum(count for count, _ in known) == len(at) else None
    patch = _pair(getattr(eye, "patch_size", None))
    if kind == "image" and sizes is not None and patch is not None:  # each image has a size of its own (Pixtral)
        cells = [(h // (patch[0] * merged), w // (patch[1] * merged)) for h, w in sizes.reshape(-1, 2).tolist()]
        if sum(h * w for h, w in cells) == len(at):
            return [(h * w, w) for h, w in cells]
    places, runs = given.get("image_position_ids") if kind == "image" else None, _runs(at)
    if places is not None:  # of each patch, -1 where there is none; squares of them become one (Gemma 4)
        pool = getattr(eye, "pooling_kernel_size", None) or 1
        counts, columns = (places >= 0).all(-1).sum(-1) // pool**2, (places[..., 0].amax(-1) + 1) // pool
        return list(zip(counts.tolist(), columns.tolist(), strict=True)) if int(counts.sum()) == len(at) else None
    pixels = given.get("pixel_values") if kind == "image" else None
    if pixels is None or pixels.ndim < 4:
        return [(count, None) for count in runs]
    tiled = pixels.ndim == 5 and sizes is not None  # an image is cut into tiles, whose borders have positions of their own
    count = math.prod(pixels.shape[: 1 if tiled else -3])
    if not tiled and sizes is None and len(at) % count == 0:
        each = len(at) // count
        return [(each, _columns(each, *pixels.shape[-2:]))] * count
    return [(size, None) for size in runs] if len(runs) == count else None  # rows may end with a position of their own (Emu3)


def _runs(at: Sequence[int]) -> list[int]:
    """Count the positions that follow each other."""
    starts = [n for n in range(len(at)) if n == 0 or at[n] != at[n - 1] + 1]
    return [stop - start for start, stop in pairwise([*starts, len(at)])]


def _columns(count: int, height: int, width: int) -> int | None:
    """Give the columns of so many equal squares that cover an image, if there is such a grid."""
    rows = math.isqrt(count * height // width)
    return count // rows if rows and count % rows == 0 and rows * width == count // rows * height else None
