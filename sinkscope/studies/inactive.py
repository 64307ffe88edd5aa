"""inactive-heads: which heads can be zeroed, and are they the sink's? (Sandoval-Segura et al. 2025, arXiv 2504.03889)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sinkscope.causal import evaluate
from sinkscope.interventions import Intervention, ZeroHead
from sinkscope.models import Adapter, adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import MARK, NULL, SERIES, WIDE, finish
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, by_text, tabulate
from sinkscope.studies.seen import Seen, Within, check_inside, projection
from sinkscope.studies.texts import pieces, setting
from sinkscope.tokens import Tokens

#: Scores of a head, and whether the largest or the smallest are called inactive; each also over its layer's mean.
SCORES = {
    "first-token weight": -1,
    "output norm": 1,
    "output norm, projected": 1,
    "entropy": 1,
    "first token's value norm": 1,
    "mean value norm": 1,
    "last token's output norm": 1,
}
SINK, LAYER, OWN, RANDOM = (
    "first-token weight",
    ", over the layer's mean",
    "last token's output norm, over the head's mean",
    "random heads",
)
QUANTILES = (0.1, 0.2, 0.3)
DRAWS = 3


def inactive_heads(
    model: Any,
    text: Any = None,
    *,
    quantiles: Sequence[float] = QUANTILES,
    sequences: int = 6,
    tokens: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Score heads on half of the pieces, zero the lowest by each score, and see what the other half loses.

    The scores are those of Sandoval-Segura et al.: attention to the first token (of which the largest are called inactive),
    norms of a head's output before and after the output projection, the entropy of its rows, norms of values, and the
    output's norm at the last token; plain, over the layer's mean, and at the last token also over the head's own mean.
    There heads are chosen anew for every input; here once, on other pieces than those that are scored.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        quantiles: shares of the heads that are zeroed.
        sequences: how many pieces of the text, at least four.
        tokens: of each, BOS included.
        seed: of the random heads, three draws of which are averaged.
        progress: show a progress bar on stderr.

    Returns:
        A report with `delta_loss` by score and share of heads zeroed, beside as many random heads, and `less_than_random`:
        the difference of both, paired by text. Intervals are across the pieces that were not scored.

    Raises:
        SinkscopeError: fewer than four pieces; as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens, halves="two to score heads on and two to see what is lost")
    check_inside(adapter, sample)
    chosen, held_out = (Tokens(sample.sequences[i::2], sample.bos) for i in (0, 1))
    scores = _scores(model, adapter, chosen)
    total, generator = len(adapter.layers) * adapter.n_heads, np.random.default_rng(seed)
    shuffles = [generator.permutation(total) for _ in range(DRAWS)]
    orders = {name: [np.argsort(score.ravel(), kind="stable")] for name, score in scores.items()} | {RANDOM: shuffles}
    places = {
        (name, q): [order[: max(1, round(q * total))].tolist() for order in each]
        for name, each in orders.items()
        for q in quantiles
    }
    edits = {
        (case, draw): _zero(adapter, heads, f"{_name(*case)} [{draw}]")
        for case, each in places.items()
        for draw, heads in enumerate(each)
    }
    effect = evaluate(model, held_out, list(edits.values()), progress=progress)
    of = f"{setting(held_out)}, heads chosen on {len(chosen)} others"
    lost = {c: np.mean([by_text(effect, str(edits[c, i])) for i in range(len(each))], axis=0) for c, each in places.items()}
    rows: list[Row] = []
    for case, values in lost.items():
        rows.append((_name(*case), "delta_loss", Estimate.of(values), of))
        if case[0] != RANDOM:
            rows.append((_name(*case), "less_than_random", Estimate.of(values - lost[RANDOM, case[1]]), of))
    table = tabulate("inactive-heads", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, list(scores), sorted(quantiles), value)
    said += beside(table)
    pictures = {"curves": partial(_draw, value, list(scores), sorted(quantiles))}
    return StudyReport("inactive-heads", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect})


def _name(score: str, quantile: float) -> str:
    """Call a case by its score and the share of heads zeroed.

    >>> _name("entropy", 0.1)
    'entropy, 10% of heads'
    """
    return f"{score}, {100 * quantile:.0f}% of heads"


def _shares(quantiles: Iterable[float]) -> str:
    return ", ".join(f"{100 * q:.0f}%" for q in quantiles)


def _zero(adapter: Adapter, heads: Iterable[int], name: str) -> Intervention:
    """Zero heads given by their number among all of them."""
    by_layer: dict[int, list[int]] = {}
    for place, head in (divmod(int(h), adapter.n_heads) for h in heads):
        by_layer.setdefault(adapter.layers[place], []).append(head)
    return Within(ZeroHead(), by_layer, name)


def _scores(model: Any, adapter: Adapter, sample: Tokens) -> dict[str, np.ndarray]:
    """Score heads, `[layer, head]`: the mean over texts, signed so that the least are called inactive."""

    def look(layer: int, weights: Tensor, outputs: Tensor, values: Tensor) -> list[Tensor]:
        norms, projected = outputs.norm(dim=-1), projection(adapter, layer)(outputs).norm(dim=-1)
        sizes = values.norm(dim=-1)
        means = [weights[..., 0].mean(1), norms.mean(1), projected.mean(1), sizes[:, 0], sizes.mean(1), norms[:, -1]]
        return [m.float().cpu() for m in means]

    seen = Seen(None, look=look)
    evaluate(model, sample, seen.edit)
    rows = measure(model, sample, ["row_entropy"]).frame
    entropy = rows[(rows["text"] != "all") & rows["head"].notna()].pivot_table("value", "text", ["layer", "head"], sort=True)
    flat = np.array(
        [[torch.stack(each).numpy() for each in zip(*layers, strict=True)] for layers in seen.found(len(adapter.layers))]
    )
    weight, norm, projected, first, values, last = flat.transpose(1, 0, 2, 3)  # each [text, layer, head]
    raw = dict(
        zip(
            SCORES, (weight, norm, projected, entropy.to_numpy(float).reshape(weight.shape), first, values, last), strict=True
        )
    )
    scores = {name: SCORES[name] * score.mean(0) for name, score in raw.items()}
    over = {name + LAYER: SCORES[name] * _over(s, s.mean(2, keepdims=True)).mean(0) for name, s in raw.items()}
    return scores | over | {OWN: _over(last, norm).mean(0)}


def _over(score: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Divide; 0 by 0 is 0, for a head that gives nothing is as inactive as can be."""
    wide = np.broadcast_to(mean, score.shape)
    ratio: np.ndarray = np.divide(score, wide, out=np.zeros(score.shape), where=wide > 0)
    return ratio


def _say(
    model: str, of: str, scores: Sequence[str], quantiles: Sequence[float], value: Mapping[tuple[str, str], Estimate]
) -> tuple[str, str]:
    """Say what was found, and what was not: heads are dispensable that cost less than random ones, by the interval's end."""
    less = {(name, q): value[_name(name, q), "less_than_random"] for name in scores for q in quantiles}
    good = [q for q in quantiles if less[SINK, q].high < 0]
    bad = [q for q in quantiles if less[SINK, q].low > 0]
    if good and not bad:
        verdict = f"The heads that sink most are more dispensable than random ones (at {_shares(good)} of the heads)"
    elif bad and not good:
        verdict = f"The heads that sink most cost more than random ones (at {_shares(bad)} of the heads)"
    else:
        verdict = "That the heads that sink most are more dispensable than random ones was not shown"
    first = quantiles[0]
    best = min(scores, key=lambda name: value[_name(name, first), "delta_loss"].value)
    verdict += f"; of {len(scores)} scores, {best} costs least at {100 * first:.0f}%."
    said = f"In {of}, of {model}. Zeroing the heads with the largest first-token weight costs "
    said += ", ".join(f"{value[_name(SINK, q), 'delta_loss']} nats ({100 * q:.0f}%)" for q in quantiles)
    said += "; random heads " + ", ".join(f"{value[_name(RANDOM, q), 'delta_loss']} ({100 * q:.0f}%)" for q in quantiles)
    said += f"; the cheapest score, {best}, " + ", ".join(
        f"{value[_name(best, q), 'delta_loss']} ({100 * q:.0f}%)" for q in quantiles
    )
    beat = [name for name in scores if less[name, first].high < 0]
    said += f". At {100 * first:.0f}%, {len(beat)} of {len(scores)} scores cost less than random heads by their intervals. "
    said += "Which score is cheapest was looked up on the same pieces; published are accuracies on tasks of larger models, "
    said += "with heads "
    said += "chosen for every input: they are not comparable in size. "
    return verdict, said + "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."


def _draw(
    value: Mapping[tuple[str, str], Estimate], scores: Sequence[str], quantiles: Sequence[float], *, ax: Axes | None = None
) -> Axes:
    """Draw the loss by share of heads zeroed: first-token weight, random heads, the three cheapest scores, others pale."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    x = [100 * q for q in quantiles]
    ranked = sorted(scores, key=lambda name: value[_name(name, quantiles[-1]), "delta_loss"].value)
    colours = {SINK: MARK, RANDOM: NULL} | dict(zip([n for n in ranked if n != SINK][:3], SERIES, strict=False))
    for name in [*ranked, RANDOM]:
        points = [value[_name(name, q), "delta_loss"] for q in quantiles]
        if name not in colours:
            ax.plot(x, [p.value for p in points], color="#cccccc", linewidth=0.8, zorder=1)
            continue
        error = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        style: dict[str, Any] = {"color": colours[name], "markersize": 3, "capsize": 2, "linewidth": 1.2, "label": name}
        ax.errorbar(x, [p.value for p in points], yerr=error, fmt="o--" if name == RANDOM else "o-", **style)
    ax.set_yscale("symlog", linthresh=0.1)
    return finish(ax, "", "% of heads zeroed", "difference of loss (nats)", legend=True)
