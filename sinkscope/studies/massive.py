"""massive-activations: is the sink carried by a few numbers of the residual stream? (Sun et al. 2024, arXiv 2402.17762)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import EditActivation, Intervention
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.studies.report import StudyReport, published

COLUMNS = ["model", "regime", "perplexity", "delta_loss", "low", "high", "sink_rate@0.3", "sink_mass", "source", "evidence"]


def massive_activations(
    model: Any,
    text: Any,
    *,
    ratio: float | int = 1000,
    score_from: int | None = None,
    max_tokens: int | None = 1024,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Locate massive activations in one text, and set them to zero, to their mean, and others in their place.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one text, as for :func:`sinkscope.evaluate`.
        ratio: how many times the median magnitude makes an activation massive.
        score_from: first position scored; by default 1.
        max_tokens: keep at most this many tokens, BOS included.
        seed: of the placebo, which zeroes as many other dimensions of the same tokens.
        progress: show a progress bar on stderr.

    Returns:
        A report whose `table` has the perplexity, the sink rate and the sink mass under each edit. Where nothing is massive,
        it holds the unedited run alone, and says what is largest.

    Raises:
        SinkscopeError: as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    tokens = adapter.tokenize(text, max_tokens=max_tokens)
    if len(tokens) != 1:
        raise SinkscopeError(f"one text; got {len(tokens)}")
    regimes: dict[str, Intervention] = {}
    try:
        zeroed = EditActivation(0.0, ratio=ratio).located(model, tokens)
        regimes = {
            "set to zero": zeroed,
            "set to mean": EditActivation("mean", ratio=ratio).located(model, tokens),
            "placebo: other dimensions zeroed": zeroed.placebo(seed),
        }
        found = ""
    except SinkscopeError as error:
        if "no activation is at least" not in str(error):
            raise
        found = str(error).partition("The largest is ")[2].partition(": pass")[0]
    edits = list(regimes.values()) or [Intervention()]
    effect = evaluate(model, tokens, edits, score_from=score_from or 1, progress=progress)
    summary, rows = effect.summary().set_index("intervention"), []
    for regime, edit in [("unedited", None), *regimes.items()]:
        loss = summary.loc["none" if edit is None else str(edit), ["perplexity", "delta_loss", "low", "high"]]
        rows.append((effect.about["model"], regime, *loss, *_sinks(model, tokens, edit), "", "measured"))
    ours = pd.DataFrame(rows, columns=COLUMNS)
    theirs = published("massive-activations")
    table = pd.concat([ours, theirs.reindex(columns=COLUMNS)], ignore_index=True)
    said = _say(ours.set_index("regime"), regimes.get("set to zero"), effect.about["texts"][0], found)
    return StudyReport("massive-activations", table, said, effect)


def _sinks(model: Any, tokens: Any, edit: Intervention | None) -> tuple[float, float]:
    """Measure the sink under an edit of the residual stream, which the engines leave in place."""
    if edit is None:
        report = measure(model, tokens, ["sink_rate@0.3", "sink_mass"])
    else:
        with edit.on(model):
            report = measure(model, tokens, ["sink_rate@0.3", "sink_mass"])
    values = report.summary("all").set_index("metric")["value"]
    return float(values["sink_rate@0.3"]), float(values["sink_mass"])


def _say(ours: pd.DataFrame, edit: Any, text: dict[str, Any], largest: str) -> str:
    """Say what was found, and what was not."""
    model, start = str(ours["model"].iloc[0]), f"In {text['n_tokens']} tokens of {text['label']!r}, "
    if edit is None:
        return start + f"{model} has no massive activation: the largest is {largest}. There is nothing to edit."
    places = ", ".join(f"dimension {dim} of token {at}" for at, dim in zip(edit.positions, edit.dims, strict=True))
    zero, mean, placebo = (ours.loc[r] for r in ("set to zero", "set to mean", "placebo: other dimensions zeroed"))
    said = start + f"{model} has massive activations after layer {edit.layers[0]}: {places}. "
    if zero["low"] > 0:
        said += (
            f"Set to zero there, the loss rises by {zero['delta_loss']:.3g} nats ({zero['low']:.3g} to {zero['high']:.3g})"
        )
    else:
        said += f"Set to zero there, the loss changes by {zero['delta_loss']:+.3g} nats, no more than its interval"
    plain, gone, kept = ours.loc[["unedited", "set to zero", "set to mean"], "sink_rate@0.3"].to_numpy(dtype=float)
    said += (
        f"; set to their mean, by {mean['delta_loss']:+.3g}; as many other dimensions set to zero, by "
        f"{placebo['delta_loss']:+.3g}. The share of heads with a sink (0.3) is {plain:.2f} unedited, {gone:.2f} zeroed and "
        f"{kept:.2f} at the mean. "
    )
    return said + "One text: the intervals say how much its parts differ, not how much texts or models do."
