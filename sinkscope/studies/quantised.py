"""kv-quantisation: how many first tokens must a rounded cache keep as they are? (KVSink 2508.04257; KIVI 2402.02750)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from sinkscope.causal import evaluate
from sinkscope.interventions import QuantizeKV
from sinkscope.models import adapt
from sinkscope.reports.drawing import NULL, SERIES, WIDE, finish
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, by_text, costs, tabulate
from sinkscope.studies.texts import pieces, setting

#: The number of tokens that the placebo keeps, from a later position on.
PLACEBO_KEEP = 4


def kv_quantisation(
    model: Any,
    text: Any = None,
    *,
    bits: Sequence[int] = (2, 4),
    keep: Sequence[int] = (0, 1, 4, 16),
    schemes: Sequence[str] = ("per_token", "kivi"),
    sequences: int = 4,
    tokens: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Round keys and values to a few bits, keep the first tokens in full precision, and count what is lost.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        bits: of each number.
        keep: first tokens kept as they are; 0 is always among them.
        schemes: of :class:`~sinkscope.interventions.QuantizeKV`: by token, or keys by channel in groups of 64 tokens.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        seed: of the placebo, which keeps four later tokens.
        progress: show a progress bar on stderr.

    Returns:
        A report with `delta_loss` and `kl` (to the pass in full precision) per scheme, bits and tokens kept, and `kl_change`:
        the share of the loss's divergence that keeping them takes away, paired by text; intervals are across pieces.

    Raises:
        SinkscopeError: as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    kept = sorted({0, *map(int, keep)})
    rounds = [(scheme, n) for scheme in schemes for n in bits]
    cases = {(scheme, n, k): QuantizeKV(n, k, scheme=scheme) for scheme, n in rounds for k in kept}
    cases |= {(s, n, -1): QuantizeKV(n, PLACEBO_KEEP, scheme=s).placebo(seed) for s, n in rounds}  # type: ignore[misc]
    effect = evaluate(model, sample, list(cases.values()), progress=progress)
    of = setting(sample)
    rows: list[Row] = costs(effect, {_name(*case): str(edit) for case, edit in cases.items()}, of)
    for scheme, n in rounds:
        base = by_text(effect, str(cases[scheme, n, 0]), "kl")
        for k in (*kept[1:], -1):
            less = by_text(effect, str(cases[scheme, n, k]), "kl") / base - 1
            rows.append((_name(scheme, n, k), "kl_change", Estimate.of(less), of))
    table = tabulate("kv-quantisation", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, rounds, kept, value)
    said += beside(table)
    pictures = {"kl": partial(_draw, value, rounds, kept)}
    return StudyReport("kv-quantisation", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect})


def _name(scheme: str, bits: int, keep: int) -> str:
    """Call a case by what is rounded and kept.

    >>> _name("kivi", 2, 4), _name("kivi", 2, -1)
    ('kivi, 2 bits, 4 kept', 'kivi, 2 bits, placebo: 4 later kept')
    """
    return f"{scheme}, {bits} bits, {f'{keep} kept' if keep >= 0 else f'placebo: {PLACEBO_KEEP} later kept'}"


def _enough(value: Mapping[tuple[str, str], Estimate], scheme: str, bits: int, kept: Sequence[int]) -> int | None:
    """Give the fewest tokens kept whose gain's interval lies below 0, and the placebo's; None where no number does."""
    placebo = value[_name(scheme, bits, -1), "kl_change"]
    gains = {k: value[_name(scheme, bits, k), "kl_change"] for k in kept if k}
    return next((k for k, gain in gains.items() if gain.high < min(0.0, placebo.low)), None)


def _say(
    model: str, of: str, rounds: Sequence[tuple[str, int]], kept: Sequence[int], value: Mapping[tuple[str, str], Estimate]
) -> tuple[str, str]:
    """Say what was found, and what was not."""
    parts, said = [], f"In {of} of {model}, against the pass in full precision. "
    for scheme, bits in rounds:
        plain = value[_name(scheme, bits, 0), "kl"]
        enough, placebo = _enough(value, scheme, bits, kept), value[_name(scheme, bits, -1), "kl_change"]
        said += f"{scheme}, {bits} bits: KL {plain} and {value[_name(scheme, bits, 0), 'delta_loss']} nats of loss with "
        said += "nothing kept; "
        said += "; ".join(f"{k} kept, KL {_share(value[_name(scheme, bits, k), 'kl_change'])}" for k in kept if k)
        said += f"; four later ones, {_share(placebo)}. "
        if enough is None:
            parts.append(f"{scheme}, {bits} bits: keeping first tokens gains no more than later ones")
            continue
        gain, most = value[_name(scheme, bits, enough), "kl_change"], value[_name(scheme, bits, kept[-1]), "kl_change"]
        part = f"{scheme}, {bits} bits: {enough} kept take{'s' * (enough == 1)} away {percent(-gain.value)} of the KL"
        parts.append(part + (f", {kept[-1]} take {percent(-most.value)}" if kept[-1] != enough else ""))
    return "; ".join(
        parts
    ) + ".", said + "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."


def _share(change: Estimate) -> str:
    """Write a relative change with its interval, in percent."""
    interval = "" if math.isnan(change.low) else f" ({100 * change.low:+.0f} to {100 * change.high:+.0f})"
    return f"{100 * change.value:+.0f}%{interval}"


def _draw(
    value: Mapping[tuple[str, str], Estimate],
    rounds: Sequence[tuple[str, int]],
    kept: Sequence[int],
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw KL by tokens kept, a line per scheme and bits with its 95% interval; the placebo as a cross."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    places = np.arange(len(kept), dtype=float)
    for (scheme, bits), colour in zip(rounds, (*SERIES, NULL), strict=False):
        points = [value[_name(scheme, bits, k), "kl"] for k in kept]
        ax.plot(
            places, [p.value for p in points], "o-", color=colour, markersize=3, linewidth=1.2, label=f"{scheme}, {bits} bits"
        )
        ax.fill_between(places, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
        if PLACEBO_KEEP in kept:
            at = [places[kept.index(PLACEBO_KEEP)]]
            ax.plot(at, [value[_name(scheme, bits, -1), "kl"].value], "x", color=colour, label="_placebo")
    ax.plot([], [], "x", color=NULL, label="placebo: later tokens kept")
    ax.set_xticks(places, labels=[str(k) for k in kept])
    ax.set_yscale("log")
    return finish(ax, "", "first tokens kept in full precision", "KL to full precision (nats)", legend=True)
