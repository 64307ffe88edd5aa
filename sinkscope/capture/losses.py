"""The loss of every next token under the unedited model, some logits at a time."""

from __future__ import annotations

from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from sinkscope.capture.hooks import dropping_patterns
from sinkscope.capture.proof import tolerance
from sinkscope.capture.scored import rows_at_a_time
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.tokens import Batch, Tokens


def check_logits(adapter: Adapter, tokens: Tokens) -> int:
    """Prove on a few tokens that unembedding the last hidden state gives the model's own logits; give how many there are.

    Raises:
        SinkscopeError: it does not, or the model predicts no next token.
    """
    if not adapter.predicts:
        raise SinkscopeError(f"{adapter.name} is an encoder, which predicts no next token whose loss could be taken")
    ids, adapter = tokens.sequences[0].ids[None, :8].to(adapter.device), adapter.beside(tokens.sequences[0])
    with adapter.quiet(), dropping_patterns(adapter):
        own = adapter.own_logits(ids)
        hidden = adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))[0]
        bound = tolerance(adapter) * max(1.0, float(own.abs().max()))
        gap = float((own - adapter.logits(hidden)).abs().max())
        if not gap < bound and adapter.kind != "hooked_transformer" and adapter.side is None:
            adapter.take_whole_head()
            with suppress(TypeError, ValueError, RuntimeError, AttributeError):  # of a head that asks for more than states
                gap = float((own - adapter.logits(hidden)).abs().max())
    if not gap < bound:
        raise SinkscopeError(
            f"the logits of {adapter.name} are not those of its last hidden states (they differ by {gap:.2g})"
        )
    return own.shape[-1]


def next_losses(adapter: Adapter, batch: Batch, chunk: int | None = None) -> Float[Tensor, "batch position"]:
    """Give each position the loss of its next token in nats; NaN at the last token, at pads, and where an image is next.

    Args:
        adapter: a decoder.
        batch: the texts.
        chunk: tokens per step of a chunked prefill; None for one shot.
    """
    found = torch.full(batch.ids.shape, torch.nan)
    length = batch.ids.shape[1]
    step = chunk or length
    with adapter.quiet(), dropping_patterns(adapter):
        cache = adapter.new_cache(len(batch.sequences)) if chunk else None
        for start in range(0, length, step):
            stop = min(start + step, length)
            hidden = adapter.body(batch.ids[:, start:stop], batch.valid[:, start:stop], cache, **batch.beside)
            for row, text in enumerate(batch.lengths.tolist()):
                here = torch.arange(start, max(start, min(stop, text - 1)))  # none, where the text has ended before
                size = 1
                while len(here):
                    now, here = here[:size], here[size:]
                    logits = adapter.logits(hidden[row, (now - start).to(hidden.device)])
                    size = rows_at_a_time(logits.shape[-1], 1)  # the vocabulary is known once one token has been unembedded
                    truth = batch.ids[row, (now + 1).to(batch.ids.device)].to(logits.device)
                    found[row, now] = cross_entropy(logits, truth, reduction="none").cpu()
    for row, mixed in enumerate(s.mixed for s in batch.sequences):
        if mixed is not None:
            found[row, : len(mixed.placed) - 1][mixed.placed[1:]] = torch.nan
    return found
