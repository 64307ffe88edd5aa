"""semantic-conflict: do strong, conflicting words make a model dump attention on the sink? A popular claim, tested.

Twelve groups of three sentences written for this test. The sentences of a group have the same length and structure in words;
what changes is how strongly one phrase conflicts with the rest: not at all, somewhat, flatly. Tokenizers may still give them
different lengths, which sink mass depends on, so the sentences of a group are cut to the shortest, and the words that differ
stand early enough to stay.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sinkscope.metrics.across import SHARE, SIGNED
from sinkscope.models import Adapter, adapt
from sinkscope.observe import measure
from sinkscope.reports.drawing import WIDE, finish
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, tabulate
from sinkscope.tokens import TextTokens, Tokens

LEVELS = ("none", "mild", "strong")
#: One sentence per group; the phrases are the levels, as many words each. What follows carries the text on.
TAIL = " Nobody in the room said anything about it for a long time, and then the talk went on to other things."
GROUPS: tuple[tuple[str, tuple[str, str, str]], ...] = (
    ("The kind nurse {} the sick child.", ("gently helped", "coldly ignored", "cruelly tortured")),
    ("The water in the kettle was {} and steaming.", ("very hot", "barely warm", "frozen solid")),
    ("My best friend said that he {} me.", ("always trusted", "rather distrusted", "utterly hated")),
    ("At noon the bright sun {} over the village.", ("shone warmly", "looked pale", "went black")),
    ("The honest judge {} in the open court.", ("told truths", "shaded facts", "swore lies")),
    ("The peaceful monks {} their old neighbours.", ("quietly greeted", "loudly insulted", "brutally murdered")),
    ("The winner of the race finished {} of all.", ("clearly first", "nearly third", "dead last")),
    ("The silent library was full of {} readers.", ("quiet calm", "restless noisy", "screaming raging")),
    ("The loving mother {} her newborn baby.", ("softly kissed", "briefly forgot", "savagely beat")),
    ("The doctor promised that the poison was {}.", ("quite dangerous", "possibly harmless", "perfectly healthy")),
    ("The newly built bridge {} on opening day.", ("stood firm", "swayed oddly", "collapsed completely")),
    ("The vegetarian cook {} the fresh meat.", ("politely declined", "secretly tasted", "greedily devoured")),
)


def semantic_conflict(
    model: Any, text: Any = None, *, permutations: int = 10_000, seed: int = 0, progress: bool = False
) -> StudyReport:
    """Correlate the strength of a conflict with the first token's share of attention, in matched sentences.

    Args:
        model: as for :func:`sinkscope.measure`; it needs a tokenizer.
        text: ignored: the sentences are the study's own.
        permutations: of the test, which shuffles the levels within each group.
        seed: of the permutations.
        progress: show a progress bar on stderr.

    Returns:
        A report with `sink_mass_excess` and `last_row_share` per level, and the rank correlation (Spearman's, in groups) of
        level and `sink_mass_excess`, its interval across groups and the two-sided p-value of the permutation test.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`.
    """
    adapter = adapt(model)
    sample = _matched(adapter)
    report = measure(model, sample, ["sink_mass_excess", "last_row_share"], batch_size=12, progress=progress)
    summary = report.summary()
    mass, last = (
        summary[(summary["metric"] == m) & (summary["text"] != "all")]["value"].to_numpy().reshape(len(GROUPS), len(LEVELS))
        for m in ("sink_mass_excess", "last_row_share")
    )
    setting = f"{len(GROUPS)} groups"
    rows: list[Row] = []
    for level, name in enumerate(LEVELS):
        rows.append((f"conflict: {name}", "sink_mass_excess", Estimate.of(mass[:, level], 0.0, SIGNED), setting))
        rows.append((f"conflict: {name}", "last_row_share", Estimate.of(last[:, level], bounds=SHARE), setting))
    correlation = Estimate.of(rank_correlations(mass), 0.0, SIGNED)
    change = Estimate.of(mass[:, -1] - mass[:, 0], 0.0, SIGNED)
    p = permutation_p(mass, permutations, np.random.default_rng(seed))
    rows += [("strong minus none", "sink_mass_excess", change, f"{setting}, paired")]
    rows += [("level and sink_mass_excess", "rank_correlation", correlation, setting)]
    rows += [("level and sink_mass_excess", "p_value", Estimate(p), f"{permutations} permutations, two-sided")]
    table = tabulate("semantic-conflict", adapter.name, rows)
    found = p < 0.05
    verdict = (
        f"{'A' if found else 'No'} correlation of conflict with the sink{'' if found else ' was found'} "
        f"(rank correlation {correlation.value:+.2f}, p = {p:.2g})."
    )
    way = ("more" if correlation.value > 0 else "less") + " attention goes to the first token the stronger the conflict is"
    said = (
        f"In {len(GROUPS)} groups of three matched sentences, {adapter.name}'s attention to the first token beyond chance is "
        + ", ".join(f"{Estimate.of(mass[:, i], 0.0, SIGNED)} ({name})" for i, name in enumerate(LEVELS))
        + f". Within groups, its rank correlation with the conflict is {correlation}, p = {p:.2g}; from none to "
        f"strong it changes by {change}. "
        + (f"So {way}. " if found else "The claim is not borne out here; with so few groups a small effect may be missed. ")
        + "One model and sentences of one author: what conflicts is a judgement, and other words could give another result."
    )
    pictures = {"levels": partial(_levels, mass)}
    return StudyReport("semantic-conflict", asked(__doc__), table, verdict, said, report.about, pictures, {"": report})


def rank_correlations(values: np.ndarray) -> np.ndarray:
    """Give Spearman's correlation of the level with the value within each group, `[group, level]` -> `[group]`."""
    ranks = pd.DataFrame(values).rank(axis=1).to_numpy()
    levels = np.arange(values.shape[1], dtype=float)
    centred, level = ranks - ranks.mean(1, keepdims=True), levels - levels.mean()
    size = np.sqrt((centred**2).sum(1) * (level**2).sum())
    correlations: np.ndarray = np.divide(centred @ level, size, out=np.zeros(len(values)), where=size > 0)
    return correlations


def permutation_p(values: np.ndarray, count: int, generator: np.random.Generator) -> float:
    """Give the two-sided p-value of the mean correlation when levels are shuffled within groups; never 0."""
    observed = abs(rank_correlations(values).mean())
    drawn = (abs(rank_correlations(generator.permuted(values, axis=1)).mean()) for _ in range(count))
    return float(1 + sum(d >= observed - 1e-12 for d in drawn)) / (1 + count)


def _matched(adapter: Adapter) -> Tokens:
    """Tokenise the sentences, those of a group cut to one length."""
    texts = {
        f"{group} {LEVELS[level]}": frame.format(phrase) + TAIL
        for group, (frame, phrases) in enumerate(GROUPS)
        for level, phrase in enumerate(phrases)
    }
    tokens = adapter.tokenize(texts)
    made = []
    for at in range(0, len(tokens), len(LEVELS)):
        group = tokens.sequences[at : at + len(LEVELS)]
        shortest = min(len(s) for s in group)
        for s in group:  # an encoder's last special token stays last
            kept = range(shortest) if adapter.causal else [*range(shortest - 1), len(s) - 1]
            made.append(TextTokens(s.label, s.ids[list(kept)], tuple(s.strings[i] for i in kept)))
    return Tokens(tuple(made), tokens.bos)


def _levels(mass: np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draw the sink by level: a line per group, and the mean with its interval."""
    import matplotlib.pyplot as plt

    ax = plt.figure(**WIDE).add_subplot() if ax is None else ax
    by_level = (mass - mass.mean(1, keepdims=True)).T
    ax.plot(range(len(LEVELS)), by_level, color="#595959", alpha=0.4, linewidth=0.8)
    points = [Estimate.of(column) for column in by_level]
    error = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
    ax.errorbar(range(len(LEVELS)), [p.value for p in points], yerr=error, fmt="o-", color="#0072B2", capsize=3, label="mean")
    ax.axhline(0, color="#595959", linewidth=0.6, linestyle="--")
    ax.set_xticks(range(len(LEVELS)), labels=list(LEVELS))
    return finish(ax, "", "conflict", "sink_mass_excess, minus the group's mean", legend=True)
