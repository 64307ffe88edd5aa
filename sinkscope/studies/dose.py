"""dose-response: how much attention to the first token is best, and is it what the model gives? (ZeroTuning, 2505.11739)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from sinkscope.interventions import Intervention, ScaleAttention
from sinkscope.interventions.base import elsewhere
from sinkscope.metrics.across import ANY, POSITIVE
from sinkscope.models import Adapter, adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import NULL, SERIES, WIDE, finish
from sinkscope.runs.progress import bar
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, tabulate
from sinkscope.studies.seen import Within
from sinkscope.studies.texts import pieces, setting

FACTORS = (0.0, 0.5, 2.0, 4.0)
PLACEBO = "placebo: another key"
QUANTITIES = ("delta_loss", "kl", "entropy_change")


def dose_response(
    model: Any,
    text: Any = None,
    *,
    factors: Sequence[float | int] = FACTORS,
    sequences: int = 6,
    tokens: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Multiply the weight of the first token, renormalise, and look at loss, KL and the entropy of predictions.

    In all layers, in each third of them, in the half of the heads that pays the first token most and in the other half. The
    best factor is chosen on every other piece, by loss and by entropy (which needs no labels), and judged on the rest.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        factors: of the weight; 1 is the unedited run and need not be among them.
        sequences: how many pieces of the text, at least four.
        tokens: of each, BOS included.
        seed: of the placebo's key, which is scaled in the first one's place.
        progress: show a progress bar on stderr.

    Returns:
        A report with `delta_loss`, `kl` and `entropy_change` per group and factor (nats), and per group `best_factor` and the
        `best_delta_loss` of it on the pieces that it was not chosen on; intervals are across pieces, those of `best_factor`
        the range of what single pieces would choose.

    Raises:
        SinkscopeError: fewer than four pieces; as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens, halves="to choose a factor on some and judge it on others")
    wanted = [float(f) for f in factors if f != 1]
    groups = _groups(model, adapter, sample, seed)
    edits: dict[tuple[str, float], Intervention | None] = {("", 1.0): None}
    edits |= {(group, f): make(f) for group, make in groups.items() for f in wanted}
    seen: dict[tuple[str, float], list[list[float]]] = {place: [] for place in edits}
    with bar(progress, len(edits) * len(sample), "dose-response", "pass") as tick:
        texts, clean = [s.ids[None].to(adapter.device) for s in sample.sequences], []
        for place, edit in edits.items():
            with nullcontext() if edit is None else edit.on(model):
                for i, ids in enumerate(texts):
                    logits = _logits(adapter, ids)
                    clean += [logits] if edit is None else []
                    seen[place].append(_numbers(logits, clean[i], ids[0, 1:]))
                    tick(1)
    of, rows = setting(sample), list[Row]()
    curves: dict[str, dict[float, np.ndarray]] = {}
    base = np.array(seen["", 1.0])
    for group in groups:
        curves[group] = {f: np.array(seen[group, f]) - base for f in wanted} | {1.0: base - base}
        for f in sorted(wanted):
            for name, values in zip(QUANTITIES, curves[group][f].T, strict=True):
                rows.append((f"{group}, x{f:g}", name, Estimate.of(values, bounds=POSITIVE if name == "kl" else ANY), of))
        rows += _best(group, curves[group], of)
    table = tabulate("dose-response", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, list(groups), value)
    said += beside(table)
    pictures = {name: partial(_draw, curves, i, name) for i, name in enumerate(QUANTITIES)}
    return StudyReport("dose-response", asked(__doc__), table, verdict, said, adapter.describe(), pictures)


def _groups(model: Any, adapter: Adapter, sample: Any, seed: int) -> dict[str, Any]:
    """Give, by the name of a group of heads, what makes the edit of a factor."""
    layers, third = adapter.layers, max(1, len(adapter.layers) // 3)
    rows = measure(model, sample, ["sink_mass"]).frame
    mass = rows[(rows["text"] == "all") & rows["head"].notna()].set_index(["layer", "head"])["value"].astype(float)
    above = mass > mass.median()
    halves = {}
    for name, chosen in (("heads that sink most", above), ("the other heads", ~above)):
        places = chosen[chosen].index.to_frame(index=False).groupby("layer")["head"].apply(list).to_dict()
        halves[name] = partial(_in_heads, places)
    other = elsewhere((0,), seed)
    return {
        "all layers": partial(ScaleAttention, 0),
        "first third": partial(ScaleAttention, 0, layers=layers[:third]),
        "middle": partial(ScaleAttention, 0, layers=layers[third:-third] or layers[third - 1 : third]),
        "last third": partial(ScaleAttention, 0, layers=layers[-third:]),
        **halves,
        PLACEBO: partial(ScaleAttention, other),
    }


def _in_heads(places: Mapping[Any, Any], factor: float) -> Intervention:
    """Scale the first token's weight in some heads of each layer."""
    return Within(
        ScaleAttention(0, factor), {int(layer): list(map(int, heads)) for layer, heads in places.items()}, f"x{factor:g}"
    )


@torch.no_grad()
def _logits(adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    with adapter.quiet():
        hidden = adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))
        return adapter.logits(hidden[0, :-1]).float().log_softmax(-1)


def _numbers(logits: torch.Tensor, clean: torch.Tensor, truth: torch.Tensor) -> list[float]:
    """Give mean loss, KL(clean || this) and entropy of log-probabilities, in nats."""
    loss = -logits.gather(1, truth[:, None]).mean()
    kl = (clean.exp() * (clean - logits)).sum(-1).mean()
    return [float(loss), float(kl), float(-(logits.exp() * logits).sum(-1).mean())]


def _best(group: str, curve: Mapping[float, np.ndarray], of: str) -> list[Row]:
    """Choose a factor on every other piece, by loss and by entropy, and judge it on the rest."""
    rows: list[Row] = []
    for by, column in (("loss", 0), ("entropy", 2)):
        chosen_on = {f: curve[f][::2, column] for f in sorted(curve)}
        best = min(chosen_on, key=lambda f: float(chosen_on[f].mean()))
        factors = np.array(list(chosen_on))
        each = factors[np.argmin(np.stack(list(chosen_on.values())), axis=0)]
        case, single = f"{group}, least {by}", Estimate(best, float(each.min()), float(each.max()))
        rows.append((case, "best_factor", single, f"{of}, of every other one; range of single ones"))
        rows.append((case, "best_delta_loss", Estimate.of(curve[best][1::2, 0]), f"{of}, of the rest"))
    return rows


def _say(model: str, of: str, groups: Sequence[str], value: Mapping[tuple[str, str], Estimate]) -> tuple[str, str]:
    """Say what was found, and what was not: a factor is better where the interval of its loss on the rest lies below 0."""
    real = [g for g in groups if g != PLACEBO]
    chosen = {g: value[f"{g}, least loss", "best_factor"] for g in real}
    factor = {g: best.value for g, best in chosen.items()}
    gain = {g: value[f"{g}, least loss", "best_delta_loss"] for g in real}
    better = [g for g in real if factor[g] != 1 and gain[g].high < 0]
    verdict = (
        "Another weight of the first token than the model's is better: "
        + "; ".join(f"{g}, times {factor[g]:g} ({gain[g].value:+.3g} nats)" for g in better)
        + "."
        if better
        else "No weight of the first token was found to be better than the model's own."
    )
    said = f"In {of} of {model}, the factor with the least loss on every other piece (single ones: range) is "
    said += "; ".join(f"{chosen[g]} ({g}; on the rest {gain[g]} nats)" for g in real) + ". "
    rule = "all layers, least entropy"
    said += f"The least entropy of predictions is at {value[rule, 'best_factor']} (all layers), which changes the "
    said += "loss by "
    said += f"{value[rule, 'best_delta_loss']}. "
    ends = [c for c in ("all layers, x0", "all layers, x4", f"{PLACEBO}, x0", f"{PLACEBO}, x4") if (c, "delta_loss") in value]
    said += "Loss changes by " + ", ".join(f"{value[case, 'delta_loss']} ({case})" for case in ends) + ". " if ends else ""
    said += "Loss on plain text is not what the published figures are of (tasks, larger models): they are not comparable. "
    return verdict, said + "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."


def _draw(curves: Mapping[str, Mapping[float, np.ndarray]], column: int, name: str, *, ax: Axes | None = None) -> Axes:
    """Draw a number by factor, a line per group with its 95% interval; the model's own weight is at 1."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    for (group, curve), colour in zip(curves.items(), (*SERIES, NULL), strict=False):
        factors = sorted(curve)
        points = [Estimate.of(curve[f][:, column]) for f in factors]
        ax.plot(factors, [p.value for p in points], "o-", color=colour, markersize=2.5, linewidth=1.2, label=group)
        ax.fill_between(factors, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
    ax.axvline(1, color=NULL, linestyle="--", linewidth=0.8)
    return finish(ax, "", "first token's weight, times", f"{name} (nats)", legend=True)
