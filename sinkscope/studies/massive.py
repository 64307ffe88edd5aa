"""massive-activations: what do a few numbers of the residual stream do to loss and sink? (Sun et al. 2024, 2402.17762)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import EditActivation, Intervention
from sinkscope.metrics.across import SIGNED
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.intervals import bounds_of
from sinkscope.reports.plots import estimates
from sinkscope.studies.report import Estimate, StudyReport, asked, losses, tabulate
from sinkscope.studies.texts import pieces, setting
from sinkscope.tokens import Tokens

METRICS = ("sink_rate@0.3", "sink_mass")
PLACEBO = "placebo: other dimensions zeroed"


def massive_activations(
    model: Any,
    text: Any = None,
    *,
    sequences: int = 8,
    tokens: int = 256,
    ratio: float | int = 1000,
    score_from: int = 1,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Locate massive activations in each text, and set them to zero, to their mean, and others in their place.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        ratio: how many times the median magnitude makes an activation massive.
        score_from: first position scored.
        seed: of the placebo, which zeroes as many other dimensions of the same tokens.
        progress: show a progress bar on stderr.

    Returns:
        A report with perplexity, difference of loss, sink rate, its change, and sink mass under each edit; intervals are
        across pieces. Where nothing is massive, it holds the unedited run alone, and says what is largest.

    Raises:
        SinkscopeError: as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    sample = pieces(adapter, text, count=sequences, size=tokens)
    zero = EditActivation(0.0, ratio=ratio)
    cases: dict[str, Intervention | None] = {
        "unedited": None,
        "set to zero": zero,
        "set to mean": EditActivation("mean", ratio=ratio),
        PLACEBO: zero.placebo(seed),
    }
    found, largest = _locate(model, sample, zero)
    if len(found) < len(sample):
        cases = {"unedited": None}
    edits = [edit for edit in cases.values() if edit is not None] or [Intervention()]
    effect = evaluate(model, sample, edits, score_from=score_from, progress=progress)
    of = setting(sample)
    rows = losses(effect, {case: "none" if edit is None else str(edit) for case, edit in cases.items()}, of)
    located: dict[str, list[Any]] = {"unedited": [None] * len(sample)}
    if "set to mean" in cases:
        means = [replace(e, to="mean").located(model, t) for e, t in zip(found, _one_by_one(sample), strict=True)]
        located |= {"set to zero": found, "set to mean": means, PLACEBO: [e.placebo(seed) for e in found]}
    sinks = {case: _sinks(model, sample, edits) for case, edits in located.items()}
    for case, each in sinks.items():
        rows += [(case, metric, Estimate.of(values, bounds=bounds_of(metric)), of) for metric, values in each.items()]
        if case != "unedited":
            pairs = zip(each["sink_rate@0.3"], sinks["unedited"]["sink_rate@0.3"], strict=True)
            rows.append((case, "sink_rate_change", Estimate.of([a - b for a, b in pairs], bounds=SIGNED), of))
    table = tabulate("massive-activations", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, sample, value, found, largest)
    pictures = {
        "rates": partial(estimates, table, "sink_rate@0.3", unit="share of heads"),
        "perplexity": partial(estimates, table, "perplexity", log=True),
    }
    return StudyReport("massive-activations", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect})


def _one_by_one(sample: Tokens) -> list[Tokens]:
    return [Tokens((s,), sample.bos) for s in sample.sequences]


def _locate(model: Any, sample: Tokens, edit: EditActivation) -> tuple[list[Any], str]:
    """Find the massive activations of each text; where there are none, say what is largest."""
    found, largest = [], ""
    for one in _one_by_one(sample):
        try:
            found.append(edit.located(model, one))
        except SinkscopeError as error:
            if "no activation is at least" not in str(error):
                raise
            largest = str(error).partition("The largest is ")[2].partition(": pass")[0]
    return found, largest


def _sinks(model: Any, sample: Tokens, edits: list[Any]) -> dict[str, list[float]]:
    """Measure the sink under an edit of the residual stream, which the engines leave in place; each text has its own."""
    each: dict[str, list[float]] = {m: [] for m in METRICS}
    for one, edit in zip(_one_by_one(sample), edits, strict=True):
        with nullcontext() if edit is None else edit.on(model):
            report = measure(model, one, list(METRICS))
        for name, value in report.summary("all").set_index("metric")["value"].items():
            each[str(name)].append(float(value))
    return each


def _say(
    model: str, sample: Tokens, value: Mapping[tuple[str, str], Estimate], found: list[Any], largest: str
) -> tuple[str, str]:
    """Say what was found, and what was not."""
    start = f"In {setting(sample)}, "
    if len(found) < len(sample):
        where = f" in {len(sample) - len(found)} of {len(sample)} texts" if found else ""
        verdict = f"No massive activation{where}: there is nothing to edit."
        return (
            verdict,
            f"{start}{model} has no massive activation{where}: the largest is {largest}. Nothing is edited.",
        )
    edits = [(e.layers[0], e.positions, e.dims) for e in found]
    (layer, positions, dims), times = Counter(edits).most_common(1)[0]
    places = ", ".join(f"dimension {dim} of token {at}" for at, dim in zip(positions, dims, strict=True))
    lost, kept, other = (value[case, "delta_loss"] for case in ("set to zero", "set to mean", PLACEBO))
    change = value["set to zero", "sink_rate_change"]
    rates = {case: value[case, "sink_rate@0.3"] for case in ("unedited", "set to zero", "set to mean")}
    said = (
        f"{start}{model} has massive activations; in {times} of them after layer {layer}: {places}. Set to zero there, "
        f"the loss changes by {lost} nats; set to their mean, by {kept}; as many other dimensions set to zero, by {other}. "
        f"The share of heads with a sink (0.3) is {rates['unedited']} unedited, {rates['set to zero']} zeroed and "
        f"{rates['set to mean']} at the mean; zeroing changes it by {change}, text by text. "
    )
    hurts, fewer = lost.low > max(0.0, other.high), change.high < 0
    if not hurts:
        said += "Zeroing them costs no more than its interval or the placebo: a null result. "
    verdict = (
        f"Set to zero, {len(dims)} of them cost {lost.value:.3g} nats" if hurts else "Set to zero, no cost of them is shown"
    )
    verdict += f" (to their mean, {kept.value:.3g}); "
    rate = f"from {rates['unedited'].value:.2f} to {rates['set to zero'].value:.2f}"
    verdict += f"heads with a sink go {rate}." if fewer else f"no fall of the sink rate is shown ({rate})."
    said += (
        "This says what this model does when they are zeroed, far from anything that it has seen; not that they make the "
        "sink: models are known that have sinks and no massive activations. "
    )
    said += "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."
    return verdict, said
