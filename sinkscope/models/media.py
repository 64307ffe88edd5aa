"""Files of images and of sound, read as the processor beside a model's weights says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sinkscope.errors import SinkscopeError
from sinkscope.models.load import located
from sinkscope.tokens.features import READS

#: How names of files end, by what is in them.
ENDINGS = {
    "image": frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}),
    "sound": frozenset({".wav"}),
}


def kind_of(path: Path) -> str | None:
    """Tell by its name what is in a file: `image`, `sound` or neither."""
    return next((kind for kind, endings in ENDINGS.items() if path.suffix.lower() in endings), None)


def processed(name: str, reads: str, files: Mapping[str, Path]) -> dict[str, Any]:
    """Read files through a model's own processor, whose `preprocessor_config.json` lies beside its weights.

    Args:
        name: the model, as :func:`load_model` takes it.
        reads: what it reads, as Hugging Face calls it.
        files: label -> image or sound.

    Returns:
        Label -> what `measure` takes.

    Raises:
        SinkscopeError: a model that reads something else, or has no processor; Pillow is not installed; a damaged file.
    """
    kind = READS.get(reads, ("text",))[0]
    for label, path in files.items():
        if kind_of(path) != kind:
            raise SinkscopeError(f"{label!r} is of {kind_of(path)}, and {name} reads {reads}: give it what it reads")
    processor = _processor(name, reads, kind)
    read = _pixels if kind == "image" else _wave(processor)
    found: dict[str, Any] = {}
    for label, path in files.items():
        try:
            given, how = read(path)
        except SinkscopeError:
            raise
        except Exception as error:  # OSError, and what damage makes Pillow and SciPy raise
            raise SinkscopeError(f"can't read the {kind} {str(path)!r}: {error}") from None
        found[label] = {reads: processor(given, return_tensors="pt", **how)[reads]}
    return found


def _processor(name: str, reads: str, kind: str) -> Any:
    """Load what turns files into numbers.

    Raises:
        SinkscopeError: there is none.
    """
    import transformers

    where, loader = located(name), transformers.AutoFeatureExtractor
    if kind == "image":
        loader = transformers.AutoImageProcessor
    try:
        return loader.from_pretrained(where.location, revision=where.revision, trust_remote_code=False)
    except Exception as error:  # whatever the loaders raise
        raise SinkscopeError(
            f"{name} has no {kind} processor that loads ({type(error).__name__}; it is described by a "
            f"preprocessor_config.json): in Python, ss.measure(model, {{{reads!r}: ...}}) takes numbers"
        ) from None


def _pixels(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read an image.

    Raises:
        SinkscopeError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise SinkscopeError("image files are read by Pillow, which is not installed: pip install pillow") from None
    with Image.open(path) as image:
        return image.convert("RGB"), {}


def _wave(processor: Any) -> Callable[[Path], tuple[Any, dict[str, Any]]]:
    """Give what reads a sound at the rate that the processor takes, its channels averaged, from -1 to 1."""
    rate = int(processor.sampling_rate)

    def read(path: Path) -> tuple[Any, dict[str, Any]]:
        from scipy.io import wavfile
        from scipy.signal import resample_poly

        found, samples = wavfile.read(path)
        wave = samples.reshape(len(samples), -1).mean(1)
        if samples.dtype.kind in "iu":
            info = np.iinfo(samples.dtype)
            wave = (wave - (info.max + info.min + 1) / 2) / ((info.max - info.min + 1) / 2)
        both = math.gcd(found, rate)
        return resample_poly(wave, rate // both, found // both).astype(np.float32), {"sampling_rate": rate}

    return read
