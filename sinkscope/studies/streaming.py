"""streaming-llm: evict the first tokens from a sliding window, or keep a few (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, RecomputeWindow, ReplaceToken, SinkWindow, StreamingWindow, Window
from sinkscope.models import adapt
from sinkscope.reports.plots import estimates
from sinkscope.studies.report import Estimate, Pictures, StudyReport, asked, losses, published, tabulate
from sinkscope.studies.texts import one_text

SINKS = (1, 2, 4, 8)
PLACEBO = "placebo: 4 later keys kept"


def streaming_llm(
    model: Any,
    text: Any = None,
    *,
    budget: int = 256,
    score_from: int | None = None,
    max_tokens: int | None = 4096,
    recompute: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Compare windows of one budget of keys, with and without the first tokens, on one long text.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, as for :func:`sinkscope.evaluate`; None for the reference that comes with Python.
        budget: keys in every window, sinks included.
        score_from: first position scored; by default twice the budget, where every window has evicted.
        max_tokens: keep at most this many tokens, BOS included.
        recompute: run the slow baseline as well: the model anew on the last `budget` tokens, for every token.
        seed: of the placebo, which keeps four later keys instead of the first four.
        progress: show a progress bar on stderr.

    Returns:
        A report with perplexity and difference of loss under each window; intervals are across blocks of the one text.

    Raises:
        SinkscopeError: as :func:`sinkscope.evaluate`; a budget too small for eight sinks.
    """
    if budget <= max(SINKS):
        raise SinkscopeError(f"budget={budget}: more than {max(SINKS)} keys are needed")
    adapter = adapt(model)
    tokens = one_text(adapter, text, max_tokens)
    regimes: dict[str, Intervention] = {"window": Window(budget)}
    regimes |= {f"{n} sink{'s' * (n > 1)}": SinkWindow(budget, sinks=n) for n in SINKS}
    regimes[PLACEBO] = SinkWindow(budget, sinks=4).placebo(seed)
    line_break = adapter.tokenizer("\n", add_special_tokens=False)["input_ids"] if adapter.tokenizer else []
    if line_break:
        swapped = [ReplaceToken(position, int(line_break[-1])) for position in range(4)]
        regimes["line breaks"] = swapped[0] & swapped[1] & swapped[2] & swapped[3] & SinkWindow(budget, sinks=4)
    if len(adapter.rotations) == 1 and not adapter.windows:
        regimes["cache positions"] = StreamingWindow(budget, sinks=4)
    if recompute:
        regimes["re-computation"] = RecomputeWindow(budget)
    start = 2 * budget if score_from is None else score_from
    effect = evaluate(model, tokens, list(regimes.values()), score_from=start, progress=progress)
    cases = {"dense": "none"} | {regime: str(edit) for regime, edit in regimes.items()}
    rows = losses(effect, cases, f"cache {budget}")
    table = tabulate("streaming-llm", adapter.name, rows)
    value = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    verdict, said = _say(adapter.name, budget, effect.about["texts"][0], value)
    pictures: Pictures = {"perplexity": partial(estimates, table, "perplexity", log=True), "loss": effect.loss_curve}
    return StudyReport("streaming-llm", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect})


def _say(model: str, budget: int, text: Mapping[str, Any], value: Mapping[tuple[str, str], Estimate]) -> tuple[str, str]:
    """Say what was found, and what was not."""
    dense, window, kept = (value[case, "perplexity"].value for case in ("dense", "window", "4 sinks"))
    lost = value["window", "delta_loss"]
    said = (
        f"On {text['n_tokens']} tokens of {text['label']!r}, {model} has perplexity {dense:.4g} without a window and "
        f"{window:.4g} with the {budget} latest keys alone, {window / dense:.3g} times as much. "
    )
    if not lost.low > 0:
        said += "The interval of the difference includes zero: no collapse was found, so there is nothing to undo."
        return "No collapse: a window without the first token costs no more than its interval.", said
    undone = {case: round(100 * (1 - value[case, "delta_loss"].value / lost.value)) for case in ("1 sink", PLACEBO)}
    said += (
        f"Of the {lost.value:.3g} nats that this costs ({lost.low:.3g} to {lost.high:.3g}), keeping the first token in the "
        f"window undoes {undone['1 sink']}%, and keeping four later ones instead {undone[PLACEBO]}%. "
    )
    theirs = published("streaming-llm").pivot_table(index="model", columns="case", values="value", aggfunc="first")
    spread = (theirs["window"] / theirs["4 sinks"].fillna(theirs["cache positions"])).dropna().sort_values()
    ratio = window / kept
    said += (
        f"A window without sinks has {ratio:.3g} times the perplexity of one with four; published are {spread.iloc[0]:.3g} "
        f"({spread.index[0]}) to {spread.iloc[-1]:.3g} ({spread.index[-1]}), on far longer texts. "
    )
    less = spread[spread > ratio].index.tolist()
    if less:
        said += f"This model collapses less than {', '.join(less)}. "
    said += "One text: the intervals say how much its parts differ, not how much texts or models do."
    verdict = (
        f"Evicting the first token costs {lost.value:.3g} nats; keeping it alone undoes {undone['1 sink']}%, four later ones "
        f"{undone[PLACEBO]}%."
    )
    return verdict, said
