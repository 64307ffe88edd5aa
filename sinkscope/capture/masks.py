"""What Hugging Face's modules are told of who sees whom: causal, a sliding window, or an encoder's padding; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.errors import SinkscopeError

#: Said of a mask.
NEITHER = "its attention mask is neither causal, nor a sliding window, nor the padding of an encoder"


class OtherwiseError(SinkscopeError):
    """A model attends otherwise than its configuration says: no engine would know which keys a query sees."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the model does not attend as its configuration says: {how}")


@dataclass(frozen=True)
class Masks:
    """Stands for Hugging Face's mask function: causal masks need no tensor, an encoder's needs one row of keys."""

    causal: bool
    #: Told (keys before the first, keys, the layers' window) at every call.
    told: Callable[[int, int, int | None], None] | None = None

    def __call__(
        self,
        *args: Any,
        q_length: int = 0,
        kv_length: int = -1,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        attention_mask: Tensor | None = None,
        local_size: int | None = None,
        use_vmap: bool = False,
        **extra: Any,
    ) -> Tensor | None:
        """Give the mask that the model's attention modules will be handed.

        Raises:
            OtherwiseError: the mask asked for is not causal, a sliding window, or the padding of an encoder.
            SinkscopeError: it can't be told.
        """
        whole = q_length == kv_length if self.told is None else q_offset + q_length == kv_offset + kv_length
        if not args and not use_vmap and mask_function is not None and whole:
            rows = torch.tensor(sorted({0, q_length // 2, q_length - 1}))[:, None] + int(q_offset)
            keys = torch.arange(kv_length) + kv_offset
            nothing = torch.zeros((), dtype=torch.long)
            seen = torch.as_tensor(mask_function(nothing, nothing, rows, keys)).expand(len(rows), kv_length)
            expected = (keys <= rows) if self.causal else torch.ones_like(seen)
            if local_size is not None:
                expected = expected & (rows - keys < local_size)
            if not torch.equal(seen, expected) or not (self.causal or local_size is None):
                raise OtherwiseError(NEITHER)
            if self.told is not None:
                self.told(kv_offset, kv_length, local_size)
            if self.causal or attention_mask is None or bool(attention_mask.all()):
                return None
            return attention_mask[:, None, None, :].bool()
        raise SinkscopeError(NEITHER)
