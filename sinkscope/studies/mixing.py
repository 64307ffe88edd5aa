"""over-mixing: does the sink slow the spread of a change from token to token? (Barbero et al. 2025, arXiv 2504.02732)."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from sinkscope.capture.residuals import editing_residuals
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, MaskKeys
from sinkscope.metrics.across import POSITIVE
from sinkscope.models import Adapter, adapt
from sinkscope.reports.drawing import WIDE, finish
from sinkscope.reports.plots import estimates
from sinkscope.runs.progress import bar
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, tabulate
from sinkscope.studies.texts import pieces, setting

INTACT, MASKED, REMOVED = "sink intact", "sink masked", "first token removed"
LATE, PLACEBO = "sink masked in the upper half", "placebo: another key masked there"


def over_mixing(
    model: Any,
    text: Any = None,
    *,
    sequences: int = 16,
    tokens: int = 64,
    changes: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Change one token, and measure how far the change spreads over layers and later tokens, with and without the sink.

    For every text, `changes` positions are drawn, none before the eighth nor among the last eight; the token there becomes
    another one of the same text. The spread is the relative change of the residual stream of later tokens,
    norm(h' - h) / norm(h), after each layer: averaged over changes by distance, then over distances. It is measured with the
    sink intact, with token 0 masked for all others, and with token 0 removed from the input; but then the next token may
    become the sink. So it is also measured with token 0 masked in the upper half of the layers alone, when the sink has
    formed, and with another key masked there instead, which decides what is said.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        changes: positions changed in each, one at a time.
        seed: of the positions, the new tokens, and the placebo's key, which is one before every change.
        progress: show a progress bar on stderr.

    Returns:
        A report with `spread` (mean over layers) and `spread_last_layer` per case, and `spread_change`: the difference to the
        intact run, paired by text. Intervals are across texts, each the mean of its changes.

    Raises:
        SinkscopeError: texts too short; as :func:`sinkscope.evaluate`.
        InertHookError: this model would discard the mask.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    shortest = min(len(s) for s in sample.sequences)
    if shortest < 24:
        raise SinkscopeError(f"a text of {shortest} tokens: at least 24 are needed to change one and look at later ones")
    upper, other = adapter.layers[len(adapter.layers) // 2 :], int(np.random.default_rng(seed).integers(2, 8))
    edits: dict[str, Intervention | None] = {INTACT: None, MASKED: MaskKeys(0), REMOVED: None}
    edits |= {LATE: MaskKeys(0, layers=upper), PLACEBO: MaskKeys(other, layers=upper)}
    generator = torch.Generator().manual_seed(seed)
    plans = [_changes(s.ids, changes, generator) for s in sample.sequences]
    spread: dict[str, list[Tensor]] = {case: [] for case in edits}
    with bar(progress, len(edits) * len(sample) * len(adapter.layers), "over-mixing") as tick:
        for case, edit in edits.items():
            with nullcontext() if edit is None else edit.on(model):
                for batch, places in plans:
                    start = 1 if case == REMOVED else 0
                    spread[case].append(_spread(adapter, batch[:, start:], places - start))
                    tick(len(adapter.layers))
    of = f"{setting(sample)}, {changes} changes each"
    mean = {case: [float(s.nanmean()) for s in each] for case, each in spread.items()}
    rows: list[Row] = []
    for case, each in spread.items():
        rows.append((case, "spread", Estimate.of(mean[case], bounds=POSITIVE), of))
        rows.append((case, "spread_last_layer", Estimate.of([float(s[-1].nanmean()) for s in each], bounds=POSITIVE), of))
        if case != INTACT:
            change = Estimate.of([a - b for a, b in zip(mean[case], mean[INTACT], strict=True)])
            rows.append((case, "spread_change", change, of))
    table = tabulate("over-mixing", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, value)
    width = min(s.shape[1] for s in spread[REMOVED])
    grids = {case: torch.stack([s[:, :width] for s in spread[case]]).nanmean(0) for case in (INTACT, LATE)}
    pictures = {
        "layers": partial(_layers, spread),
        "spread": partial(estimates, table, "spread", unit="relative change of later tokens"),
        "heatmap": partial(_heatmap, grids[INTACT], f"{adapter.name}, {INTACT}"),
        "heatmap-masked": partial(_heatmap, grids[LATE], f"{adapter.name}, {LATE}"),
    }
    return StudyReport("over-mixing", asked(__doc__), table, verdict, said, adapter.describe(), pictures)


def _changes(ids: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give the text and `count` copies with one token changed, `[1 + count, position]`, and the positions."""
    places = 8 + torch.randperm(len(ids) - 16, generator=generator)[:count]
    batch = ids.repeat(1 + len(places), 1)
    for row, place in enumerate(places.tolist(), start=1):
        others = ids[1:][ids[1:] != ids[place]]
        if not len(others):
            raise SinkscopeError("a text of one token repeated has no other token to change to")
        batch[row, place] = others[int(torch.randint(len(others), (), generator=generator))]
    return batch, places


def _spread(adapter: Adapter, batch: Tensor, places: Tensor) -> Tensor:
    """Give the relative change of the residual stream, `[layer, distance]`, mean over changes; NaN past the text's end."""
    seen: list[Tensor] = []

    def look(layer: int, residual: Tensor) -> Tensor:
        h = residual.detach().float()
        change = (h[1:] - h[:1]).norm(dim=-1) / h[:1].norm(dim=-1)
        by_distance = torch.full_like(change, torch.nan)
        for row, place in enumerate(places.tolist()):
            by_distance[row, : change.shape[1] - place] = change[row, place:]
        seen.append(by_distance[:, 1:].nanmean(0).cpu())  # the changed token itself is not spread
        return residual

    ids = batch.to(adapter.device)
    with adapter.quiet(), editing_residuals(adapter, look):
        adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))
    shortest = batch.shape[1] - 1 - int(places.min())
    return torch.stack(seen)[:, :shortest]


def _say(model: str, of: str, value: dict[tuple[str, str], Estimate]) -> tuple[str, str]:
    """Say what was found, and what was not."""
    intact = value[INTACT, "spread"]
    change = {case: value[case, "spread_change"] for case in (MASKED, REMOVED, LATE, PLACEBO)}
    late, placebo = change[LATE], change[PLACEBO]
    slows = late.low > max(0.0, placebo.high)
    further = 100 * late.value / intact.value if intact.value else 0.0
    verdict = f"Once the sink is masked a change spreads {further:+.0f}% further" + (
        ": it slows mixing." if slows else ", no more than chance: no slowing by the sink was found."
    )
    said = (
        f"In {of}, a changed token of {model} changes later tokens by {intact} of their size, mean of layers. With token 0 "
        f"masked for all others in the upper half of the layers, this changes by {late}; with another key masked there, by "
        f"{placebo}. With token 0 masked in all layers it changes by {change[MASKED]}, and with token 0 removed, by "
        f"{change[REMOVED]}: then the next token can become the sink. "
    )
    return verdict, said + "One text in pieces, and no published figure to compare with: the source shows curves."


def _layers(spread: dict[str, list[Tensor]], *, ax: Axes | None = None) -> Axes:
    """Draw spread by layer, one line per case, with the 95% interval across texts; lines that coincide lie in each other."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    colours, widths = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#595959"), (6.0, 4.5, 3.2, 1.2, 1.2)
    for case, colour, width in zip(spread, colours, widths, strict=True):
        by_text = np.array([s.nanmean(1).numpy() for s in spread[case]])
        points = [Estimate.of(column, bounds=POSITIVE) for column in by_text.T]
        layers = range(len(points))
        ax.plot(layers, [p.value for p in points], color=colour, linewidth=width, label=case)
        ax.fill_between(layers, [p.low for p in points], [p.high for p in points], color=colour, alpha=0.15, linewidth=0)
    return finish(ax, "", "layer", "relative change of later tokens", legend=True)


def _heatmap(grid: Tensor, title: str, *, ax: Axes | None = None) -> Axes:
    """Draw spread by layer and distance from the changed token."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    extent = (0.5, grid.shape[1] + 0.5, len(grid) - 0.5, -0.5)
    image = ax.imshow(grid.numpy(), aspect="auto", interpolation="nearest", extent=extent)
    ax.figure.colorbar(image, ax=ax).set_label("relative change", fontsize=8)
    return finish(ax, title, "tokens after the changed one", "layer")
