"""nop-broadcast: does a head's sink write nothing, or the same thing everywhere? (Fesser et al. 2026, arXiv 2606.08105)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, ReplaceValue
from sinkscope.interventions.base import elsewhere
from sinkscope.metrics.across import POSITIVE, SHARE
from sinkscope.models import Adapter, adapt
from sinkscope.reports.drawing import SERIES, WIDE, finish, in_figures
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, by_text, costs, tabulate
from sinkscope.studies.seen import Seen, Within, check_inside, projection
from sinkscope.studies.texts import pieces, setting

NOP, BROADCAST, BETWEEN, NONE = "NOP", "broadcast", "neither", "no sink"
#: A sink: 90% of the queries put at least 0.5 on it; NOP up to 0.2 of the others' norm; broadcast from 0.5 on, of rank 1.5.
QUERIES, WEIGHT, QUIET, LOUD, RANK = 0.9, 0.5, 0.2, 0.5, 1.5
EDITS = ("zero", "mean", "noise", "shuffle", "donor")
PLACEBO = "placebo: another key's value zeroed"


def nop_broadcast(
    model: Any, text: Any = None, *, sequences: int = 6, tokens: int = 128, seed: int = 0, progress: bool = False
) -> StudyReport:
    """Sort heads by what their sink writes, and replace the sink's value in all heads of a class at once.

    In each text a head has a sink on the first token if nine tenths of the later queries pay it at least half. What a token
    would write is its value after the output projection, u. The sink is a NOP if norm(u) is at most 0.2 of the mean of the
    other tokens', a broadcast if it is at least 0.5 and the head's update A u has a stable rank of at most 1.5. A head's
    class is the most frequent one among the texts in which it has a sink, if these are at least half.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text, at least two.
        tokens: of each, BOS included.
        seed: of what is drawn, and of the placebo, which zeroes the value of a later key in the same heads.
        progress: show a progress bar on stderr.

    Returns:
        A report with, per class, `heads` (share of all), `value_ratio` and `stable_rank`, and `delta_loss` and `kl` with the
        sink's value zero, its mean over the text, noise of its size, another key's, or the next text's; intervals are across
        pieces.

    Raises:
        SinkscopeError: one piece alone; as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    if len(sample) < 2:
        raise SinkscopeError(
            "one piece alone: the sink's value is also replaced by another text's, so at least two are needed"
        )
    check_inside(adapter, sample)
    seen = Seen(None, look=partial(_look, adapter))
    evaluate(model, sample, seen.edit)
    numbers = np.array(seen.found(len(adapter.layers)))  # [text, layer, (ratio, rank, routed), head]
    ratio, rank, routed = numbers.transpose(2, 0, 1, 3)
    labels = np.where(ratio <= QUIET, NOP, np.where((ratio >= LOUD) & (rank <= RANK), BROADCAST, BETWEEN))
    labels = np.where(routed >= QUERIES, labels, NONE)
    classes = _classes(labels)
    of, rows, same = setting(sample), list[Row](), list[str]()
    edits: dict[str, Intervention] = {}
    for kind in (NOP, BROADCAST, BETWEEN):
        of_kind, own = classes == kind, labels == kind
        rows.append((kind, "heads", Estimate.of(own.mean((1, 2)), bounds=SHARE), of))
        if own.any():
            for name, grid in (("value_ratio", ratio), ("stable_rank", rank)):
                each = [float(g[o].mean()) for g, o in zip(grid, own, strict=True) if o.any()]
                rows.append((kind, name, Estimate.of(each, bounds=POSITIVE), of))
        if of_kind.any():
            edits |= {case: _in(adapter, of_kind, 0, by, seed, case) for by in EDITS for case in [f"{kind}, {by}"]}
            (other,) = elsewhere((0,), seed)
            edits[f"{kind}, {PLACEBO}"] = _in(adapter, of_kind, other, "zero", seed, f"{kind}, {PLACEBO}")
    reports: dict[str, Any] = {}
    if edits:
        effect = evaluate(model, sample, list(edits.values()), progress=progress)
        rows += costs(effect, {case: case for case in edits}, of)
        same = [case for case in edits if case.endswith("donor") and by_text(effect, case, "kl").max() < 1e-6]
        reports[""] = effect
    table = tabulate("nop-broadcast", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, value, same)
    said += beside(table)
    pictures = {"heads": partial(_draw, ratio, rank, labels)}
    return StudyReport("nop-broadcast", asked(__doc__), table, verdict, said, adapter.describe(), pictures, reports)


def _look(adapter: Adapter, layer: int, weights: Tensor, outputs: Tensor, values: Tensor) -> np.ndarray:
    """Give, by head, the projected value's norm over the others', the update's stable rank, the share of queries routed."""
    project = projection(adapter, layer)
    norms, update = project(values).norm(dim=-1), project(outputs).float()
    least = torch.finfo(norms.dtype).tiny  # a head that writes nothing at all is a NOP
    ratio = norms[:, 0] / norms[:, 1:].mean(1).clamp_min(least)
    squares = torch.linalg.svdvals(update[:, 1:]).square()
    rank = squares.sum(-1) / squares[:, 0].clamp_min(least)
    routed = (weights[:, 1:, 0] >= WEIGHT).float().mean(1)
    return torch.stack([ratio, rank, routed]).double().cpu().numpy()


def _classes(labels: np.ndarray) -> np.ndarray:
    """Give each head's class, `[text, layer, head]` -> `[layer, head]`: the most frequent of its sinks, if half are.

    >>> _classes(np.array([["NOP", "no sink"], ["NOP", "neither"], ["neither", "no sink"]])[:, None])
    array([['NOP', 'no sink']], dtype='<U9')
    """
    counts = np.stack([(labels == kind).sum(0) for kind in (NOP, BROADCAST, BETWEEN)])
    names = np.array([NOP, BROADCAST, BETWEEN])[counts.argmax(0)]
    return np.where(2 * counts.sum(0) >= len(labels), names, NONE)


def _in(adapter: Adapter, chosen: np.ndarray, key: int, by: str, seed: int, name: str) -> Intervention:
    """Replace a key's value in some heads, `[layer, head]`."""
    heads = {layer: np.flatnonzero(row).tolist() for layer, row in zip(adapter.layers, chosen, strict=True) if row.any()}
    return Within(ReplaceValue(key, by, seed=seed), heads, name)


def _say(model: str, of: str, value: Mapping[tuple[str, str], Estimate], same: list[str]) -> tuple[str, str]:
    """Say what was found, and what was not: a class is needed where zeroing its sinks costs more than the placebo."""
    kinds = [k for k in (NOP, BROADCAST, BETWEEN) if (f"{k}, zero", "delta_loss") in value]
    share = {k: value[k, "heads"] for k in (NOP, BROADCAST, BETWEEN)}
    verdict = f"Of the heads, {percent(share[NOP].value)} have a sink that writes nothing (NOP), "
    verdict += f"{percent(share[BROADCAST].value)} one "
    verdict += f"that writes the same everywhere, {percent(share[BETWEEN].value)} neither"
    said = f"In {of} of {model}: NOP {share[NOP]}, broadcast {share[BROADCAST]}, neither {share[BETWEEN]} of the heads; the "
    said += "others have "
    said += "no sink on the first token. "
    needed, kept = list[str](), list[str]()
    for kind in kinds:
        cost = {by: value[f"{kind}, {by}", "delta_loss"] for by in (*EDITS, PLACEBO)}
        (needed if cost["zero"].low > max(0.0, cost[PLACEBO].high) else kept).append(kind)
        said += f"{kind}: the sink's projected value is {value[kind, 'value_ratio']} of the others', the update's stable "
        said += "rank "
        said += f"{value[kind, 'stable_rank']}; in all its heads at once, "
        said += ", ".join(f"{by} {cost[by]}" for by in EDITS) + f" nats; the placebo {cost[PLACEBO]}. "
    if needed or kept:
        verdict += (
            f"; the loss needs the sink's value in {', '.join(needed)}" if needed else "; the loss needs the value of none"
        )
        verdict += f", and not in {', '.join(kept)}" if needed and kept else ""
    if same:
        said += "The next text's value changes nothing: the first token is the same in all texts. "
    said += "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."
    return verdict + ".", said


def _draw(ratio: np.ndarray, rank: np.ndarray, labels: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw the heads with a sink, a dot per text: the projected value's norm over the others', the update's stable rank."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    for kind, colour in zip((NOP, BROADCAST, BETWEEN), SERIES, strict=False):
        here = labels == kind
        ax.plot(ratio[here], rank[here], "o", color=colour, markersize=2.5, alpha=0.5, label=f"{kind} ({int(here.sum())})")
    ax.axvline(QUIET, color="#595959", linewidth=0.6, linestyle="--")
    ax.axvline(LOUD, color="#595959", linewidth=0.6, linestyle="--")
    ax.axhline(RANK, color="#595959", linewidth=0.6, linestyle="--")
    ax.set_xscale("log")
    ax.set_yscale("log")
    in_figures(ax.xaxis)
    in_figures(ax.yaxis)
    return finish(
        ax, "", "norm of the sink's projected value over the others'", "stable rank of the head's update", legend=True
    )
