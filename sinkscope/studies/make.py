"""make-a-sink: can any token be made the sink, and by what? (Li et al. 2026, arXiv 2605.06611)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import AmplifyVariance, Intervention, ScaleOutput, SelfOnly
from sinkscope.metrics.across import SHARE, SIGNED
from sinkscope.models import adapt
from sinkscope.reports.plots import estimates
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, beside, by_text, tabulate
from sinkscope.studies.seen import Seen, check_inside
from sinkscope.studies.texts import pieces, setting

UNEDITED, ALONE, LATE = "unedited", "sees itself alone", "placebo: alone in the last third"
VARIANCE, NORM = "variance amplified", "control: norm amplified"
#: A head has a sink at a token that receives more than this from later queries (Gu et al. 2024).
EPS = 0.3


def make_a_sink(
    model: Any,
    text: Any = None,
    *,
    positions: Sequence[int] = (10, 20, 40),
    factor: float | int = 4.0,
    sequences: int = 6,
    tokens: int = 128,
    progress: bool = False,
) -> StudyReport:
    """Let a later token see itself alone, as the first one does, or amplify its attention output, and look for a sink there.

    The first token's output is not averaged over others, and so varies most from text to text. If that makes it the sink,
    then a token does as well that attends to itself alone (in all layers), or whose output's deviation from its mean over
    the text is multiplied (`AmplifyVariance`, in all layers); the same factor on the output itself (`ScaleOutput`), a larger
    norm without the variance, should not. The placebo has the token see itself alone when sinks have long formed.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        positions: the tokens, one at a time; every number is a text's mean over them.
        factor: of variance and norm.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        progress: show a progress bar on stderr.

    Returns:
        A report with, per case, `sink_rate` (share of heads in which the token receives more than 0.3 from later queries),
        what later queries pay to it, to the first token and to all others, the changes of these to the unedited run, and
        the difference of loss; intervals are across pieces.

    Raises:
        SinkscopeError: positions too near the end, or the first; as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    shortest = min(len(s) for s in sample.sequences)
    if not positions or min(positions) < 1 or max(positions) > shortest - 8:
        raise SinkscopeError(f"positions={list(positions)}: of texts of {shortest} tokens, those from 1 to {shortest - 8}")
    check_inside(adapter, sample)
    late = adapter.layers[-(len(adapter.layers) // 3 or 1) :]
    edits: dict[str, list[Intervention | None]] = {
        ALONE: [SelfOnly(k) for k in positions],
        VARIANCE: [AmplifyVariance(k, factor) for k in positions],
        NORM: [ScaleOutput(k, factor) for k in positions],
        LATE: [SelfOnly(k, layers=late) for k in positions],
    }
    plain = Seen(None, (0, *positions), name=UNEDITED)
    runs = {case: [Seen(e, (0, k)) for e, k in zip(each, positions, strict=True)] for case, each in edits.items()}
    effect = evaluate(model, sample, [plain.edit, *(r.edit for each in runs.values() for r in each)], progress=progress)
    n = len(adapter.layers)
    before = [_paid(plain.found(n), k, 1 + i) for i, k in enumerate(positions)]
    numbers = {UNEDITED: np.mean(before, axis=0)}
    of = f"{setting(sample)}, tokens {', '.join(map(str, positions))}"
    rows: list[Row] = []
    for case, each in runs.items():
        numbers[case] = np.mean([_paid(run.found(n), k, 1) for run, k in zip(each, positions, strict=True)], axis=0)
        lost = np.mean([by_text(effect, str(run.edit)) for run in each], axis=0)
        rows.append((case, "delta_loss", Estimate.of(lost), of))
    for case, values in numbers.items():
        for name, here, plainly in zip(
            ("sink_rate", "to_token", "to_first", "to_others"), values.T, numbers[UNEDITED].T, strict=True
        ):
            rows.append((case, name, Estimate.of(here, bounds=SHARE), of))
            if case != UNEDITED:
                rows.append((case, f"{name}_change", Estimate.of(here - plainly, bounds=SIGNED), of))
    table = tabulate("make-a-sink", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, of, factor, value)
    said += beside(table)
    pictures = {
        "rates": partial(estimates, table, "sink_rate", unit="share of heads"),
        "changes": partial(estimates, table, "to_first_change", unit="share of later queries' attention"),
    }
    return StudyReport("make-a-sink", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect})


def _paid(found: list[list[torch.Tensor]], k: int, column: int) -> np.ndarray:
    """Give, by text, the share of heads with a sink at k, and what queries after k pay to it, to token 0, to the others."""
    each = []
    for layers in found:
        weights = torch.stack(layers).double()[:, :, k + 1 :]  # [layer, head, query, watched]
        here, first = weights[..., column], weights[..., 0]
        rate, to, zero = (here.mean(-1) > EPS).double().mean(), here.mean(), first.mean()
        each.append([float(rate), float(to), float(zero), float(1 - to - zero)])
    return np.array(each)


def _say(model: str, of: str, factor: float, value: Mapping[tuple[str, str], Estimate]) -> tuple[str, str]:
    """Say what was found, and what was not: made is a sink whose rate rises by more than the placebo's interval."""
    gain = {case: value[case, "sink_rate_change"] for case in (ALONE, VARIANCE, NORM, LATE)}
    made = {case: gain[case].low > max(0.0, gain[LATE].high) for case in (ALONE, VARIANCE, NORM)}
    rates = {case: value[case, "sink_rate"] for case in (UNEDITED, *gain)}
    verdict = (
        f"A token that sees itself alone becomes a sink in {rates[ALONE].value:.2f} of the heads"
        if made[ALONE]
        else f"A token that sees itself alone becomes no sink ({rates[ALONE].value:.2f} of the heads)"
    ) + f" (before: {rates[UNEDITED].value:.2f}); "
    verdict += {
        (True, False): "so does one whose variance is amplified, and not one whose norm is.",
        (True, True): "so does one whose variance is amplified, but a larger norm does it as well.",
        (False, False): f"amplifying its variance, or its norm, {factor:g} times makes none.",
        (False, True): "amplifying its norm makes one, and its variance none: the opposite of what was published.",
    }[made[VARIANCE], made[NORM]]
    said = (
        f"In {of} of {model}, later queries: the token receives more than {EPS} in {rates[UNEDITED]} of the heads unedited, "
    )
    said += (
        f"{rates[ALONE]} where it sees itself alone in all layers, {rates[LATE]} where it does so in the last third of them, "
    )
    said += (
        f"{rates[VARIANCE]} with its output's deviation from the mean times {factor:g}, {rates[NORM]} with the output itself "
    )
    said += f"times {factor:g}. "
    if made[ALONE]:
        first, rest = value[ALONE, "to_first_change"], value[ALONE, "to_others_change"]
        loser = (
            "the first token"
            if first.high < min(0.0, rest.low)
            else "the others"
            if rest.high < min(0.0, first.low)
            else "both"
        )
        said += f"Of what it gains when alone ({value[ALONE, 'to_token_change']} of later attention), {loser} pay: the first "
        said += "token's "
        said += f"share changes by {first}, that of all other tokens by {rest}. "
    cost, late = value[ALONE, "delta_loss"], value[LATE, "delta_loss"]
    said += f"Loss changes by {cost} nats per token; in the last third alone, by {late}. "
    return verdict, said + "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."
