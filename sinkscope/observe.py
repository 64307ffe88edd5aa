"""The observing loop: texts -> tokens -> blocks -> metric accumulators -> SinkReport."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from torch import Tensor

from sinkscope.block import Block
from sinkscope.capture import Capture, cached, choose
from sinkscope.capture.cached import is_cache
from sinkscope.errors import SinkscopeError
from sinkscope.metrics import BUILT_IN, resolve
from sinkscope.metrics.accumulate import RowMean
from sinkscope.metrics.base import AcrossTexts, AnyMetric, Array, Metric
from sinkscope.metrics.null import uniform_mean
from sinkscope.models import Adapter, adapt
from sinkscope.reports.sink import SinkReport
from sinkscope.results import TextResult, Value
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.progress import bar
from sinkscope.runs.resume import Finished, Running, Store, claimed
from sinkscope.runs.share import Share
from sinkscope.runs.undo import surely
from sinkscope.tokens import Corpus, TextTokens, Tokens, at_most, key_positions, whole_number

Key = int | str
#: Texts whose finest rows are kept if nothing is said, and batches of a stream that are read and sorted at a time.
PER_TEXT, PORTION = 100, 32
#: Numbers of nulls that are kept to be used again: 64 MB.
MOST_NULLS = 8 << 20


def measure(
    model: Any,
    texts: Any,
    metrics: Iterable[str | AnyMetric | Callable[[Block], Tensor]] | None = None,
    *,
    key: SupportsIndex | str | Iterable[SupportsIndex | str] = 0,
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
            `text`), the `Path` of a directory (its `.txt` files) or of a `.jsonl` file (the field `text` of its lines).
        metrics: names (see `sinkscope metrics`), metrics, or functions of a block; None for all built-in ones.
        key: the sink position looked at; negative from the end; a token such as `"[SEP]"`; or several of these.
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
    adapter = adapt(model if cache is None else cache.model)
    asked = resolve(metrics)
    base = _base(asked)
    keys, most = _keys(key), at_most(max_tokens)
    batch_size = whole_number(batch_size, "batch_size")
    if batch_size < 1:
        raise SinkscopeError(f"batch_size={batch_size}: at least one text per batch is needed")
    share = Share.of(distributed)

    def prepare(first: int, some: Any) -> tuple[Tokens, Capture]:
        tokens = adapter.tokenize(some, bos=bos, max_tokens=most, attention_mask=attention_mask, first=first)
        adapter.check(tokens)
        for k in keys:
            key_positions(k, tokens.sequences)
        groups = frozenset(m.group for m in base)
        if cache is not None:
            return tokens, cached.plan(adapter, groups, cache, tokens)
        return tokens, choose(engine, adapter, groups, chunk, tokens)

    corpus = Corpus(texts, max(PORTION * batch_size, 2 * PER_TEXT), prepare)
    tokens, capture = corpus.head
    finish = _Finish(asked, base, keys, adapter)
    about = adapter.describe() | _how(capture, tokens.bos, asked, keys, most, batch_size)
    store = Store.of(resume, about | adapter.state() | {"metrics": fingerprint(asked)} if resume else {})
    whole = len(tokens) <= PER_TEXT if per_text is None else per_text
    kept = Finished(store) if whole else Running(store, share)
    numbers = count()
    with (
        claimed(resume if share.rank == 0 else None),
        closing(kept),
        bar(progress and share.rank == 0, corpus.total and corpus.total * len(adapter.layers), "measure") as tick,
    ):
        for tokens, capture in corpus:
            with surely(capture):
                for batch in tokens.batches(batch_size, adapter.device):
                    n = len(batch.sequences)
                    if not share.mine(next(numbers)) or kept.has(batch.sequences):
                        tick(n * len(adapter.layers))
                        continue
                    observer = _Observer(base, [key_positions(k, batch.sequences) for k in keys], adapter.layers)
                    capture.run(batch, observer, partial(tick, n))
                    kept.add([finish(observer, row, sequence) for row, sequence in enumerate(batch.sequences)])
        tally, results = kept.end(share, list(corpus.labels))
    return SinkReport.assemble(tally, asked, about, results)


def _keys(key: Any) -> list[Key]:
    """Take one key or several, each once."""
    one = isinstance(key, str) or not isinstance(key, Iterable) or getattr(key, "ndim", 1) == 0
    given = [key] if one else list(key)
    keys = [k if isinstance(k, str) else whole_number(k, "key", "a position or a token") for k in given]
    if not keys:
        raise SinkscopeError("key=[]: at least one key is needed")
    return list(dict.fromkeys(keys))


def _base(asked: Sequence[AnyMetric]) -> list[Metric]:
    """Collect the block metrics behind what was asked for, each once."""
    base: dict[str, Metric] = {}
    waiting = list(asked)
    while waiting:
        m = waiting.pop()
        if isinstance(m, Metric):
            base.setdefault(m.name, m)
        else:
            waiting += [BUILT_IN[name] for name in ((m.of,) if isinstance(m, AcrossTexts) else m.of)]
    return list(base.values())


class _Observer:
    """Takes the blocks of one batch and keeps row means per (metric, sink position)."""

    def __init__(self, metrics: Sequence[Metric], positions: Sequence[Tensor], layers: Sequence[int]) -> None:
        self.metrics = metrics
        self.positions = positions
        self.place = {layer: place for place, layer in enumerate(layers)}
        self.rows: dict[tuple[str, int], RowMean] = {}
        self.means: dict[tuple[str, int], Array] = {}

    def __call__(self, block: Block, group: frozenset[str]) -> None:
        """Update the metrics that wait for what this block carries."""
        for index, keys in enumerate(self.positions):
            here = block.at(keys.to(block.lengths.device))
            for m in self.metrics:
                if m.group == group and (index == 0 or m.at_key):
                    rows = self.rows.setdefault((m.name, index), RowMean(m, len(self.place)))
                    rows.update(here, self.place[block.layer])

    def value(self, name: str, index: int, row: int) -> Array:
        """Give one sequence's means, `[layer, head]` or `[layer, head, key]`."""
        if (name, index) not in self.means:
            self.means[name, index] = self.rows[name, index].mean()
        return np.asarray(self.means[name, index][:, row])


class _Finish:
    """Turns the means of one sequence into reported values, with the null beside each."""

    def __init__(self, asked: Sequence[AnyMetric], base: Sequence[Metric], keys: Sequence[Key], adapter: Adapter) -> None:
        self.asked, self.base, self.keys, self.adapter = asked, base, keys, adapter
        self._nulls: dict[tuple[str, str, int, int, int | None], Array] = {}
        self._room = MOST_NULLS

    def __call__(self, observer: _Observer, row: int, sequence: TextTokens) -> TextResult:
        values = []
        for index, key in enumerate(self.keys):
            position = int(key_positions(key, [sequence])[0])
            tag = f"[key={key}]" if len(self.keys) > 1 else ""
            means = {}
            nulls = {}
            for m in self.base:
                means[m.name] = observer.value(m.name, index if m.at_key else 0, row)
                if means[m.name].ndim == 3:
                    means[m.name] = means[m.name][..., : len(sequence)]
                nulls[m.name] = self._null(m, sequence, position, means[m.name])
            for reported in self.asked:
                at_key = getattr(reported, "at_key", False)
                if at_key or index == 0:
                    at, mark = (position, tag) if at_key else (None, "")
                    values += _values(reported, means, nulls, at, mark, len(sequence), self.adapter.causal)
        return TextResult(sequence, tuple(values))

    def _null(self, m: Metric, sequence: TextTokens, position: int, like: Array) -> Array:
        """Give the null in the shape of the value: a layer's window may matter, heads never do."""
        if m.null is None:
            return np.full(like.shape, np.nan)
        # Of the built-in metrics none looks at the text, only at its length; another one may.
        text = "" if m.name in BUILT_IN else sequence.label
        causal, rows = self.adapter.causal, []
        for layer in self.adapter.layers:
            window = self.adapter.windows.get(layer) if m.null == "visible" else None
            at = (m.name, text, len(sequence), position, window)
            if at not in self._nulls:
                null = uniform_mean(m, len(sequence), position, causal=causal, window=window, tokens=sequence.ids)
                self._room -= null.size
                if self._room < 0:
                    self._nulls, self._room = {}, MOST_NULLS - null.size
                self._nulls[at] = null
            rows.append(self._nulls[at])
        return np.broadcast_to(np.stack(rows)[:, None], like.shape)


def _values(
    m: AnyMetric,
    means: dict[str, Array],
    nulls: dict[str, Array],
    key: int | None,
    tag: str,
    tokens: int,
    causal: bool,
) -> list[Value]:
    """Finish one metric for one sequence."""
    if isinstance(m, AcrossTexts):
        return []
    if isinstance(m, Metric):
        axes = ("layer", "head", "key")[: means[m.name].ndim]
        null = m.finish(nulls[m.name])
        return [
            Value(
                name,
                tag,
                key,
                axes,
                value,
                null[name],
                *((None, None) if "key" in axes else (_mean(value), _mean(null[name]))),
            )
            for name, value in m.finish(means[m.name]).items()
        ]
    value, null_value = m(means, tokens, causal), m(nulls, tokens, causal)
    total = (float(m.total(value)), float(m.total(null_value))) if m.total else (None, None)
    return [Value(m.name, tag, key, m.axes, value, null_value, *total)]


def _mean(values: Array) -> float:
    """Mean over layers and heads of what is defined; NaN where nothing is."""
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


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
