"""The masking verb: texts -> tokens -> blocks -> rules -> SinkMask: which tokens are sinks, to be left out or looked at.

The rules look at numbers that `measure` gives for every token, text by text; what is kept of a text is its flagged tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.metrics import Metric, base_of, resolve
from sinkscope.metrics.base import Array
from sinkscope.metrics.observer import Observer
from sinkscope.metrics.shape import SHARE_OF_HEADS, sinks_in
from sinkscope.models import Adapter, adapt
from sinkscope.observing import Observing
from sinkscope.reports.mask import SinkMask
from sinkscope.runs.progress import bar
from sinkscope.runs.resume import Store, claimed
from sinkscope.runs.share import Share
from sinkscope.tokens import Batch, TextTokens, at_most, whole_number

Flags = NDArray[np.bool_]
#: A magnitude that Sun et al. ask for besides the multiple of the median.
MAGNITUDE = 100.0


@dataclass(frozen=True)
class Seen:
    """What a rule sees of one text: metrics by name, `[layer, head, position]` or `[layer, head]`, of the layers looked at.

    Attributes:
        values: the metrics' values.
        tokens: how many tokens there are.
        causal: False for an encoder.
        chosen: whether the layers were named by the caller.
    """

    values: Mapping[str, Array]
    tokens: int
    causal: bool
    chosen: bool


@dataclass(frozen=True)
class MaskRule:
    """A way to tell sinks: of each token, whether it is one in each layer, how strong it is, and whether it is flagged.

    Attributes:
        judge: (what is seen, eps) -> flagged `[position]`, strength `[position]`, where it shows `[layer, position]`.
        of: the metrics that it looks at.
        eps: its threshold, unless another is asked for.
    """

    judge: Callable[[Seen, float], tuple[Flags, Array, Flags]]
    of: tuple[str, ...]
    eps: float


def _attention(seen: Seen, eps: float) -> tuple[Flags, Array, Flags]:
    """alpha_k above eps in at least a tenth of the heads: the positions that `sink_positions` lists."""
    above, strength = sinks_in(seen.values["head_profile"], seen.tokens, seen.causal, eps)
    return np.asarray(strength >= SHARE_OF_HEADS), strength, np.asarray(above.any(axis=1))


def _norm(seen: Seen, eps: float) -> tuple[Flags, Array, Flags]:
    """Norm of the residual stream above eps times the text's median norm in the same layer."""
    norms = seen.values["residual_norm"][:, 0]
    return _above(norms / np.median(norms, axis=1, keepdims=True), eps)


def _massive(seen: Seen, eps: float) -> tuple[Flags, Array, Flags]:
    """Some magnitude above 100 and at least eps times the median magnitude of the layer."""
    peaks = seen.values["residual_peak"][:, 0]
    ratio = peaks * (seen.values["massive_activation"] / seen.values["massive_magnitude"])
    shows = (peaks > MAGNITUDE) & (ratio >= eps)
    return np.asarray(shows.any(axis=0)), ratio.max(axis=0), shows


def _bos_cosine(seen: Seen, eps: float) -> tuple[Flags, Array, Flags]:
    """Absolute cosine with the first token above eps, in a layer from the largest rise to the largest fall of its norm."""
    cosines = np.abs(seen.values["sink_cosine"][:, 0])
    if not seen.chosen and len(cosines) > 1:
        steps = np.diff(seen.values["residual_norm"][:, 0, 0])
        rise = int(steps.argmax()) + 1
        fall = rise + 1 + int(steps[rise:].argmin()) if rise < len(steps) and steps[rise:].min() < 0 else len(cosines)
        cosines = np.where((np.arange(len(cosines)) >= rise)[:, None] & (np.arange(len(cosines)) < fall)[:, None], cosines, 0)
    return _above(cosines, eps)


def _first(seen: Seen, eps: float) -> tuple[Flags, Array, Flags]:
    """The first eps tokens, whatever they are."""
    flagged = np.arange(seen.tokens) < eps
    return flagged, flagged.astype(float), np.zeros((1, seen.tokens), dtype=bool)


def _above(strength: Array, eps: float) -> tuple[Flags, Array, Flags]:
    shows = np.asarray(strength > eps)
    return np.asarray(shows.any(axis=0)), strength.max(axis=0), shows


#: The rules by name. `first` needs nothing; it is measured beside something small.
RULES: dict[str, MaskRule] = {
    "attention": MaskRule(_attention, ("head_profile",), 0.3),
    "norm": MaskRule(_norm, ("residual_norm",), 100.0),
    "massive": MaskRule(_massive, ("residual_peak", "massive_activation", "massive_magnitude"), 1000.0),
    "bos_cosine": MaskRule(_bos_cosine, ("sink_cosine", "residual_norm"), 0.9),
    "first": MaskRule(_first, ("sink_mass",), 16.0),
}


def sink_mask(
    model: Any,
    texts: Any,
    by: str | Iterable[str] = "attention",
    *,
    layers: Iterable[SupportsIndex] | None = None,
    eps: SupportsFloat | Mapping[str, SupportsFloat] | None = None,
    bos: bool | None = None,
    max_tokens: SupportsIndex | None = None,
    attention_mask: Tensor | None = None,
    engine: str = "auto",
    batch_size: SupportsIndex = 8,
    progress: bool = False,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> SinkMask:
    """Tell which tokens of texts are sinks: what to leave out of an autoencoder's data, a probe or a mean.

    Args:
        model: as for :func:`sinkscope.measure`; rules other than `attention` and `first` need the residual stream's hook
            points, which a TransformerLens model has.
        texts: as for :func:`sinkscope.measure`, streams included: of a text, its flagged tokens are kept and nothing else.
        by: one rule or several; a token is a sink where one of them says so. `"attention"`: alpha_k above 0.3 in a tenth of
            the heads (Gu et al. 2024, arXiv 2410.10781). `"norm"`: norm of the residual stream above 100 times the text's
            median (the filter of dictionary_learning). `"massive"`: a magnitude above 100 and 1,000 times the median (Sun et
            al. 2024, 2402.17762). `"bos_cosine"`: absolute cosine with the first token above 0.9, in the layers where that
            token's norm is up (Wong et al. 2025, 2512.22213). `"first"`: the first 16 tokens, which many hard-code.
        layers: the layers that count; None for all (of `bos_cosine`: from the first token's largest rise in norm to its
            largest fall).
        eps: another threshold, of the one rule, or a mapping from rule to threshold.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: as there.
        attention_mask: as there.
        engine: as there.
        batch_size: as there.
        progress: show a progress bar on stderr.
        resume: a directory (the one that the mask will be saved in). Finished batches are kept there, and the same call goes
            on after them; `mask.save` drops them.
        distributed: as for :func:`sinkscope.measure`.

    Raises:
        SinkscopeError: an unknown rule, a layer without attention, a threshold for no rule; bad input.

    >>> import sinkscope as ss
    >>> mask = sink_mask(ss.testing.planted_sink(), ["the quick brown fox", "so it goes"], by="attention")
    >>> [row.nonzero().flatten().tolist() for row in mask.by_text.values()]
    [[0], [0]]
    """
    adapter, share = adapt(model), Share.of(distributed)
    rules = _rules(by, eps)
    places = _places(adapter, layers)
    base = base_of(resolve(dict.fromkeys(name for rule in rules for name in RULES[rule].of)))
    tokenizing = {"bos": bos, "max_tokens": at_most(max_tokens), "attention_mask": attention_mask}
    size = max(1, whole_number(batch_size, "batch_size"))
    observing = Observing(adapter, base, [0], tokenizing, engine, batch_size=size)
    corpus = observing.corpus(texts)
    tokens, (capture, _) = corpus.head
    about = adapter.describe() | {"engine": capture.name, "engine_why": capture.why, "bos": tokens.bos, "rules": rules}
    about["arguments"] = {"layers": None if layers is None else [adapter.layers[p] for p in places], "batch_size": size}
    store = Store.of(resume, about | adapter.state() | tokenizing if resume else {})
    pieces: list[pd.DataFrame] = []
    numbers = count()

    def skip(sequences: Sequence[TextTokens]) -> bool:
        if not share.mine(next(numbers)):
            return True
        about, arrays = store.read(store.name(sequences)) or ({}, {})
        if about:
            pieces.append(pd.DataFrame(about | arrays))
        return bool(about)

    def keep(batch: Batch, observer: Observer) -> None:
        rows = [
            _flagged(s, _seen(adapter, base, observer, row, len(s), places, layers is not None), rules, places, adapter)
            for row, s in enumerate(batch.sequences)
        ]
        piece = pd.concat(rows, ignore_index=True)
        words = piece.select_dtypes(exclude="number")
        numbers = {str(name): piece[name].to_numpy() for name in piece if name not in words}
        store.write(store.name(batch.sequences), words.to_dict("list"), numbers)
        pieces.append(piece)

    with (
        claimed(resume if share.rank == 0 else None),
        bar(progress and share.rank == 0, corpus.total and corpus.total * len(adapter.layers), "mask") as tick,
    ):
        observing.run(corpus, skip, keep, tick)
        parts = share.gather(pieces)
    return SinkMask.of([piece for part in parts for piece in part], corpus.labels, rules, about)


def _rules(by: str | Iterable[str], eps: Any) -> dict[str, float]:
    """Take the rules that were asked for, each with its threshold."""
    names = list(dict.fromkeys([by] if isinstance(by, str) else by))
    for name in names:
        if name not in RULES:
            raise unknown("rule", name, RULES)
    if not names:
        raise SinkscopeError(f"by=[]: give at least one rule of {', '.join(RULES)}")
    if eps is not None and not isinstance(eps, Mapping):
        if len(names) > 1:
            raise SinkscopeError(f"eps={eps}: of which rule? Write eps={{{names[0]!r}: {eps}}}")
        eps = {names[0]: eps}
    for name in eps or {}:
        if name not in names:
            raise unknown("rule in eps", name, names)
    return {name: float((eps or {}).get(name, RULES[name].eps)) for name in names}


def _places(adapter: Adapter, layers: Iterable[SupportsIndex] | None) -> list[int]:
    """Find the layers that count among those that have attention."""
    wanted = (
        adapter.layers if layers is None else [whole_number(layer, "layers", "layers as whole numbers") for layer in layers]
    )
    for layer in wanted:
        if layer not in adapter.layers:
            raise SinkscopeError(f"layers: {layer} is no layer with attention of {adapter.name}, which are {adapter.layers}")
    if not wanted:
        raise SinkscopeError("layers=[]: give at least one layer, or None for all")
    return [adapter.layers.index(layer) for layer in wanted]


def _seen(
    adapter: Adapter, base: Sequence[Metric], observer: Observer, row: int, n: int, places: Sequence[int], chosen: bool
) -> Seen:
    values = {m.name: observer.value(m.name, 0, row)[list(places)][..., :n] for m in base}
    return Seen(values, n, adapter.causal, chosen)


def _flagged(
    text: TextTokens, seen: Seen, rules: Mapping[str, float], places: Sequence[int], adapter: Adapter
) -> pd.DataFrame:
    """Judge one text: a row per flagged token."""
    judged = {name: RULES[name].judge(seen, eps) for name, eps in rules.items()}
    at = np.flatnonzero(np.any([flagged for flagged, _, _ in judged.values()], axis=0))
    layers = np.asarray(adapter.layers)[list(places)]
    births = [np.where(f & shows.any(axis=0), layers[shows.argmax(axis=0)], np.inf) for f, _, shows in judged.values()]
    birth = np.min(births, axis=0)[at]
    columns: dict[str, Any] = {
        "text": [text.label] * len(at),
        "position": at,
        "token": [text.strings[i] for i in at],
        "layer": np.where(np.isfinite(birth), birth, -1).astype(int),
        "rules": ["+".join(name for name, (flagged, _, _) in judged.items() if flagged[i]) for i in at],
    }
    return pd.DataFrame(columns | {name: strength[at].astype(float) for name, (_, strength, _) in judged.items()})
