"""streaming-llm: evict the first tokens from a sliding window, or keep a few (Xiao et al. 2023, arXiv 2309.17453)."""

from __future__ import annotations

from typing import Any

import pandas as pd

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, RecomputeWindow, ReplaceToken, SinkWindow, StreamingWindow, Window
from sinkscope.models import adapt
from sinkscope.studies.report import StudyReport, published

SINKS = (1, 2, 4, 8)
COLUMNS = ["model", "regime", "cache", "perplexity", "delta_loss", "low", "high", "source", "evidence"]


def streaming_llm(
    model: Any,
    text: Any,
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
        text: one long text, as for :func:`sinkscope.evaluate`.
        budget: keys in every window, sinks included.
        score_from: first position scored; by default twice the budget, where every window has evicted.
        max_tokens: keep at most this many tokens, BOS included.
        recompute: run the slow baseline as well: the model anew on the last `budget` tokens, for every token.
        seed: of the placebo, which keeps four later keys instead of the first four.
        progress: show a progress bar on stderr.

    Raises:
        SinkscopeError: as :func:`sinkscope.evaluate`; a budget too small for eight sinks.
    """
    if budget <= max(SINKS):
        raise SinkscopeError(f"budget={budget}: more than {max(SINKS)} keys are needed")
    adapter = adapt(model)
    tokens = adapter.tokenize(text, max_tokens=max_tokens)
    if len(tokens) != 1:
        raise SinkscopeError(f"one long text; got {len(tokens)}")
    regimes: dict[str, Intervention] = {"window": Window(budget)}
    regimes |= {f"{n} sink{'s' * (n > 1)}": SinkWindow(budget, sinks=n) for n in SINKS}
    regimes["placebo: 4 later keys kept"] = SinkWindow(budget, sinks=4).placebo(seed)
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
    rows = effect.summary().set_index("intervention")
    ours = pd.DataFrame(
        [
            (
                effect.about["model"],
                regime,
                budget,
                *rows.loc[key, ["perplexity", "delta_loss", "low", "high"]],
                "",
                "measured",
            )
            for regime, key in [("dense", "none"), *((r, str(e)) for r, e in regimes.items())]
        ],
        columns=COLUMNS,
    )
    theirs = published("streaming-llm")
    table = pd.concat([ours, theirs.reindex(columns=COLUMNS)], ignore_index=True)
    return StudyReport("streaming-llm", table, _say(ours.set_index("regime"), theirs, effect.about["texts"][0]), effect)


def _say(ours: pd.DataFrame, theirs: pd.DataFrame, text: dict[str, Any]) -> str:
    """Say what was found, and what was not."""
    value = {regime: (float(r["perplexity"]), float(r["delta_loss"]), float(r["low"])) for regime, r in ours.iterrows()}
    model, cache = ours["model"].iloc[0], int(ours["cache"].iloc[0])
    dense, (window, lost, low) = value["dense"][0], value["window"]
    said = (
        f"On {text['n_tokens']} tokens of {text['label']!r}, {model} has perplexity {dense:.4g} without a window and "
        f"{window:.4g} with the {cache} latest keys alone, {window / dense:.3g} times as much. "
    )
    if not low > 0:
        return said + "The interval of the difference includes zero: no collapse was found, so there is nothing to undo."
    one, placebo = value["1 sink"][1], value["placebo: 4 later keys kept"][1]
    said += (
        f"Of the {lost:.3g} nats that this costs, keeping the first token in the window undoes "
        f"{round(100 * (1 - one / lost))}%, and keeping four later ones instead {round(100 * (1 - placebo / lost))}%. "
    )
    ratios = theirs.pivot_table(index="model", columns="regime", values="perplexity", aggfunc="first")
    kept = ratios["4 sinks"].fillna(ratios["cache positions"])
    spread = (ratios["window"] / kept).dropna().sort_values()
    ratio = window / value["4 sinks"][0]
    said += (
        f"A window without sinks has {ratio:.3g} times the perplexity of one with four; published are {spread.iloc[0]:.3g} "
        f"({spread.index[0]}) to {spread.iloc[-1]:.3g} ({spread.index[-1]}), on far longer texts. "
    )
    less = spread[spread > ratio].index.tolist()
    if less:
        said += f"This model collapses less than {', '.join(less)}. "
    return said + "One text: the intervals say how much its parts differ, not how much texts or models do."
