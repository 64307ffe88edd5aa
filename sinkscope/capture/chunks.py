"""Whether to run the `hooks` engine in chunks: only with a KV cache that has been proved right on this model."""

from __future__ import annotations

import torch
from torch import Tensor

from sinkscope.block import Block
from sinkscope.capture.blocks import ATTENTION
from sinkscope.capture.engine import Capture
from sinkscope.capture.hooks import hooks
from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import surely
from sinkscope.tokens import Batch, TextTokens, Tokens, whole_number

#: A cache is wrong when patterns differ by this much: broken ones miss by 0.1 and more, float32 rounding by 1e-5.
WRONG = 5e-3
#: Query rows per step of an automatic chunked prefill, and the length from which it pays.
CHUNK, LONG = 128, 1024


def plan(adapter: Adapter, groups: frozenset[frozenset[str]], chunk: int | str | None, tokens: Tokens) -> Capture:
    """Decide between one shot and chunked prefill, and say why.

    Raises:
        SinkscopeError: `chunk` is not a positive number, or this model or these metrics can't run in chunks.
    """
    longest = max(len(s) for s in tokens.sequences)
    if chunk is None:
        return hooks(adapter, groups, "hooks on attn.hook_pattern, one shot")
    if chunk != "auto":
        chunk = whole_number(chunk, "chunk", "a number of query rows (such as 256), None, or 'auto'")
        if chunk < 1:
            raise SinkscopeError(f"chunk={chunk!r}: give a number of query rows (such as 256), None, or 'auto'")
    if chunk == "auto" and longest < LONG:
        return hooks(adapter, groups, f"hooks on attn.hook_pattern, one shot (under {LONG} tokens)")
    extra = sorted(set().union(*groups) - ATTENTION)
    why_not = f"a metric needs {extra[0]}" if extra else why_cache_is_wrong(adapter, tokens)
    if why_not is None:
        size = CHUNK if chunk == "auto" else int(chunk)
        why = f"hooks on attn.hook_pattern, chunked prefill of {size} rows (KV cache proved right on this model)"
        return hooks(adapter, groups, why, size)
    if chunk == "auto":
        return hooks(adapter, groups, f"hooks on attn.hook_pattern, one shot ({why_not})")
    raise SinkscopeError(f"chunk={chunk} can't be used: {why_not}. Leave it out, or pass chunk=None.")


def why_cache_is_wrong(adapter: Adapter, tokens: Tokens) -> str | None:
    """Prove the KV cache on the first tokens of the longest text: chunks must give the one-shot patterns.

    TransformerLens's bridge has had caches that fail silently (each chunk attends to itself alone), so none is trusted
    without this. The proof runs past a sliding window where the layer has one that is short enough.
    """
    if any(s.mixed for s in tokens.sequences):
        return "text with images or sound in it is run in one shot"
    why = adapter.why_no_cache(max(len(s) for s in tokens.sequences))
    if why is not None:
        return why
    sequence = max(tokens.sequences, key=len)
    needed = 16 + max(adapter.windows.values(), default=32)
    if needed > min(512, len(sequence)) and len(sequence) > min(adapter.windows.values(), default=len(sequence)):
        return f"its KV cache can't be proved past a sliding window of {needed - 16} on {min(512, len(sequence))} tokens"
    ids = sequence.ids[: min(needed, len(sequence))]
    small = Tokens((TextTokens(sequence.label, ids, sequence.strings[: len(ids)]),), tokens.bos)
    batch = next(small.batches(1, adapter.device))
    one, many = _patterns(adapter, batch, None), _patterns(adapter, batch, max(1, len(ids) // 3))
    if isinstance(many, str):
        return many
    if isinstance(one, str):
        return one
    gaps = [(a - b).abs() for a, b in zip(one, many, strict=True)]
    worst, typical = max(float(g.max()) for g in gaps), max(float(g.mean()) for g in gaps)
    if worst < WRONG and typical < WRONG / 100:
        return None
    return f"its KV cache is wrong with transformers {adapter.describe()['transformers']}: patterns differ by {worst:.2g}"


def _patterns(adapter: Adapter, batch: Batch, chunk: int | None) -> list[Tensor] | str:
    """Collect whole patterns of a very short text, layer by layer; a string says why that failed."""
    whole: dict[int, Tensor] = {}
    t = batch.ids.shape[1]

    def keep(block: Block, group: frozenset[str]) -> None:
        pattern = block.pattern
        into = whole.setdefault(block.layer, torch.zeros(*pattern.shape[:2], t, t, device=pattern.device))
        into[:, :, block.start : block.start + block.n_queries, : pattern.shape[3]] = pattern

    try:
        with surely(hooks(adapter, frozenset({frozenset({"pattern"})}), "proof", chunk)) as capture:
            capture.run(batch, keep, lambda: None)
    except InertHookError:
        raise
    except (SinkscopeError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"its KV cache does not work here ({type(error).__name__}: {str(error)[:120]})"
    return [whole[layer] for layer in sorted(whole)]
