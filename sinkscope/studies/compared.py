"""architectures: which models sink more, and does the untrained architecture? (Gu et al. 2024, arXiv 2410.10781)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pandas as pd
import torch

from sinkscope.errors import SinkscopeError
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.plots import estimates
from sinkscope.reports.words import percent
from sinkscope.studies.report import Estimate, Row, StudyReport, asked, sinks, tabulate
from sinkscope.studies.texts import pieces, setting

METRICS = ("sink_mass", "sink_mass_excess", "sink_rate@0.3")


def architectures(
    model: Any,
    text: Any = None,
    *,
    also: Sequence[Any] = (),
    untrained: bool = True,
    sequences: int = 16,
    tokens: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> StudyReport:
    """Measure several models on the same text, each with its own tokenizer, and each beside itself before training.

    To add a model, load it (`ss.load_model(name)`, or your own) and put it into `also`.

    Args:
        model: as for :func:`sinkscope.measure`; or several, as a mapping from name to model.
        text: one long text, or several; None for the reference that comes with Python. Given ids suit one model only.
        also: further models.
        untrained: run each architecture with new random weights as well: what it does before it has learned anything.
        sequences: how many pieces of the text.
        tokens: of each, special ones included.
        seed: of the random weights.
        progress: show a progress bar on stderr.

    Returns:
        A report with the mass on the first token, its excess over chance and the sink rate of each model.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`; two models of one name.
    """
    models = dict(model) if isinstance(model, Mapping) else {adapt(m).name: m for m in (model, *also)}
    if len(models) < 1 + len(also) and not isinstance(model, Mapping):
        raise SinkscopeError("two models of one name: pass a mapping from name to model")
    reports, tables = {}, []
    for name, each in models.items():
        adapter = adapt(each)
        sample = pieces(adapter, text, count=sequences, size=tokens)
        runs = {"trained": each} | ({"untrained": _untrained(adapter, seed)} if untrained else {})
        rows: list[Row] = []
        for case, run in runs.items():
            report = measure(run, sample, list(METRICS), progress=progress)
            reports[f"{name}-{case}".replace("/", "-")] = report
            rows += sinks(report, case, METRICS, setting(sample))
        tables.append(tabulate("architectures", name, rows))
    table = pd.concat(tables, ignore_index=True)
    rates = table[table["quantity"] == "sink_rate@0.3"]
    trained = rates[rates["case"] == "trained"].sort_values("value", ascending=False)
    least = rates[rates["case"] == "untrained"]
    top = trained.iloc[0]
    verdict = f"{top['model']} has a sink in {percent(top['value'])} of its heads"
    if len(trained) > 1:
        verdict += f", {trained.iloc[-1]['model']} in {percent(trained.iloc[-1]['value'])}"
    verdict += f"; untrained, at most {percent(least['value'].max())}." if untrained else "."
    said = "Heads whose first token receives more than 0.3, on the same text: "
    said += "; ".join(f"{model} {Estimate(*row)}" for model, row in _values(trained)) + ". "
    if untrained:
        said += "With random weights in the same architecture: "
        said += "; ".join(f"{model} {Estimate(*row)}" for model, row in _values(least)) + ". "
    said += "Models differ in tokenizer, BOS, depth and training at once: a difference between two says nothing of its cause."
    pictures = {"rates": partial(estimates, table, "sink_rate@0.3", unit="share of heads")}
    about = {"models": {name: adapt(m).describe() for name, m in models.items()}}
    return StudyReport("architectures", asked(__doc__), table, verdict, said, about, pictures, reports)


def _values(rows: pd.DataFrame) -> list[tuple[str, list[float]]]:
    return list(zip(rows["model"], rows[["value", "low", "high"]].to_numpy(float).tolist(), strict=True))


def _untrained(adapter: Any, seed: int) -> Any:
    """Build the same architecture with new weights, as its library draws them."""
    config = adapter.network.config if adapter.kind in ("bridge", "hugging_face") else None
    if config is None:
        raise SinkscopeError(f"{adapter.name} is a HookedTransformer, which can't be built anew: pass untrained=False")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = type(adapter.network)(config)
    return network.to(adapter.device, next(adapter.network.parameters()).dtype).eval()
