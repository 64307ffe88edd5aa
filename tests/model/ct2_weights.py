"""The weights in a CTranslate2 file, read without its package; and those of a Whisper, as Hugging Face has them.

A file is: its version; the model's name and revision; how many variables there are, and of each its name, its shape, its
type and its bytes; then which other names stand for some of them. Numbers are little-endian, text has its length first and a
zero at its end. Of attention, queries, keys and values (of cross-attention, keys and values) are one matrix, below each
other.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

#: Types by their number in the file.
TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
VERSION = 6


def read(path: Path) -> dict[str, np.ndarray]:
    """Give the arrays by name, aliases included."""
    data = memoryview(path.read_bytes())
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return int(found)

    def text() -> str:
        nonlocal at
        size = number("H")
        found, at = bytes(data[at : at + size]), at + size
        return found.rstrip(b"\0").decode()

    version = number("I")
    assert version == VERSION, version
    assert text() == "WhisperSpec"
    number("I")  # the revision
    arrays: dict[str, np.ndarray] = {}
    for _ in range(number("I")):
        name, rank = text(), number("B")
        shape = [number("I") for _ in range(rank)]
        kind, size = np.dtype(TYPES[number("B")]), number("I")
        arrays[name] = np.frombuffer(data[at : at + size], kind).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias = text()
        arrays[alias] = arrays[text()]
    assert at == len(data), "there is more in the file"
    return arrays


def _parts(array: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Cut what is stacked."""
    return dict(zip(names, np.split(array, len(names)), strict=True))


def whisper(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give a Whisper's weights under Hugging Face's names, in float32.

    Keys have no bias in Hugging Face's: that it is zero in the file is seen to.
    """
    found: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        half, _, rest = name.partition("/")
        if half not in ("encoder", "decoder") or not array.ndim or rest.startswith("projection"):
            continue  # numbers of heads, switches; the output layer, which is the embedding
        into, kind = _place(rest)
        if isinstance(into, str):
            found[f"model.{half}.{into}.{kind}"] = array
            continue
        for part, values in _parts(array, into).items():
            if part.endswith("k_proj") and kind == "bias":
                assert not values.any(), "keys have a bias"
            else:
                found[f"model.{half}.{part}.{kind}"] = values
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}


_TOP = {
    **{"conv1": "conv1", "conv2": "conv2", "layer_norm": "layer_norm", "embeddings": "embed_tokens"},
    "position_encodings": "embed_positions",
}
_KIND = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias", "encodings": "weight"}


def _place(rest: str) -> tuple[Any, str]:
    """Give the module of a variable, or the modules of which it is a stack, and whether it is their weight or their bias."""
    *path, last = rest.split("/")
    kind = _KIND[last]
    if path[0] in _TOP:
        return _TOP[path[0]], kind
    start = f"layers.{path[0].removeprefix('layer_')}"
    which, inner = path[1], path[2]
    if which == "ffn":
        return f"{start}.{ {'layer_norm': 'final_layer_norm', 'linear_0': 'fc1', 'linear_1': 'fc2'}[inner] }", kind
    attention = {"self_attention": "self_attn", "attention": "encoder_attn"}[which]
    if inner == "layer_norm":
        return f"{start}.{attention}_layer_norm", kind
    crossed = which == "attention"
    stacks = ["q", "kv", "out"] if crossed else ["qkv", "out"]
    names = stacks[int(inner.removeprefix("linear_"))]
    if names == "out":
        return f"{start}.{attention}.out_proj", kind
    return [f"{start}.{attention}.{one}_proj" for one in names], kind
