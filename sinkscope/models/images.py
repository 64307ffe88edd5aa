"""Image files, read as the processor beside a model's weights says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.models.load import located
from sinkscope.tokens.features import READS

#: How names of image files end.
ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def processed(name: str, reads: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """Read image files through a model's own processor, whose `preprocessor_config.json` lies beside its weights.

    Args:
        name: the model, as :func:`load_model` takes it.
        reads: what it reads, as Hugging Face calls it.
        files: label -> image.

    Returns:
        Label -> what `measure` takes.

    Raises:
        SinkscopeError: a model that reads no images, or has no processor; Pillow is not installed; a file is no image.
    """
    if READS.get(reads, ("text",))[0] != "image":
        raise SinkscopeError(f"{next(iter(files))!r} is an image, and {name} reads {reads}: give it what it reads")
    try:
        from PIL import Image
    except ImportError:
        raise SinkscopeError("image files are read by Pillow, which is not installed: pip install pillow") from None
    from transformers import AutoImageProcessor

    where = located(name)
    try:
        processor = AutoImageProcessor.from_pretrained(where.location, revision=where.revision, trust_remote_code=False)
    except Exception as error:  # whatever the loaders raise
        raise SinkscopeError(
            f"{name} has no image processor that loads ({type(error).__name__}; it is described by a "
            f"preprocessor_config.json): in Python, ss.measure(model, {{{reads!r}: ...}}) takes images as numbers"
        ) from None
    found: dict[str, Any] = {}
    for label, path in files.items():
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB")
        except Exception as error:  # OSError, and what damage makes Pillow raise
            raise SinkscopeError(f"can't read the image {str(path)!r}: {error}") from None
        found[label] = {reads: processor(pixels, return_tensors="pt")[reads]}
    return found
