"""Numbers of any type: whole ones as arguments, arrays of them as tensors."""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError


def whole_number(given: Any, name: str, wanted: str = "a whole number") -> int:
    """Take a whole number of any type, NumPy's and PyTorch's included.

    Raises:
        SinkscopeError: it is none; True and False are none.
    """
    try:
        if not isinstance(given, bool) and "bool" not in str(getattr(given, "dtype", "")):
            return operator.index(given)
    except Exception:  # whatever tensors of several numbers, or of none, raise
        pass
    raise SinkscopeError(f"{name}={given!r}: give {wanted}")


def at_most(max_tokens: SupportsIndex | None) -> int | None:
    """Take how many tokens of each text are kept, or None for all.

    Raises:
        SinkscopeError: no whole number, or less than two.
    """
    most = None if max_tokens is None else whole_number(max_tokens, "max_tokens")
    if most is not None and most < 2:
        raise SinkscopeError(f"max_tokens={most}: at least 2 tokens are needed to look at attention")
    return most


def tensor_of(values: Any) -> Tensor:
    """Make a tensor of numbers in any form; what may not be written to is copied, as PyTorch wants it."""
    if isinstance(values, np.ndarray | pd.Series | pd.Index):
        values = np.require(np.asarray(values), requirements="W")
    return torch.as_tensor(values)
