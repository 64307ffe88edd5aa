"""emergence: when in training does a sink appear, and with which attention? (Guo et al. 2024, arXiv 2410.13835)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.metrics.across import ANY, POSITIVE, SHARE
from sinkscope.models import adapt, load_model
from sinkscope.observe import measure
from sinkscope.reports.drawing import NULL, WIDE, finish
from sinkscope.runs.progress import bar
from sinkscope.studies.bigrams import BigramBackcopy
from sinkscope.studies.report import Estimate, Pictures, Row, StudyReport, asked, losses, sinks, tabulate
from sinkscope.studies.texts import pieces, setting
from sinkscope.studies.toy import side_by_side, train

#: A sink has emerged when its mass exceeds uniform attention by this much.
MARGIN = 0.1
#: What is trained: how :func:`train` is called for each case. A learned logit that starts at 0 has to outrun the first token.
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"attention": "softmax"},
    "learned sink": {"attention": "learned sink", "logit": 4.0},
    "learned sink, from 0": {"attention": "learned sink", "logit": 0.0},
    "key bias": {"attention": "key bias"},
    "off by one": {"attention": "off by one"},
    "output gate": {"attention": "output gate"},
    "sigmoid": {"attention": "sigmoid"},
    "relu": {"attention": "relu"},
}
COLOURS = dict(
    zip(CASES, ("#D55E00", "#0072B2", "#56B4E9", "#000000", "#999999", "#E69F00", "#009E73", "#CC79A7"), strict=True)
)
FINAL = ("sink_weight", "row_sum", "value_drain", "residual_peak", "excess_loss")
CHECKPOINT_METRICS = ("sink_mass", "sink_rate@0.3", "value_drain", "massive_activation")


def emergence(
    model: Any = None,
    text: Any = None,
    *,
    checkpoints: Sequence[int] | Mapping[int, Any] | None = None,
    steps: int = 300,
    seeds: int = 3,
    sequences: int = 16,
    tokens: int = 256,
    progress: bool = False,
) -> StudyReport:
    """Train small models with several kinds of attention, and watch the sink; or look at the checkpoints of a large one.

    The task is Bigram-Backcopy: a Markov chain with triggers, after which the token before the trigger is repeated. With
    softmax a row must go somewhere. The controls need not: a logit may take the row, learned (once where it starts at 4, and
    once where it starts at 0 and has to outrun the first token), a bias of the keys, or always 0 (off by one); an output gate
    may close; sigmoid and ReLU weigh each key by itself.

    Args:
        model: not looked at when training from scratch; else the model's hub name, such as "EleutherAI/pythia-14m".
        text: for checkpoints, as for the other studies.
        checkpoints: steps of training, each a revision "stepN" on the hub; or a mapping from step to model.
        steps: of training from scratch.
        seeds: models trained per case, at least two; intervals are across them.
        sequences: for checkpoints, pieces of the text.
        tokens: for checkpoints, of each piece.
        progress: show a progress bar on stderr.

    Returns:
        A report with, after the last step and of the most sinking head, `sink_mass` (the first token's share of a row), its
        weight and the row's sum as they are, value drain, residual peak and loss, and the step at which the sink has emerged:
        its mass exceeds uniform attention by 0.1 from there on. For checkpoints, a case per step.

    Raises:
        SinkscopeError: checkpoints without a model's name, fewer than two seeds; as :func:`sinkscope.load_model`.
    """
    if checkpoints is not None:
        return _checkpoints(model, text, checkpoints, sequences, tokens, progress)
    if seeds < 2:
        raise SinkscopeError(f"seeds={seeds}: one model has no interval; train at least two")
    task = BigramBackcopy()

    def trained(of: tuple[str, int]) -> pd.DataFrame:
        case, seed = of
        return train(task, steps=steps, seed=seed, every=max(1, steps // 8), **CASES[case]).assign(case=case)

    runs = []
    with bar(progress, len(CASES) * seeds, "emergence", "model") as tick:
        for run in side_by_side(trained, product(CASES, range(seeds))):
            runs.append(run)
            tick(1)
    history = pd.concat(runs, ignore_index=True)
    of = f"{steps} steps, {seeds} seeds"
    rows: list[Row] = []
    for case in CASES:
        here = history[history["case"] == case]
        last = here[here["step"] == steps]
        rows.append((case, "sink_mass", Estimate.of(last["sink_mass"], float(last["null"].iloc[0]), SHARE), of))
        rows += [
            (case, name, Estimate.of(last[name], bounds=ANY if name == "excess_loss" else POSITIVE), of) for name in FINAL
        ]
        emerged = [emerges(run) for _, run in here.groupby("seed")]
        reached = sum(not math.isnan(step) for step in emerged)
        if reached:
            rows.append((case, "emergence_step", Estimate.of(emerged, bounds=POSITIVE), f"{of}, {reached} of which reach it"))
    table = tabulate("emergence", "bigram-backcopy", rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(value, of, history)
    pictures: Pictures = {
        name: partial(_series, history, name)
        for name in ("sink_mass", "sink_weight", "value_drain", "residual_peak", "excess_loss")
    }
    about = {"model": "bigram-backcopy", "task": repr(task), "steps": steps, "seeds": seeds}
    return StudyReport("emergence", asked(__doc__), table, verdict, said, about, pictures)


def emerges(run: pd.DataFrame) -> float:
    """Give the first step from which on the sink mass exceeds uniform attention by `MARGIN`; NaN if it does not last.

    >>> emerges(pd.DataFrame({"step": [0, 50, 100, 150], "sink_mass": [0.1, 0.3, 0.4, 0.5], "null": [0.06] * 4}))
    50.0
    """
    above = (run["sink_mass"] - run["null"] > MARGIN).to_numpy()
    if not above[-1]:
        return math.nan
    first = len(above) - int((~above[::-1]).argmax()) if not above.all() else 0
    return float(run["step"].iloc[first])


def _say(value: Mapping[tuple[str, str], Estimate], of: str, history: pd.DataFrame) -> tuple[str, str]:
    """Say what was found, and what was not: a sink has grown where the interval of its mass lies above uniform attention."""
    mass = {case: value[case, "sink_mass"] for case in CASES}
    null = mass["softmax"].null
    grown = [case for case in CASES if mass[case].low > null]
    none = [case for case in CASES if case not in grown]
    verdict = f"A sink grows with: {'; '.join(grown) or 'nothing'}. None is shown with: {'; '.join(none) or 'nothing'}."
    said = (
        f"After {of}, the first token's share of a row in the most sinking head is "
        + ", ".join(f"{mass[case]} ({case})" for case in CASES)
        + f"; uniform attention would give {null:.3g}. Its weight, as it is, is "
        + ", ".join(f"{value[case, 'sink_weight'].value:.2g} ({case})" for case in CASES)
        + ". "
    )
    if ("softmax", "emergence_step") in value:
        last = history[(history["step"] == history["step"].max()) & (history["case"] == "softmax")]
        trigger, other = (float(last[c].mean()) for c in ("sink_mass_trigger", "sink_mass_other"))
        step, drain, peak = (value["softmax", name] for name in ("emergence_step", "value_drain", "residual_peak"))
        said += (
            f"With softmax the sink has emerged at step {step}; queries that are triggers pay it {trigger:.2g}, the others "
            f"{other:.2g}. The norm of its value is then {drain} of the median, and its largest activation {peak} times the "
            "median. "
        )
    said += "A toy on one task: it shows which attention is enough for a sink here, not why language models have one."
    return verdict, said


def _checkpoints(
    model: Any, text: Any, steps: Sequence[int] | Mapping[int, Any], sequences: int, tokens: int, progress: bool
) -> StudyReport:
    """Measure the same text at every checkpoint."""
    if not isinstance(steps, Mapping):
        if not isinstance(model, str):
            raise SinkscopeError("checkpoints are loaded by name: pass the model's hub name, or a mapping from step to model")
        steps = {int(step): f"{model}@step{step}" for step in steps}
    rows: list[Row] = []
    series: list[dict[str, float]] = []
    name, reports = str(model), {}
    with bar(progress, len(steps), "emergence", "checkpoint") as tick:
        for step, given in sorted(steps.items()):
            loaded = load_model(given) if isinstance(given, str) else given
            name = name if isinstance(model, str) else adapt(loaded).name
            sample = pieces(adapt(loaded), text, count=sequences, size=tokens)
            report = measure(loaded, sample, list(CHECKPOINT_METRICS))
            case = f"step {step}"
            here = sinks(report, case, CHECKPOINT_METRICS, setting(sample))
            here += losses(evaluate(loaded, sample, Intervention()), {case: "none"}, setting(sample))
            rows += here
            reports[f"step-{step}"] = report
            series.append({"step": step} | {quantity: estimate.value for _, quantity, estimate, _ in here})
            tick(1)
    table = tabulate("emergence", name, rows)
    history = pd.DataFrame(series)
    null = next(estimate.null for _, quantity, estimate, _ in rows if quantity == "sink_mass")
    history = history.assign(case=name, seed=0, null=null)
    at = emerges(history)
    first, last = history.iloc[0], history.iloc[-1]
    verdict = f"The sink has emerged by step {at:.0f}." if not math.isnan(at) else "No sink has emerged at these checkpoints."
    said = (
        f"From step {first['step']:.0f} to {last['step']:.0f} of {name}, the mass on the first token goes from "
        f"{first['sink_mass']:.2g} to {last['sink_mass']:.2g} (uniform attention: {null:.2g}), its value's norm from "
        f"{first['value_drain']:.2g} to {last['value_drain']:.2g} of the median, the largest activation from "
        f"{first['massive_activation']:.3g} to {last['massive_activation']:.3g} times the median, and perplexity from "
        f"{first['perplexity']:.3g} to {last['perplexity']:.3g}. Between checkpoints nothing is known."
    )
    pictures: Pictures = {quantity: partial(_series, history, quantity) for quantity in (*CHECKPOINT_METRICS, "perplexity")}
    return StudyReport("emergence", asked(__doc__), table, verdict, said, {"model": name}, pictures, reports)


def _series(history: pd.DataFrame, quantity: str, *, ax: Axes | None = None) -> Axes:
    """Draw a quantity by step: the mean of the seeds and their range, one colour per case, chance dashed."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    for case, run in history.groupby("case", sort=False):
        by_step = run.groupby("step")[quantity]
        mean, colour = by_step.mean(), COLOURS.get(str(case), COLOURS["softmax"])
        ax.plot(mean.index, mean, "o-", color=colour, markersize=2.5, linewidth=1.2, label=str(case))
        if run["seed"].nunique() > 1:
            ax.fill_between(mean.index, by_step.min(), by_step.max(), color=colour, alpha=0.2, linewidth=0)
    if quantity == "sink_mass":
        ax.axhline(float(history["null"].iloc[0]), color=NULL, linestyle="--", linewidth=1, label="uniform attention")
    if quantity in ("residual_peak", "massive_activation", "perplexity"):
        ax.set_yscale("log")
    names = {"sink_mass": "attention to the first token", "excess_loss": "loss above the best (nats)"}
    return finish(ax, "", "step of training", names.get(quantity, quantity), legend=True)
