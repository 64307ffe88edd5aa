"""Weights converted from GGUF, kept for the next time: to dequantise them is most of what loading takes.

They lie in the user's cache directory, as safetensors, under a name made of the file's digest, the dtype and the version of
transformers. `SINKSCOPE_CACHE` names another directory; set to nothing, nothing is kept.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from sinkscope.errors import SinkscopeError

#: What is larger is not kept, in bytes: a copy of a large model would surprise whoever pays for the disk.
LARGEST = 2_000_000_000
#: Written last: the digest of each of the other files, and the stamp that the file had then.
SEAL = "digests.json"


def place(file: Path, dtype: torch.dtype) -> Path | None:
    """Give the directory where a file's conversion is kept, or would be; None where nothing is to be kept."""
    where = os.environ.get("SINKSCOPE_CACHE")
    if where == "":
        return None
    if where is None:
        from platformdirs import user_cache_path

        where = str(user_cache_path("sinkscope", appauthor=False))
    name = f"{_digest(file)[:32]}-{str(dtype).removeprefix('torch.')}-transformers-{transformers.__version__}"
    return Path(where).expanduser() / "converted" / name


def whole(place: Path | None) -> bool:
    """Say whether something is kept there, and every file is what was written: by its stamp, or else by its digest."""
    try:
        if place is None or place.is_symlink():
            return False
        sealed = json.loads((place / SEAL).read_text())
        there = {path.name: path for path in place.iterdir() if path.name != SEAL}
        return there.keys() == sealed.keys() and all(
            _stamp(there[name]) == stamp or _digest(there[name]) == digest for name, (digest, stamp) in sealed.items()
        )
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def keep(place: Path | None, network: Any, tokenizer: Any) -> None:
    """Keep a model as it was loaded: written beside, then moved into place; where that can't be, nothing is kept."""
    if place is None or sum(p.numel() * p.element_size() for p in network.parameters()) > LARGEST:
        return
    with suppress(Exception):  # whatever the writers raise on a full disk, the model is loaded all the same
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix="half-") as folder:
            half = Path(folder) / place.name
            half.mkdir()
            _save(network, half)
            if tokenizer is not None:
                tokenizer.save_pretrained(half)
            for path in half.iterdir():  # so that no crash leaves less than its stamp says
                with path.open("r+b") as written:
                    os.fsync(written.fileno())
            (half / SEAL).write_text(json.dumps({path.name: [_digest(path), _stamp(path)] for path in half.iterdir()}))
            if not whole(place):  # another process may have been faster
                if place.is_dir() and not place.is_symlink():
                    shutil.rmtree(place)
                half.replace(place)


def check_size(path: str, kind: Any, config: Any) -> None:
    """See to it that a GGUF file can hold the model that its header names: who believes a damaged one fills the memory.

    Raises:
        SinkscopeError: there are fewer tensors than layers, or less than a bit for each weight.
    """
    import gguf

    there, layers = len(gguf.GGUFReader(path).tensors), getattr(config, "num_hidden_layers", 1)
    if layers > there:
        raise SinkscopeError(f"its header names {layers:,} layers, and there are {there} tensors")
    build = getattr(kind, "from_config", None) or kind._from_config  # of an Auto class, and of a model's
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in build(config).parameters())
    if weights > 8 * (size := Path(path).stat().st_size):
        raise SinkscopeError(f"its header names a model of {weights:,} weights, and it holds {size:,} bytes")


def _save(network: Any, where: Path) -> None:
    """Write config and weights; `save_pretrained` refuses what came from GGUF, although its weights are plain numbers now."""
    config = copy.deepcopy(network.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(where)
    tied = set(getattr(network, "_tied_weights_keys", None) or ())
    weights = sorted(network.state_dict().items(), key=lambda item: item[0] not in tied)
    kept = {weight.data_ptr() or name: name for name, weight in weights}  # the one name of a weight that is not tied
    held = {name: weight.contiguous() for name, weight in weights if kept[weight.data_ptr() or name] == name}
    save_file(held, str(where / "model.safetensors"), metadata={"format": "pt"})


def _stamp(file: Path) -> list[int]:
    """Give what changes with every write into a file, or in its place: half a gigabyte needs not be read to see it."""
    now = file.stat()
    return [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
