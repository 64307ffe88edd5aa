"""What the processor of a tiny vision-language model would give for one text with images in it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Stands for a part of an image or of a sound; ends a row, and an image (Pixtral's).
TOKEN, ROW, END = 60, 61, 62
#: Height and width of every other image that may be of any size, in pixels or in patches.
SIZES = ((16, 24), (16, 16))
GRIDS = ((4, 6), (4, 4))

#: (numbers of images, generator) -> tokens of each, and what comes beside the ids.
Make = Callable[[int, torch.Generator], tuple[list[list[int]], dict[str, Tensor]]]


def _fixed(tokens: int, side: int = 16, *, stacked: bool = False) -> Make:
    """Images of one size, each of so many tokens; `stacked` in a batch of texts."""

    def make(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(count, 3, side, side, generator=draw)
        found = {"pixel_values": pixels}
        if stacked:
            found = {"pixel_values": pixels[None], "pixel_attention_mask": torch.ones(1, count, side, side, dtype=torch.long)}
        return [[TOKEN] * tokens] * count, found

    return make


def _rows(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Images of several sizes, whose rows end with a token."""
    sizes = torch.tensor([SIZES[n % 2] for n in range(count)])
    rows = [[*(([TOKEN] * (w // 8) + [ROW]) * (h // 8))[:-1], END] for h, w in sizes.tolist()]
    pixels = torch.randn(count, 3, *sizes.amax(0).tolist(), generator=draw)
    return rows, {"pixel_values": pixels, "image_sizes": sizes}


def _patches(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Patches of all images in one row, two frames deep; four of them are a token."""
    grids = torch.tensor([(1, *GRIDS[n % 2]) for n in range(count)])
    pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * 4 * 4, generator=draw)
    return [[TOKEN] * (n // 4) for n in grids.prod(-1).tolist()], {"pixel_values": pixels, "image_grid_thw": grids}


def _tiles(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Images cut into two tiles beside the whole, of 2 x 2 patches each; every row of the tiles ends with a position."""
    sizes = torch.tensor([((16, 32), (32, 16))[n % 2] for n in range(count)])
    pixels = torch.randn(count, 3, 3, 16, 16, generator=draw)
    return [[TOKEN] * (4 + h // 8 * (w // 8 + 1)) for h, w in sizes.tolist()], {"pixel_values": pixels, "image_sizes": sizes}


def _codes(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Images whose cells become words of a code book; every row ends with one more."""
    sizes = torch.tensor([((8, 12), (8, 8))[n % 2] for n in range(count)])
    pixels = torch.randn(count, 3, *sizes.amax(0).tolist(), generator=draw)
    return [[TOKEN] * (h // 2 * (w // 2 + 1)) for h, w in sizes.tolist()], {"pixel_values": pixels, "image_sizes": sizes}


def _pooled(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Patches of each image in a row, with their places and pads behind; four of them are a token."""
    grids = [GRIDS[n % 2] for n in range(count)]
    places = torch.full((count, 24, 2), -1)
    for n, (rows, columns) in enumerate(grids):
        places[n, : rows * columns] = torch.tensor([(x, y) for y in range(rows) for x in range(columns)])
    pixels = torch.rand(count, 24, 3 * 4 * 4, generator=draw)
    return [[TOKEN] * (h * w // 4) for h, w in grids], {"pixel_values": pixels, "image_position_ids": places}


def _sounds(count: int, draw: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Spectra of 32 frames, the last eight of which are pads: two strides of two are left."""
    mask = (torch.arange(32) < 24).long().expand(count, -1)
    return [[TOKEN] * 6] * count, {
        "input_features": torch.randn(count, 16, 32, generator=draw),
        "feature_attention_mask": mask,
    }


#: Architecture -> what it is given, and what it calls the marks of a text's images.
SEEING: dict[str, tuple[Make, str | None]] = {
    "LlavaForConditionalGeneration": (_fixed(16), None),
    "Gemma3ForConditionalGeneration": (_fixed(4), "token_type_ids"),
    "Idefics3ForConditionalGeneration": (_fixed(4, stacked=True), None),
    "Mistral3ForConditionalGeneration": (_rows, None),
    "LlavaNextForConditionalGeneration": (_tiles, None),
    "LlavaOnevisionForConditionalGeneration": (_tiles, None),
    "Emu3ForConditionalGeneration": (_codes, None),
    "Gemma4ForConditionalGeneration": (_pooled, "mm_token_type_ids"),
    "Qwen2VLForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Qwen2_5_VLForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Qwen3VLForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Qwen3VLMoeForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Qwen3_5ForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Glm4vForConditionalGeneration": (_patches, "mm_token_type_ids"),
    "Qwen2AudioForConditionalGeneration": (_sounds, None),
}


def text_with_images(architecture: str, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Give one text with so many images in it, text before the first and behind each."""
    make, marks = SEEING[architecture]
    draw = torch.Generator().manual_seed(seed)
    images, beside = make(count, draw)
    ids = [1, *torch.randint(4, 60, (3,), generator=draw).tolist()]
    for image in images:
        ids += [*image, *torch.randint(4, 60, (4,), generator=draw).tolist()]
    whole = torch.tensor([ids])
    found = {"input_ids": whole, "attention_mask": torch.ones_like(whole), **beside}
    return found if marks is None else found | {marks: (whole == TOKEN).long()}
