"""secondary-sinks: which later tokens come to look like the first, where, and by which MLP? (Wong et al. 2512.22213)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sinkscope.edit import Where
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.metrics.across import POSITIVE, SHARE
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import MARK, WIDE, finish, visible
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, tabulate
from sinkscope.studies.texts import pieces, setting
from sinkscope.tokens import TextTokens, Tokens

#: A layer is the first token's own where its norm is this many times the median, and a token is like it there from this
#: |cosine| on. A sink's lifetime is noise up to a tenth of the model's layers, and the
#: first token's own from three quarters of its layers on (Wong et al.: more than 4 layers, and 15 fewer than there are).
UP, LIKE, NOISE, WHOLE = 2.0, 0.9, 0.1, 0.75
SILENT, PLACEBO = "MLP of the layer of birth silenced", "placebo: MLP of the layer before"
SECONDARY, AS_FIRST, BRIEF = "secondary sinks", "as long as the first token", "brief (noise)"
PUBLISHED = "secondary sinks, published rule"
#: Sinks whose MLP is taken away, at most, and queries that a key needs before what it receives says anything.
EDITED, QUERIES = 8, 32


class Sink(NamedTuple):
    """A later token that is like the first one: in which layer first, in how many, and what it receives there."""

    text: str
    position: int
    token: str
    birth: int
    life: int
    kind: str
    received: float
    beside: float


@dataclass(frozen=True, eq=False)
class _QuietMlp(Intervention):
    """Takes away what a layer's MLP writes at one token (but for a bias)."""

    touches: ClassVar[frozenset[str]] = frozenset({"neurons"})
    positions: Where = (0,)

    def mlp(self, layer: int, activations: Tensor) -> Tensor:
        here = torch.isin(torch.arange(activations.shape[1]), torch.tensor(self.positions)).to(activations.device)
        return activations.masked_fill(here[None, :, None], 0.0)


def secondary_sinks(
    model: Any, text: Any = None, *, sequences: int = 8, tokens: int = 256, progress: bool = False
) -> StudyReport:
    """Look for later tokens whose residual stream points where the first one's does, and take away the MLP that made it so.

    In the layers of the first token, where its norm is more than twice the text's median, a token is like it if the absolute
    cosine of their residual streams exceeds 0.9. (Wong et al. look from the largest rise of its norm to its largest fall,
    which leaves out a smaller rise before; both counts are given.) By how many layers that holds, it is a secondary sink,
    noise, or as long-lived as the first token itself. Of up to eight secondary sinks, the MLP of the layer of birth is
    silenced at that token; the placebo silences the MLP of the layer before.

    Args:
        model: as for :func:`sinkscope.measure`; a TransformerLens model.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        progress: show a progress bar on stderr.

    Returns:
        A report with `positions_per_text` of each kind; of secondary sinks `birth` and `lifetime` as shares of the layers,
        and `received` beside that of the next token in the same layers; `lifetime_left`, the share of the lifetime that is
        left without the MLP. Intervals are across pieces, of `lifetime_left` across sinks.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`; an encoder.
    """
    adapter = adapt(model)
    if not adapter.causal:
        raise SinkscopeError(f"{adapter.name} is an encoder: its first token sees all others, and none comes later")
    sample = pieces(adapter, text, count=sequences, size=tokens)
    metrics = ["sink_cosine", "residual_norm", "received_profile"]
    report = measure(model, sample, metrics, per_text=True, progress=progress)
    grids = {s.label: _grids(report.frame, s.label) for s in sample.sequences}
    window = {label: norm[:, 0] > UP * np.median(norm, axis=1) for label, (_, norm, _) in grids.items()}
    spans = {label: span(norm[:, 0]) for label, (_, norm, _) in grids.items()}
    found, theirs = (
        [sink for s in sample.sequences for sink in sinks_of(s, *grids[s.label], layers[s.label])]
        for layers in (window, spans)
    )
    of, n = setting(sample), len(adapter.layers)
    rows: list[Row] = []
    for kind in (SECONDARY, AS_FIRST, BRIEF):
        counts = [float(sum(s.kind == kind and s.text == label for s in found)) for label in grids]
        rows.append((kind, "positions_per_text", Estimate.of(counts, bounds=POSITIVE), of))
    counts = [float(sum(s.kind == SECONDARY and s.text == label for s in theirs)) for label in grids]
    rows.append((PUBLISHED, "positions_per_text", Estimate.of(counts, bounds=POSITIVE), of))
    largest = [float(np.abs(c[window[label], 1:]).max()) for label, (c, _, _) in grids.items() if window[label].any()]
    rows.append(("the most similar later token", "cosine", Estimate.of(largest, bounds=SHARE), of))
    secondary = [s for s in found if s.kind == SECONDARY and s.position + QUERIES < tokens]
    by_text = pd.DataFrame(secondary, columns=Sink._fields).groupby("text")[["birth", "life", "received", "beside"]].mean()
    if secondary:
        rows.append((SECONDARY, "birth", Estimate.of(by_text["birth"] / n, bounds=SHARE), of))
        rows.append((SECONDARY, "lifetime", Estimate.of(by_text["life"] / n, bounds=SHARE), of))
        rows.append((SECONDARY, "received", Estimate.of(by_text["received"], bounds=SHARE), of))
        rows.append(("the token after it", "received", Estimate.of(by_text["beside"], bounds=SHARE), of))
        rows += _made_by(model, adapter.layers, sample, secondary[:EDITED], window)
    table = tabulate("secondary-sinks", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, secondary, value)
    said += beside(table)
    chosen = secondary[0] if secondary else None
    picture = partial(_draw, *grids[chosen.text if chosen else sample.sequences[0].label][:1], chosen)
    return StudyReport("secondary-sinks", asked(__doc__), table, verdict, said, report.about, {"cosines": picture})


def span(norms: np.ndarray) -> np.ndarray:
    """Tell which layers lie from the largest rise of a norm to the largest fall after it.

    >>> span(np.array([1.0, 2.0, 90.0, 91.0, 92.0, 10.0])).tolist()
    [False, False, True, True, True, False]
    """
    steps, layers = np.diff(norms), np.arange(len(norms))
    rise = int(steps.argmax()) + 1
    after = steps[rise:]
    fall = rise + 1 + int(after.argmin()) if len(after) and after.min() < 0 else len(norms)
    return np.asarray((layers >= rise) & (layers < fall))


def _grids(frame: pd.DataFrame, label: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give cosine, norm and what is received, `[layer, position]`, of one text."""
    here = frame[frame["text"] == label]
    axes = {"sink_cosine": "query", "residual_norm": "query", "received_profile": "key"}
    wide = (here[here["metric"] == m].pivot(index="layer", columns=axis, values="value") for m, axis in axes.items())
    cosine, norm, received = (w.to_numpy(float) for w in wide)
    return cosine, norm, received


def sinks_of(s: TextTokens, cosine: np.ndarray, norm: np.ndarray, received: np.ndarray, window: np.ndarray) -> list[Sink]:
    """List the later tokens of a text that are like the first in some layer of `window`."""
    like = (np.abs(cosine) > LIKE) & window[:, None]
    made = []
    for k in (np.flatnonzero(like[:, 1:].any(0)) + 1).tolist():
        life, at = int(like[:, k].sum()), np.flatnonzero(like[:, k])
        kind = AS_FIRST if life >= WHOLE * window.sum() else SECONDARY if life > NOISE * len(cosine) else BRIEF
        taken = (float(received[at, j].mean()) for j in (k, min(k + 1, len(s) - 1)))
        made.append(Sink(s.label, k, s.strings[k], int(at[0]), life, kind, *taken))
    return made


def _made_by(
    model: Any, layers: tuple[int, ...], sample: Tokens, sinks: list[Sink], window: Mapping[str, np.ndarray]
) -> list[Row]:
    """Silence the MLP of the layer of birth at each sink, and that of the layer before: how much of its life is left?"""
    texts = {s.label: Tokens((s,), sample.bos) for s in sample.sequences}
    left: dict[str, list[float]] = {SILENT: [], PLACEBO: []}
    for sink in sinks:
        for case, place in zip(left, (sink.birth, max(0, sink.birth - 1)), strict=True):
            with _QuietMlp(sink.position, layers=layers[place]).on(model):
                frame = measure(model, texts[sink.text], ["sink_cosine"], per_text=True).frame
            cosine = frame[frame["text"] == sink.text].pivot(index="layer", columns="query", values="value").to_numpy(float)
            like = np.abs(cosine[window[sink.text], sink.position]) > LIKE
            left[case].append(float(like.sum()) / sink.life)
    return [(case, "lifetime_left", Estimate.of(v, bounds=POSITIVE), f"{len(v)} sinks") for case, v in left.items()]


def _say(model: str, of: str, sinks: list[Sink], value: Mapping[tuple[str, str], Estimate]) -> tuple[str, str]:
    """Say what was found, and what was not."""
    count, nearest = value[SECONDARY, "positions_per_text"], value["the most similar later token", "cosine"]
    said = f"In {of}, {model} has {count} secondary sinks a text; as long-lived as the first token are "
    said += f"{value[AS_FIRST, 'positions_per_text']}, brief {value[BRIEF, 'positions_per_text']}. "
    said += "From the largest rise of its norm to the largest fall alone, as published, it is "
    said += f"{value[PUBLISHED, 'positions_per_text']}. "
    if not math.isnan(nearest.value):
        said += f"The most similar later token reaches a cosine of {nearest} with the first. "
    tail = "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."
    if math.isnan(nearest.value):
        return "No secondary sink: the first token's norm stands out in no layer.", said + tail
    if not sinks:
        return f"No secondary sink: no later token stays like the first (largest cosine {nearest.value:.2f}).", said + tail
    words = ", ".join(f"{visible(w)!r} ({n})" for w, n in Counter(s.token for s in sinks).most_common(3))
    got, beside = value[SECONDARY, "received"], value["the token after it", "received"]
    gone, placebo = (
        value[case, "lifetime_left"] for case in ("MLP of the layer of birth silenced", "placebo: MLP of the layer before")
    )
    said += f"They are most often {words}, are born at {value[SECONDARY, 'birth']} of the depth, last "
    said += f"{value[SECONDARY, 'lifetime']} "
    said += f"of the layers, and receive {got} of what later queries have, the token after them {beside}. Without the MLP of "
    said += "the layer "
    said += f"of birth, {gone} of the lifetime is left; without that of the layer before, {placebo}. "
    made = gone.high < min(1.0, placebo.low)
    verdict = f"{count.value:.2g} secondary sinks a text, most often {words.partition(' (')[0]}; "
    verdict += "the MLP of the layer of birth makes them" if made else "no single MLP was shown to make them"
    verdict += f", and they receive {'more than' if got.low > beside.high else 'no more than'} the token after."
    return verdict, said + tail


def _draw(cosine: np.ndarray, sink: Sink | None, *, ax: Axes | None = None) -> Axes:
    """Draw the absolute cosine with the first token by layer and position of one text; a sink's birth is marked."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    image = ax.imshow(np.abs(cosine), aspect="auto", interpolation="nearest", vmin=0, vmax=1)
    ax.figure.colorbar(image, ax=ax).set_label("|cosine| with the first token", fontsize=8)
    if sink is not None:
        ax.plot([sink.position], [sink.birth], "o", color=MARK, markerfacecolor="none", markersize=8)
        ax.annotate(
            visible(sink.token), (sink.position, sink.birth), (6, 6), textcoords="offset points", color="white", fontsize=7
        )
    return finish(ax, "", "position", "layer")
