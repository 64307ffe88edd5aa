"""repeated-token: do repeats come to look like the first token, and by which neurons? (Yona et al. 2025, 2503.08908)."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sinkscope.capture.neurons import last_matrix
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, ZeroNeuron
from sinkscope.metrics.across import POSITIVE, SHARE, SIGNED
from sinkscope.models import Adapter, adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import NULL, SERIES, WIDE, finish
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, tabulate
from sinkscope.studies.texts import pieces, setting
from sinkscope.tokens import TextTokens, Tokens

REPEATS, WITHOUT, NATURAL = "repeats after the first token", "repeats alone", "natural text"
ZEROED, PLACEBO = "sink neurons zeroed", "placebo: random neurons zeroed"
#: A residual like the first token's, by its cosine (Wong et al. 2512.22213), and neurons taken for the sink's (Yona et al.).
LIKE, NEURONS = 0.9, 2


@dataclass(frozen=True, eq=False)
class _Acting(Intervention):
    """Edits nothing, and keeps what a layer's neurons are at the first token."""

    touches: ClassVar[frozenset[str]] = frozenset({"neurons"})
    found: list[Tensor] = field(default_factory=list)

    def mlp(self, layer: int, activations: Tensor) -> Tensor:
        self.found.append(activations[0, 0].detach().float())
        return activations


def repeated_token(
    model: Any, text: Any = None, *, sequences: int = 6, repeats: int = 255, seed: int = 0, progress: bool = False
) -> StudyReport:
    """Repeat one token after a first one, follow the residual stream along the repeats, and zero the sink's neurons.

    The sink layer is the one that makes the first token's norm grow most; its sink neurons are the two that write most
    there, |activation| times the norm of what the last matrix makes of 1. The first token is the text's: BOS, if it has one.

    Args:
        model: as for :func:`sinkscope.measure`; a TransformerLens model whose MLPs end with one matrix.
        text: one long text, or several, from which the tokens are taken, one for each piece, and the natural text.
        sequences: how many tokens are repeated, one each.
        repeats: how many times.
        seed: of the placebo's neurons, as many of the same layer.
        progress: show a progress bar on stderr.

    Returns:
        A report with `norm_ratio` (of the last quarter of the repeats to the first token, after the sink layer), `cosine`
        (with the first token, there) and `like_first` (share of the tokens repeated for which that exceeds 0.9), also of
        natural text, of repeats without a first token, and with the neurons zeroed; `first_norm`, the first token's norm
        under each edit over its own unedited. Intervals are across the tokens repeated.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`; MLPs whose neurons can't be told.
    """
    adapter = adapt(model)
    natural = pieces(adapter, text, count=sequences, size=repeats + 1)
    if not adapter.causal or min(map(len, natural.sequences)) < 8:
        raise SinkscopeError("a causal model and texts of at least 8 tokens are needed")
    first = natural.sequences[0].ids[:1]
    drawn = [s.ids[len(s) // 2 :][s.ids[len(s) // 2 :] != first][:1] for s in natural.sequences]
    with_first = _made(natural, [torch.cat([first, t.expand(repeats)]) for t in drawn])
    layer, neurons = _sink_neurons(adapter, model, natural)
    zero = ZeroNeuron(layer, neurons)
    runs: dict[str, tuple[Tokens, Intervention | None]] = {
        REPEATS: (with_first, None),
        NATURAL: (natural, None),
        WITHOUT: (_made(natural, [t.expand(repeats) for t in drawn]), None),
        ZEROED: (with_first, zero),
        PLACEBO: (with_first, zero.placebo(seed)),
    }
    rows: list[Row] = []
    curves: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    of = f"{setting(with_first, 'tokens repeated')}, after layer {layer}"
    for case, (sample, edit) in runs.items():
        with nullcontext() if edit is None else edit.on(model):
            report = measure(model, sample, ["residual_norm", "sink_cosine"], per_text=True, progress=progress)
        norms, cosines = (_by_position(report.frame, metric, layer) for metric in ("residual_norm", "sink_cosine"))
        about = about or report.about
        curves[case] = norms
        late = slice(-max(1, repeats // 4), None)
        against = curves[REPEATS][:, :1] if case == WITHOUT else norms[:, :1]
        like = cosines[:, late].mean(1)
        rows.append((case, "norm_ratio", Estimate.of((norms[:, late] / against).mean(1), bounds=POSITIVE), of))
        if case != WITHOUT:  # whose first token is a repeat itself
            rows.append((case, "cosine", Estimate.of(like, bounds=SIGNED), of))
            rows.append((case, "like_first", Estimate.of((like > LIKE).astype(float), bounds=SHARE), of))
        if edit is not None:
            rows.append((case, "first_norm", Estimate.of(norms[:, 0] / curves[REPEATS][:, 0], bounds=POSITIVE), of))
    rows.append((ZEROED, "neurons", Estimate(len(neurons)), f"layer {layer}: {', '.join(map(str, neurons))}"))
    table = tabulate("repeated-token", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, layer, neurons, value)
    said += beside(table)
    pictures = {"norms": partial(_draw, curves)}
    about = about | {"sink_layer": layer, "sink_neurons": list(neurons)}
    return StudyReport("repeated-token", asked(__doc__), table, verdict, said, about, pictures)


def _made(like: Tokens, ids: list[Tensor]) -> Tokens:
    """Give texts of these ids, under names of their own."""
    made = (TextTokens(f"token {i}", row.clone(), tuple(str(int(t)) for t in row)) for i, row in enumerate(ids))
    return Tokens(tuple(made), like.bos)


def _sink_neurons(adapter: Adapter, model: Any, sample: Tokens) -> tuple[int, tuple[int, ...]]:
    """Find the layer in which the first token's norm grows most, and the neurons that write most there."""
    one = Tokens(sample.sequences[:1], sample.bos)
    norms = _by_position(measure(model, one, ["residual_norm"], per_text=True).frame, "residual_norm", None)[:, 0]
    place = int(np.diff(norms, prepend=norms[:1]).argmax())
    layer = adapter.layers[place]
    acting = _Acting(layers=layer)
    with acting.on(model), adapter.quiet(), torch.no_grad():
        ids = one.sequences[0].ids[None].to(adapter.device)
        adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))
    activations = acting.found[-1]
    matrix = last_matrix(adapter, layer)
    with torch.no_grad():
        unit = torch.eye(len(activations), device=activations.device, dtype=next(matrix.parameters()).dtype)
        written = (matrix(unit) - matrix(torch.zeros_like(unit[:1]))).float().norm(dim=-1)
    return layer, tuple((activations.abs() * written).topk(NEURONS).indices.sort().values.tolist())


def _by_position(frame: Any, metric: str, layer: int | None) -> np.ndarray:
    """Give a metric of every token, `[text, position]` after a layer, or `[layer, position]` of the one text."""
    rows = frame[(frame["metric"] == metric) & (frame["text"] != "all")]
    if layer is not None:
        rows = rows[rows["layer"] == layer]
    index = "layer" if layer is None else "text"
    wide = rows.pivot(index=index, columns="query", values="value")
    values: np.ndarray = wide.loc[rows[index].unique()].to_numpy(float)
    return values


def _say(
    model: str, of: str, layer: int, neurons: tuple[int, ...], value: Mapping[tuple[str, str], Estimate]
) -> tuple[str, str]:
    """Say what was found, and what was not."""
    like, plain, share = value[REPEATS, "cosine"], value[NATURAL, "cosine"], value[REPEATS, "like_first"]
    size, less, other = (value[case, "norm_ratio"] for case in (REPEATS, ZEROED, PLACEBO))
    own, others = value[ZEROED, "first_norm"], value[PLACEBO, "first_norm"]
    if like.low > max(LIKE, plain.high):
        verdict = f"Late repeats come to look like the first token (cosine {like.value:.2f}, {size.value:.2f} of its norm)"
    elif like.low > plain.high:
        verdict = "Late repeats come nearer to the first token than other tokens do, but not to look like it "
        verdict += f"({like.value:.2f})"
    else:
        verdict = f"That repeats come to look like the first token was not shown (cosine {like.value:.2f})"
    verdict += "" if like.low > LIKE else f", those of {percent(share.value)} of the tokens do"
    verdict += (
        f"; its norm hangs on {len(neurons)} neurons ({own.value:.2f} of it is left without them)."
        if own.high < min(1.0, others.low)
        else f"; zeroing {len(neurons)} neurons that write most there does not shrink it more than random ones."
    )
    said = f"In {of} of {model}, where the first token's norm grows most: late repeats have {size} of the first token's norm "
    said += "and "
    said += f"a cosine of {like} with it, natural text {value[NATURAL, 'norm_ratio']} and {plain}; repeats of {share} of the "
    said += f"tokens look like it. Without a first token before them, repeats have {value[WITHOUT, 'norm_ratio']} of its "
    said += "norm. "
    said += f"Neurons {', '.join(map(str, neurons))} of layer {layer} zeroed leave {own} of the first token's norm, as many "
    said += "random "
    said += f"ones {others}; repeats then have {less} of the first token's norm, or {other}. "
    return verdict, said + "One model: the intervals are across the tokens that are repeated, which one text gave."


def _draw(curves: Mapping[str, np.ndarray], *, ax: Axes | None = None) -> Axes:
    """Draw the norm by position, the median of the texts and their range, a line per case."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    for (case, norms), colour in zip(curves.items(), (*SERIES, NULL), strict=False):
        at = np.arange(norms.shape[1]) + (case == WITHOUT)
        ax.plot(at, np.median(norms, axis=0), color=colour, linewidth=1.2, label=case)
        ax.fill_between(at, norms.min(0), norms.max(0), color=colour, alpha=0.15, linewidth=0)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_yscale("log")
    return finish(ax, "", "position", "norm of the residual stream after the sink layer", legend=True)
