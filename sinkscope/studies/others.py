"""non-first: which tokens act as sinks, the first alone, delimiters, [SEP]? (Clark et al. 2019, arXiv 1906.04341)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import MaskKeys
from sinkscope.metrics.across import POSITIVE, SHARE
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import visible
from sinkscope.reports.plots import estimates
from sinkscope.reports.sink import SinkReport
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Pictures, Row, StudyReport, asked, tabulate
from sinkscope.studies.texts import pieces, setting

#: Queries that a key of a causal model needs before its mean attention says anything: the last keys see few.
QUERIES = 32


def non_first(
    model: Any, text: Any = None, *, sequences: int = 16, tokens: int = 256, eps: float = 0.3, progress: bool = False
) -> StudyReport:
    """Look at what every position receives, by the kind of its token, and where the sink goes when token 0 is hidden.

    Kinds: the first token; special tokens ([CLS], [SEP]); delimiters (no letter or digit, or a line break); all others. A
    secondary sink is a position after the first that receives more than `eps` in at least a tenth of the heads.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text.
        tokens: of each, special ones included; more than 32.
        eps: the threshold.
        progress: show a progress bar on stderr.

    Returns:
        A report with, per kind, `received` (the mean over positions, heads and layers of alpha_k, beside the same for uniform
        attention) and `attention_to_class` (the share of all attention that lands on the kind). Intervals are across pieces.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`; texts too short.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    lengths = {s.label: len(s) for s in sample.sequences}
    if min(lengths.values()) <= QUERIES:
        raise SinkscopeError(f"a text of {min(lengths.values())} tokens: more than {QUERIES} are needed")
    special = set(adapter.tokenizer.all_special_tokens) if adapter.tokenizer is not None else set()
    name = f"sink_positions@{eps:g}"
    report = measure(model, sample, [name, "received_profile", "position_profile"], per_text=True, progress=progress)
    about = setting(sample)
    kinds = {s.label: [kind(i, t, special) for i, t in enumerate(s.strings)] for s in sample.sequences}
    rows: list[Row] = []
    for of in ("first token", "special tokens", "delimiters", "other tokens"):
        for quantity, profile in (("received", "received_profile"), ("attention_to_class", "position_profile")):
            each = _by_text(report, profile, kinds, of, adapter.causal, adapter.layers)
            if each:
                values, nulls = zip(*each, strict=True)
                rows.append((of, quantity, Estimate.of(values, float(np.mean(nulls)), SHARE), about))
    if not adapter.causal:
        n, sep = adapter.n_layers, {s.label: [t if t == "[SEP]" else "" for t in s.strings] for s in sample.sequences}
        middle = [layer for layer in adapter.layers if n // 2 - 1 <= layer < n * 5 // 6]
        each = _by_text(report, "position_profile", sep, "[SEP]", causal=False, layers=middle)
        if each:
            values, nulls = zip(*each, strict=True)
            where = f"{about}; layers {middle[0] + 1} to {middle[-1] + 1} of {n}"
            rows.append(
                ("[SEP], middle layers", "attention_to_class", Estimate.of(values, float(np.mean(nulls)), SHARE), where)
            )
    found = report.frame[(report.frame["metric"] == name) & (report.frame["text"] != "all") & (report.frame["key"] > 0)]
    if adapter.causal:
        found = found[found["key"] + QUERIES < np.array([lengths[text] for text in found["text"]])]
    per_text = found.groupby("text").size().reindex(list(lengths), fill_value=0)
    rows.append(("secondary sinks", "positions_per_text", Estimate.of(per_text.astype(float), bounds=POSITIVE), about))
    table = tabulate("non-first", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    first, most = value["first token", "received"], per_text.mean()
    verdict = f"A query pays {percent(first.value)} of its attention to the first token; " + (
        f"{most:.2g} other positions per text are sinks too." if most else "no other position is a sink."
    )
    said = f"In {about}, every query of {adapter.name} gives {first} of its attention to the first token. "
    for of in ("special tokens", "delimiters", "other tokens"):
        if (of, "received") in value:
            e = value[of, "received"]
            said += f"A token of the kind '{of}' receives {e}, where uniform attention gives {e.null:.3g}. "
    said += _name_them(report, found) + (_relocate(model, sample) if adapter.causal else "")
    pictures: Pictures = {
        "kinds": partial(estimates, table, "received", unit="share of attention"),
        "positions": report.positions,
    }
    return StudyReport("non-first", asked(__doc__), table, verdict, said, report.about, pictures, {"": report})


def kind(position: int, token: str, special: set[str] | frozenset[str] = frozenset()) -> str:
    """Say what kind of token stands at a position.

    >>> [kind(i, t, {"[SEP]"}) for i, t in enumerate(["The", " end", ".", "[SEP]"])]
    ['first token', 'other tokens', 'delimiters', 'special tokens']
    """
    if position == 0:
        return "first token"
    if token in special:
        return "special tokens"
    return "delimiters" if "\n" in token or not any(c.isalnum() for c in token) else "other tokens"


def _by_text(
    report: SinkReport, profile: str, kinds: dict[str, list[str]], of: str, causal: bool, layers: Sequence[int]
) -> list[tuple[float, float]]:
    """Give, per text that has the kind, (value, null): the mean of `received_profile`, or the sum of `position_profile`."""
    rows = report.frame[(report.frame["metric"] == profile) & (report.frame["text"] != "all")]
    rows = rows[rows["layer"].isin(list(layers))]
    each = []
    for label, here in rows.groupby("text", sort=False):
        profiles = here.groupby("key")[["value", "null"]].mean().to_numpy(float)
        chosen = np.array(kinds[str(label)]) == of
        if causal and profile == "received_profile":
            chosen[-QUERIES:] = False
        if chosen.any():
            taken = profiles[chosen]
            value, null = taken.mean(0) if profile == "received_profile" else taken.sum(0)
            each.append((float(value), float(null)))
    return each


def _name_them(report: SinkReport, found: Any) -> str:
    """Name the tokens that are secondary sinks most often."""
    if not len(found):
        return "No position after the first is a sink in a tenth of the heads. "
    words = {t["label"]: t["tokens"] for t in report.about["texts"]}
    often = Counter(visible(words[text][key]) for text, key in zip(found["text"], found["key"], strict=True)).most_common(3)
    top = found.nlargest(1, "value").iloc[0]
    return (
        f"Secondary sinks are most often {', '.join(f'{word!r} ({n} times)' for word, n in often)}; the strongest "
        f"is position {top['key']}, {visible(words[top['text']][top['key']])!r}, in {percent(float(top['value']))} of heads. "
    )


def _relocate(model: Any, sample: Any) -> str:
    """Say where most attention goes when no later query sees the first token."""
    edit = MaskKeys(0)
    frame = evaluate(model, sample, edit).frame
    rows = frame[(frame["intervention"] == str(edit)) & (frame["text"] != "all")]
    ((place, times),) = Counter(rows["sink_position"].tolist()).most_common(1)
    return f"With token 0 hidden from all others, most attention goes to token {place} in {times} of {len(rows)} texts."
