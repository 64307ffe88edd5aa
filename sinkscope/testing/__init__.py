"""For tests, yours and ours: tiny models of every family, a model with a planted sink, and checks for metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sinkscope.block import Block, PatternRows
from sinkscope.errors import SinkscopeError
from sinkscope.metrics import resolve
from sinkscope.metrics.accumulate import accumulator
from sinkscope.metrics.base import AnyMetric, Array, Metric
from sinkscope.models import bridge, wrapped
from sinkscope.testing.cache import CacheCheck, check_cache
from sinkscope.testing.families import ENCODER_DECODERS, FAMILIES, tiny_hf_model, tiny_tokenizer
from sinkscope.testing.senses import SENSES, tiny_inputs

__all__ = [
    "ENCODER_DECODERS",
    "FAMILIES",
    "SENSES",
    "CacheCheck",
    "check_cache",
    "check_metric",
    "planted_sink",
    "tiny_hf_model",
    "tiny_inputs",
    "tiny_model",
    "tiny_tokenizer",
]

#: Scores of the planted sink, `[layer][head]`, unless others are asked for: from no sink at all to a strong one.
SCORES = ((0.0, 1.0, 2.0, 3.0), (4.0, 5.0, 6.0, 7.0))


def tiny_model(family: str = "llama", seed: int = 0) -> Any:
    """Build a TransformerBridge on a tiny random model, offline, with a tokenizer of one token per character.

    Of an encoder of images or of sound that TransformerLens does not know, it is Hugging Face's model, as of `load_model`.

    Args:
        family: one of `FAMILIES`, `ENCODER_DECODERS` or `SENSES`, or an architecture of TransformerLens's registry, such as
            `"Qwen2ForCausalLM"`.
        seed: of the weights.

    Raises:
        SinkscopeError: there is no such family; the message lists them.
    """
    return wrapped(tiny_hf_model(family, seed), tiny_tokenizer(family), f"tiny-{family}")


def planted_sink(scores: Sequence[Sequence[float]] = SCORES) -> Any:
    """Build a GPT-2 whose attention is known in advance: BOS gets score c, every other key 0.

    So query i pays exp(c) / (exp(c) + i) to a BOS at position 0, whatever the text, and 1 / i to each other key. The
    heads write nothing into the residual stream.

    Args:
        scores: c of every head, `[layer][head]`.

    Returns:
        A TransformerBridge with the tokenizer of :func:`tiny_model`.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, heads, d_head = len(scores), len(scores[0]), 8
    width = heads * d_head
    config = GPT2Config(
        vocab_size=64,
        n_positions=1024,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        bos_token_id=1,
        eos_token_id=2,
        layer_norm_epsilon=1e-12,
        architectures=["GPT2LMHeadModel"],
    )
    model = GPT2LMHeadModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    mark = torch.zeros(width)  # BOS's direction: mean 0, variance 1, so that LayerNorm leaves it alone
    mark[0], mark[1] = (width / 2) ** 0.5, -((width / 2) ** 0.5)
    words = torch.randn(64, width, generator=generator)
    words[:, :2] = 0
    words[:, 2:] -= words[:, 2:].mean(1, keepdim=True)
    words *= width**0.5 / words.norm(dim=1, keepdim=True)
    words[1] = mark
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(words)
        model.transformer.ln_f.weight.fill_(1.0)
        for layer, block in enumerate(model.transformer.h):
            block.ln_1.weight.fill_(1.0)
            for head, score in enumerate(scores[layer]):
                first = head * d_head
                block.attn.c_attn.bias[first] = d_head**0.5  # every query is the same unit vector, times sqrt(d_head)
                block.attn.c_attn.weight[:, width + first] = score * mark / width  # BOS's key is c, any other 0
    return bridge(model, tiny_tokenizer(), "planted-sink")


def check_metric(metric: str | AnyMetric | Callable[[Block], Tensor], *, seed: int = 0) -> None:
    """Check that anybody's metric keeps the contract of a block metric, on random attention; no model is needed.

    It must return `[batch, head, query]` or `[batch, head, query, key]`, give finite numbers, leave the block as it was,
    and give the same means however rows are split into blocks and sequences into batches, pads or none.

    Raises:
        SinkscopeError: it does not; says what differs.

    >>> check_metric("sink_mass")
    >>> check_metric(lambda block: block.pattern[0])
    Traceback (most recent call last):
    ...
    sinkscope.errors.SinkscopeError: a lambda has no name: write ss.metric(needs=..., name='my_metric')(lambda block: ...)
    """
    (checked,) = resolve([metric])
    if not isinstance(checked, Metric):
        raise SinkscopeError(f"{checked.name!r} is made from other metrics; check those")
    for causal in (True, False):
        whole = _means(checked, (5, 9), None, causal, seed)
        again = _means(checked, (5, 9), None, causal, seed)
        _same(checked, whole, again, "run twice")
        if checked.group <= {"mass", "pattern"}:
            for rows in (1, 4):
                _same(checked, whole, _means(checked, (5, 9), rows, causal, seed), f"split into blocks of {rows} rows")
        for index, alone in enumerate((5, 9)):
            one = _means(checked, (5, 9), None, causal, seed, only=index)
            _same(
                checked,
                whole[index : index + 1, ..., : one.shape[-1]] if whole.ndim == 3 else whole[index : index + 1],
                one,
                f"run alone ({alone} tokens) instead of in a padded batch",
            )


def _means(
    metric: Metric, lengths: tuple[int, ...], rows: int | None, causal: bool, seed: int, only: int | None = None
) -> Array:
    """Means of a metric over synthetic attention, whose pads hold nonsense."""
    generator = torch.Generator().manual_seed(seed)
    heads, longest = 2, max(lengths)
    scores = torch.randn(len(lengths), heads, longest, longest, generator=generator) * 2
    real = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
    seen = real[:, None, None, :].expand_as(scores)
    if causal:
        seen = seen & torch.ones(longest, longest, dtype=torch.bool).tril()
    pattern = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    of_heads = ("query", "key", "rotated_query", "rotated_key", "value", "output", "gate")
    shapes = dict.fromkeys(of_heads, (longest, heads, 8))
    activations = {
        need: torch.randn(len(lengths), *shapes.get(need, (longest, 16)), generator=generator)
        for need in sorted(metric.group - {"mass", "pattern"})
    }
    if only is not None:
        t = lengths[only]
        pattern, lengths = pattern[only : only + 1, :, :t, :t], (t,)
        activations = {name: value[only : only + 1, :t] for name, value in activations.items()}
        longest = t
    mean = accumulator(metric)
    step = rows or longest
    for start in range(0, longest, step):
        stop = min(start + step, longest)
        held = pattern[:, :, start:stop, : stop if causal else longest]
        before = held.clone()
        mean.update(
            Block(
                layer=0,
                start=start,
                rows=PatternRows(held),
                n_queries=stop - start,
                lengths=torch.tensor(lengths),
                keys=torch.zeros(len(lengths), dtype=torch.long),
                causal=causal,
                tokens=torch.zeros(len(lengths), longest, dtype=torch.long),
                activations=activations,
            )
        )
        if not torch.equal(before, held):
            raise SinkscopeError(f"metric {metric.name!r} changes the block's pattern: work on a copy")
    result = np.asarray(mean.mean()[0])
    if np.isinf(result).any() or (np.isnan(result).any() and not metric.per_query):  # there NaN marks rows that do not count
        raise SinkscopeError(f"metric {metric.name!r} gives NaN or infinity on ordinary attention")
    return result


def _same(metric: Metric, a: Array, b: Array, how: str) -> None:
    if a.shape != b.shape or not np.allclose(a, b, atol=1e-6, rtol=1e-5, equal_nan=True):
        raise SinkscopeError(f"metric {metric.name!r} gives other numbers when {how}: {a.ravel()[:4]} and {b.ravel()[:4]}")
