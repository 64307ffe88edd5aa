"""What Hugging Face's modules are told of who sees whom: causal, a sliding window, or the padding of keys; nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sinkscope.block import in_reach
from sinkscope.capture.place import check_begins
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.models.versions import with_sizes

#: Said of a mask.
NEITHER = "its attention mask is neither causal, nor a sliding window, nor the padding of an encoder"
#: Said of a cache with room for tokens to come.
STATIC = "its cache holds more keys than there are tokens: use a dynamic one (transformers.DynamicCache(), not a static one)"


class OtherwiseError(SinkscopeError):
    """A model attends otherwise than its configuration says: no engine would know which keys a query sees."""

    def __init__(self, how: str) -> None:
        super().__init__(f"the model does not attend as its configuration says: {how}")


@dataclass(frozen=True)
class Masks:
    """Stands for Hugging Face's mask function: causal masks need no tensor, an encoder's needs one row of keys.

    Of text with images in it, which may see themselves both ways, it is the whole mask (`mixed` tells).
    An encoder-decoder asks for both (`either`), and for its cross-attention, where there may be fewer keys or more. Where
    others run the model (`live`), a cache may hold keys before the queries' own. Where an indexer chooses keys (`indexed`),
    it looks at the mask, which then must be a tensor. Where keys stand for several tokens (`compressed`), the module puts
    behind the mask who sees which: nothing need stand before.
    """

    causal: bool
    live: bool = False
    either: bool = False
    indexed: bool = False
    compressed: bool = False
    mixed: Callable[[], bool] = bool

    @classmethod
    def of(cls, adapter: Adapter, live: bool = False) -> Masks:
        """Give those of a model."""
        by_itself = hasattr(adapter.config, "decoder_layers")  # BART's decoder: asks for the mask of a source it has not
        either = adapter.side is not None or (adapter.causal and by_itself)
        indexed, compressed = adapter.chosen is not None, adapter.compressed
        return cls(adapter.causal, live, either, indexed, compressed, lambda: adapter.mixed is not None)

    def __call__(
        self,
        *args: Any,
        **given: Any,
    ) -> Tensor | None:
        """Give the mask that the model's attention modules will be handed.

        Raises:
            OtherwiseError: the mask asked for is not causal, a sliding window, or the padding of an encoder.
            SinkscopeError: it can't be told.
        """
        return self._mask(*args, **with_sizes(given))

    def _mask(
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
        if mask_function is not None and self.mixed():
            rows, keys = (torch.arange(n, device=extra.get("device")) for n in (q_length, kv_length))
            return torch.as_tensor(mask_function(keys.new_zeros(()), keys.new_zeros(()), rows[:, None], keys))[None, None]
        more = kv_offset + kv_length - q_offset - q_length if self.live else kv_length - q_length
        last, static = more == 0, self.live and more > 0
        if not args and not use_vmap and mask_function is not None and (last or self.either):
            rows = torch.tensor(sorted({0, q_length // 2, q_length - 1}))[:, None] + int(q_offset)
            keys = torch.arange(kv_length) + kv_offset
            nothing = torch.zeros((), dtype=torch.long)
            seen = torch.as_tensor(mask_function(nothing, nothing, rows, keys)).expand(len(rows), kv_length)
            later = q_offset - kv_offset + 1  # the key after the first query's own
            causal = last and not (later < kv_length and bool(seen[0, later])) if self.either else self.causal
            expected = (keys <= rows) if causal else torch.ones_like(seen)
            if local_size is not None:
                gap = rows - keys
                expected = expected & ((gap < local_size) if causal else (gap.abs() <= local_size))
            if not torch.equal(seen, expected):
                raise SinkscopeError(STATIC) if static else OtherwiseError(NEITHER)
            if causal and self.live and attention_mask is not None:
                check_begins(attention_mask)
            if causal and self.compressed:
                return torch.zeros(extra.get("batch_size", 1), 1, q_length, 0, device=extra.get("device"))
            if causal and self.indexed:
                return _causal(q_offset, q_length, kv_offset, kv_length, extra.get("device"))
            if causal or attention_mask is None or bool(attention_mask.all()):
                return None
            return attention_mask[:, None, None, :].bool()
        raise SinkscopeError(STATIC if static else NEITHER)


def _causal(q_offset: int, q_length: int, kv_offset: int, kv_length: int, device: Any) -> Tensor:
    rows = torch.arange(q_length, device=device)[:, None] + q_offset
    return (torch.arange(kv_length, device=device) + kv_offset <= rows)[None, None]


def check_seen(found: Tensor | None, ends: Tensor, window: int | None, layer: int) -> Tensor:
    """See to it that queries of text with images in it see the keys before their ends that are in the window, no others.

    Args:
        found: who sees whom, `[query, key]`, as the model has it.
        ends: the key after the last that each query sees, `[query]`.
        window: of the layer.
        layer: for the error.

    Returns:
        The same as it must be.

    Raises:
        OtherwiseError: it is not.
    """
    keys = torch.arange(len(ends), device=ends.device)
    seen = keys < ends[:, None]
    if window is not None:  # later keys are always in reach
        seen = seen & in_reach(torch.maximum(keys[:, None], keys), keys, window)
    if found is None or not torch.equal(found.to(seen.device), seen):
        raise OtherwiseError(
            f"with images among its tokens, queries of layer {layer} see other keys than was thought. Reduce what Hugging "
            "Face's own gives with output_attentions=True: ss.metrics.of_pattern(attentions, causal=False)"
        )
    return seen
