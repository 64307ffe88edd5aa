"""bos: does the model depend on its BOS token? (Barbero et al. 2025, arXiv 2504.02732; Owen et al. 2025, 2503.22329)."""

from __future__ import annotations

from functools import partial
from typing import Any

from sinkscope.causal import evaluate
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import DropTokens
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.plots import estimates
from sinkscope.reports.words import percent
from sinkscope.studies.report import StudyReport, asked, losses, sinks, tabulate
from sinkscope.studies.texts import pieces, same, setting


def bos(
    model: Any, text: Any = None, *, sequences: int = 16, tokens: int = 256, seed: int = 0, progress: bool = False
) -> StudyReport:
    """Run the same texts with BOS and without it, and look at the loss and at where the sink is.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        text: one long text, or several; None for the reference that comes with Python.
        sequences: how many pieces of the text.
        tokens: of each, BOS included.
        seed: of the placebo, which drops one later token.
        progress: show a progress bar on stderr.

    Returns:
        A report with perplexity, the difference in loss on the same tokens, sink rate and mass; intervals are across pieces.

    Raises:
        SinkscopeError: a model or tokenizer without BOS; as :func:`sinkscope.evaluate`.
    """
    adapter = adapt(model)
    if adapter.tokenizer is None or adapter.tokenizer.bos_token_id is None or not adapter.causal:
        raise SinkscopeError(f"{adapter.name} has no BOS token: there is nothing to leave out")
    sample = pieces(adapter, text, count=sequences, size=tokens, bos=True)
    if any(int(s.ids[0]) != adapter.tokenizer.bos_token_id for s in sample.sequences):
        raise SinkscopeError("these texts do not begin with BOS: pass strings, or tokens made with bos=True")
    dropped, placebo = DropTokens(0), DropTokens(0).placebo(seed)
    effect = evaluate(model, sample, [dropped, placebo], progress=progress)
    cases = {"BOS first": "none", "no BOS": str(dropped), "placebo: a later token dropped": str(placebo)}
    of = setting(sample)
    rows = losses(effect, cases, of)
    without = same(sample, [s.ids[1:] for s in sample.sequences], adapter.tokenizer.decode)
    metrics = ["sink_rate@0.3", "sink_mass"]
    reports = {"with-bos": measure(model, sample, metrics), "without-bos": measure(model, without, metrics)}
    rows += sinks(reports["with-bos"], "BOS first", metrics, of)
    rows += sinks(reports["without-bos"], "no BOS", metrics, of)
    rows += [
        ("the token after BOS", quantity, estimate, of)
        for _, quantity, estimate, _ in sinks(measure(model, sample, metrics, key=1), "", metrics, of)
    ]
    table = tabulate("bos", adapter.name, rows)
    found = {(case, quantity): estimate for case, quantity, estimate, _ in rows}
    cost, other = found["no BOS", "delta_loss"], found["placebo: a later token dropped", "delta_loss"]
    had, has = found["BOS first", "sink_rate@0.3"], found["no BOS", "sink_rate@0.3"]
    depends = cost.low > max(0.0, other.high)
    verdict = (
        f"Without BOS the loss rises by {cost.value:.3g} nats"
        if depends
        else f"No dependence of the loss on BOS was found ({cost.value:+.3g} nats without it)"
    ) + f", and the first token is {'still ' if has.value > 0.5 * had.value else 'no longer '}the sink."
    said = (
        f"In {of}, leaving out BOS changes the loss of {adapter.name} on the same tokens by {cost} nats; leaving out "
        f"one later token instead, by {other}. With BOS, {had} of the heads have their sink on it (the token after it: "
        f"{found['the token after BOS', 'sink_rate@0.3']}); without, {has} have it on the token that now comes first. "
    )
    if has.value > 0.5 * had.value:
        said += f"So {percent(has.value)} of the heads take what comes first, whatever it is. "
    said += "One text in pieces: the intervals say how much its parts differ, not how much texts or models do."
    pictures = {
        "rates": partial(estimates, table, "sink_rate@0.3", unit="share of heads"),
        "loss": partial(estimates, table, "delta_loss", unit="nats per token"),
    }
    return StudyReport("bos", asked(__doc__), table, verdict, said, effect.about, pictures, {"": effect, **reports})
