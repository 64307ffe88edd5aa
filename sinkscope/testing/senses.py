"""Tiny random encoders of images and of sound, and what a processor would give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import unknown
from sinkscope.testing.seeing import SEEING, text_with_images

PATCH, LAYERS = 4, 3


@dataclass(frozen=True)
class Sense:
    """How to build one encoder, and what it reads.

    Attributes:
        model: name of its class in `transformers`.
        reads: what it calls its input.
        shape: of one input.
        options: what its configuration is told beside the sizes that all share.
    """

    model: str
    reads: str
    shape: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


_PIXELS = {"image_size": 16, "patch_size": PATCH, "num_hidden_layers": LAYERS}
_DINO = {**_PIXELS, "hidden_act": "gelu"}
_WAVES = {
    **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_hidden_layers": LAYERS},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
_SPECTRUM = {"max_length": 24, "num_mel_bins": 16, "patch_size": 8, "frequency_stride": 4, "time_stride": 8}
_MEL = {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 16, "encoder_layers": LAYERS}

#: Encoders of three layers and four heads. DINOv2 fits its positions to any size of image.
SENSES: dict[str, Sense] = {
    "vit": Sense("ViTModel", "pixel_values", (3, 16, 16), _PIXELS),
    "deit": Sense("DeiTModel", "pixel_values", (3, 16, 16), _PIXELS),
    "dinov2": Sense("Dinov2Model", "pixel_values", (3, 12, 20), _DINO),
    "dinov2_with_registers": Sense("Dinov2WithRegistersModel", "pixel_values", (3, 12, 20), _DINO),
    "clip_vision": Sense("CLIPVisionModel", "pixel_values", (3, 16, 16), _PIXELS),
    "siglip_vision": Sense("SiglipVisionModel", "pixel_values", (3, 16, 16), _PIXELS),
    "ast": Sense("ASTModel", "input_values", (24, 16), {**_SPECTRUM, "num_hidden_layers": LAYERS}),
    "hubert": Sense("HubertModel", "input_values", (203,), _WAVES),
    "wav2vec2": Sense("Wav2Vec2Model", "input_values", (203,), _WAVES),
    "whisper": Sense("WhisperModel", "input_features", (16, 32), _MEL),
}
#: The same by the name of their class, and with the heads that TransformerLens knows.
BY_CLASS: dict[str, Sense] = {
    **{sense.model: sense for sense in SENSES.values()},
    "ViTForImageClassification": SENSES["vit"],
    "DeiTForImageClassification": SENSES["deit"],
    "ASTForAudioClassification": SENSES["ast"],
    "HubertForCTC": SENSES["hubert"],
    "Wav2Vec2ForCTC": SENSES["wav2vec2"],
}


def tiny_inputs(family: str, count: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """Give what a processor would give for some random images or sounds; or for one text with so many in it.

    Args:
        family: one of `SENSES`, or the class of one, such as `"ViTForImageClassification"`; or of a model
            that reads text with images in it, such as `"LlavaForConditionalGeneration"`.
        count: how many.
        seed: of their numbers.

    Raises:
        SinkscopeError: there is no such family; the message lists them.

    >>> {name: tuple(values.shape) for name, values in tiny_inputs("vit").items()}
    {'pixel_values': (2, 3, 16, 16)}
    >>> {name: tuple(values.shape) for name, values in tiny_inputs("LlavaForConditionalGeneration", 1).items()}
    {'input_ids': (1, 24), 'attention_mask': (1, 24), 'pixel_values': (1, 3, 16, 16)}
    """
    if family in SEEING:
        return text_with_images(family, count, seed)
    known = SENSES | BY_CLASS
    if family not in known:
        raise unknown("family", family, [*known, *SEEING])
    sense = known[family]
    return {sense.reads: torch.randn(count, *sense.shape, generator=torch.Generator().manual_seed(seed))}
