"""Many shares as few bytes: a logarithm in 8 or 16 bits, in base64, which a page can hold by the hundred thousand."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np

#: Bits -> the least share that is told from 0.
FLOOR = {8: 1e-4, 16: 1e-7}


def pack(values: Any, bits: int) -> dict[str, Any]:
    """Quantise shares from 0 to 1.

    Args:
        values: any shape; NaN stays unknown, what lies above 1 becomes 1.
        bits: 8 keeps a share within 2%, 16 within 0.02%.

    Returns:
        `bits`, `floor`, `shape`, and `data`: little-endian unsigned integers in base64, rows first. 0 is below the floor, the
        largest integer is unknown, and `q` between them is `floor ** (1 - (q - 1) / (2 ** bits - 3))`.

    >>> pack([0.0, 1.0, 0.1], 8)["shape"], unpack(pack([0.0, 1.0, 0.1], 8)).round(2).tolist()
    ([3], [0.0, 1.0, 0.1])
    """
    shares, floor, steps = np.asarray(values, dtype=float), FLOOR[bits], 2**bits - 3
    known = np.nan_to_num(shares, nan=1.0).clip(floor, 1.0)
    whole = np.rint(steps * (1 - np.log(known) / math.log(floor))) + 1
    whole[shares < floor] = 0
    whole[np.isnan(shares)] = 2**bits - 1
    data = base64.b64encode(whole.astype(f"<u{bits // 8}").tobytes()).decode("ascii")
    return {"bits": bits, "floor": floor, "shape": list(shares.shape), "data": data}


def unpack(packed: dict[str, Any]) -> np.ndarray:
    """Give the numbers back, as the page reads them."""
    bits, floor = packed["bits"], packed["floor"]
    whole = np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{bits // 8}").astype(float)
    shares = np.where(whole == 0, 0.0, floor ** (1 - (whole - 1) / (2**bits - 3)))
    shares[whole == 2**bits - 1] = np.nan
    return shares.reshape(packed["shape"])
