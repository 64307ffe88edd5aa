"""The observing verb: texts -> tokens -> blocks -> metric accumulators -> SinkReport."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any, SupportsIndex

from torch import Tensor

from sinkscope.capture import Capture
from sinkscope.capture.cached import is_cache
from sinkscope.errors import SinkscopeError
from sinkscope.metrics import base_of, resolve
from sinkscope.metrics.base import AnyMetric
from sinkscope.metrics.catalogue import Asked
from sinkscope.metrics.observer import Finish, Key, Observer, countable, keys_of
from sinkscope.models import adapt_side
from sinkscope.observing import PER_TEXT, Observing
from sinkscope.reports.sink import SinkReport
from sinkscope.results import TextResult
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.progress import bar
from sinkscope.runs.resume import Finished, Running, Store, claimed
from sinkscope.runs.share import Share
from sinkscope.tokens import Batch, TextTokens, at_most, whole_number
from sinkscope.where import Rule, as_rule


def measure(
    model: Any,
    texts: Any,
    metrics: Asked | Iterable[Asked] | None = None,
    *,
    key: SupportsIndex | str | Iterable[SupportsIndex | str] = 0,
    side: str | None = None,
    where: Any = None,
    compare: bool = False,
    bos: bool | None = None,
    max_tokens: SupportsIndex | None = None,
    attention_mask: Tensor | None = None,
    engine: str = "auto",
    chunk: int | str | None = "auto",
    batch_size: int = 8,
    per_text: bool | None = None,
    progress: bool = False,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> SinkReport:
    """Measure attention sinks, streaming: no full attention tensor is stored, no logits are computed.

    Args:
        model: a TransformerLens model (TransformerBridge, HookedTransformer, HookedEncoder), from
            :func:`sinkscope.load_model` or your own, or a plain Hugging Face model. It is left exactly as it was. Or the
            ActivationCache that `model.run_with_cache(ids)` gave, with the same ids as `texts`: then nothing is run.
        texts: a string, a `Path`, token ids (also as a Hugging Face tokenizer gives them), a list of these, or a mapping from
            label to one of these; or a stream, which is never whole in memory: an iterator or a dataset (its rows' field
            `text`), the `Path` of a directory (its `.txt` files) or of a `.jsonl` file (the field `text` of its lines). Of an
            encoder-decoder: a (source, target) pair (a tuple of two), `input_ids` with `decoder_input_ids`, a row with
            `source` and `target`, or a source alone, for which the model then writes a target, greedily. Of an encoder of
            images or sound: what its processor gives (`pixel_values`, `input_values`, `input_features`), one or several; of a
            Whisper that is the source. Of a vision-language model: text, or what its processor gives for one text with images
            in it (`input_ids` with `pixel_values` and what goes with them); positions of images are `image 0 patch 3,5`.
        metrics: names (see `sinkscope metrics`), metrics, or functions of a block, one or several; None for all built-in
            ones.
        key: the sink position looked at; negative from the end; a token such as `"[SEP]"`; or several of these.
        side: of an encoder-decoder (T5, BART, Marian, Whisper), which attention: `"decoder"` (its own; None is that),
            `"encoder"`, or `"cross"`: the target's to the source, where a key is a position of it and chance is 1 / S.
        where: which queries count: a rule of :mod:`sinkscope.where` (`next_loss(above=2.0)`, `tokens(".")`,
            `positions(16, None)`), a function of a block that gives `[batch, query]` of bool, or a boolean per token: a
            padded tensor, a list with a row per text, or a mapping from label to row. Means, nulls and thresholds are
            then over these queries alone, and `where_share` says how many they are. None for all.
        compare: put the same of the other queries beside it, named `sink_mass[others]`, and `sink_mass[difference]`: the
            difference within each text, so that its interval is paired.
        bos: put BOS first? None takes the model's own convention; the report says which it was.
        max_tokens: keep at most this many tokens of each text, BOS included.
        attention_mask: for ids given as a tensor `[batch, position]`: 0 marks pads.
        engine: `"flash"`, `"hooks"` or `"auto"` (flash where it is proved exact); the report says which ran and why.
        chunk: query rows per step of a chunked prefill, which keeps memory low on long texts; None for one shot;
            `"auto"` chunks long texts where the model's KV cache has been proved right.
        batch_size: texts per forward pass, at most.
        per_text: keep the finest rows of every text, beside the means over texts? None: of up to 100 texts. Without them
            memory does not grow with the texts; their model-level numbers are kept in any case.
        progress: show a progress bar over texts and layers on stderr.
        resume: a directory (the one that the report will be saved in). Finished batches are kept there, and the same call
            goes on after the last of them when it was interrupted or killed. `report.save` drops them. The same call has the
            same weights, hooks and metrics: their code, and the values that it closes over.
        distributed: share the batches among the processes of torch.distributed. Every process makes the same call, and gets
            the whole report.

    Returns:
        A :class:`SinkReport`; every number is per sequence first, means and standard errors are across sequences.

    Raises:
        SinkscopeError: bad input (see each argument), a metric that fails, NaN in the activations.
    """
    cache = model if is_cache(model) else None
    adapter = adapt_side(model if cache is None else cache.model, side, features=True)
    if cache is not None and adapter.side is not None:
        raise SinkscopeError("the ActivationCache of an encoder-decoder is not read: give the model itself, and pairs")
    asked = resolve(metrics) if where is None else countable(resolve(metrics), metrics is not None)
    base, keys, most = base_of(asked), keys_of(key), at_most(max_tokens)
    share = Share.of(distributed)
    tokenizing = {"bos": bos, "max_tokens": most, "attention_mask": attention_mask}
    rule, sides = _rule(where, compare, texts, attention_mask)
    size = _at_least_one(batch_size)
    observing = Observing(adapter, base, keys, tokenizing, engine, chunk, cache, size, rule, sides)
    corpus = observing.corpus(texts)
    tokens, (capture, _) = corpus.head
    finish = Finish(asked, base, keys, adapter.causal, adapter.layers, adapter.windows, sides)
    about = adapter.describe() | _how(capture, tokens.bos, asked, keys, most, size)
    if rule is not None:
        about["arguments"] |= {"where": repr(rule), "compare": compare}
    store = Store.of(
        resume,
        about | adapter.state() | {"metrics": fingerprint(*([asked] if rule is None else [asked, rule]))} if resume else {},
    )
    whole = len(tokens) <= PER_TEXT if per_text is None else per_text
    kept = Finished(store) if whole else Running(store, share)
    numbers = count()

    def skip(sequences: Sequence[TextTokens]) -> bool:
        return not share.mine(next(numbers)) or kept.has(sequences)

    def keep(batch: Batch, observer: Observer) -> None:
        kept.add([TextResult(s, finish(observer, row, s)) for row, s in enumerate(batch.sequences)])

    with (
        claimed(resume if share.rank == 0 else None),
        closing(kept),
        bar(progress and share.rank == 0, corpus.total and corpus.total * len(adapter.layers), "measure") as tick,
    ):
        observing.run(corpus, skip, keep, tick)
        tally, results = kept.end(share, list(corpus.labels))
    return SinkReport.assemble(tally, asked, about, results)


def _rule(where: Any, compare: bool, texts: Any, attention_mask: Tensor | None) -> tuple[Rule | None, int]:
    """Read which queries count, and of how many sides."""
    if compare and where is None:
        raise SinkscopeError("compare=True compares the queries of where= with the others: say which, where=...")
    if attention_mask is None and isinstance(texts, Mapping) and isinstance(where, Tensor):
        attention_mask = texts.get("attention_mask")  # what a tokenizer gave: booleans are padded as its ids are
    return None if where is None else as_rule(where, attention_mask), 2 if compare else 1


def _at_least_one(batch_size: SupportsIndex) -> int:
    """Take how many texts a forward pass may have."""
    size = whole_number(batch_size, "batch_size")
    if size < 1:
        raise SinkscopeError(f"batch_size={size}: at least one text per batch is needed")
    return size


def _how(
    capture: Capture,
    bos: str,
    asked: Sequence[AnyMetric],
    keys: Sequence[Key],
    max_tokens: int | None,
    batch_size: int,
) -> dict[str, Any]:
    return {
        "engine": capture.name,
        "engine_why": capture.why,
        "bos": bos,
        "arguments": {
            "metrics": [m.name for m in asked],
            "key": list(keys),
            "max_tokens": max_tokens,
            "batch_size": batch_size,
            "chunk": capture.chunk,
        },
    }
