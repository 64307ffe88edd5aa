"""first-token: how much attention lands on the first token? The analysis that this library replaces."""

from __future__ import annotations

from typing import Any

from sinkscope.metrics.across import SHARE
from sinkscope.models import adapt
from sinkscope.observe import measure
from sinkscope.reports.words import number, percent
from sinkscope.samples import samples
from sinkscope.studies.report import Estimate, Pictures, StudyReport, asked, sinks, tabulate

#: The numbers of that analysis, beside the largest layer.
METRICS = ("sink_mass", "sink_strength", "first_to_rest_ratio", "layer_progression", "sink_rate@0.3")


def first_token(model: Any, text: Any = None, *, max_tokens: int | None = None, progress: bool = False) -> StudyReport:
    """Measure the first token's share of attention on a few texts, by every convention, beside what chance would give.

    Args:
        model: as for :func:`sinkscope.measure`.
        text: one or several texts, as for :func:`sinkscope.measure`; None for five samples of rising complexity.
        max_tokens: keep at most this many tokens of each text, BOS included.
        progress: show a progress bar on stderr.

    Returns:
        A report whose intervals are across texts; `largest_layer` is, in each text, the layer with the largest sink mass.

    Raises:
        SinkscopeError: as :func:`sinkscope.measure`.
    """
    if text is None:
        text, max_tokens = samples(), max_tokens or adapt(model).n_ctx
    report = measure(model, text, max_tokens=max_tokens, progress=progress)
    layers = report.frame[(report.frame["metric"] == "layer_progression") & (report.frame["text"] != "all")]
    by_text = layers.groupby("text", sort=False)[["value", "null"]].max()
    setting = f"{len(report.texts)} texts"
    rows = sinks(report, "natural", METRICS, setting)
    rows.insert(1, ("natural", "largest_layer", Estimate.of(by_text["value"], float(by_text["null"].mean()), SHARE), setting))
    if len(report.about["layers"]) >= 6:
        early = report.frame[
            (report.frame["metric"] == "sink_rate@0.3") & report.frame["layer"].isin(report.about["layers"][:2])
        ]
        each = early[early["text"] != "all"].groupby("text", sort=False)["value"].mean()
        rows.append(("the first two layers", "sink_rate@0.3", Estimate.of(each, bounds=SHARE), setting))
    table = tabulate("first-token", report.about["model"], rows)
    value = {quantity: estimate for _, quantity, estimate, _ in rows}
    mass, ratio, late = value["sink_mass"], value["first_to_rest_ratio"], value["layer_progression"]
    verdict = f"{percent(mass.value)} of all attention lands on the first token, where chance would put {percent(mass.null)}."
    said = (
        f"In {setting}, a token of {report.about['model']} pays {mass} of its attention to the first token, and in the layer "
        f"where that is most, {value['largest_layer']}. An average other token gets {number(ratio.value)} times less. "
        f"From the first third of the layers to the last, the share changes by {late}. All of it depends on the length of "
        "the texts, as chance does: compare with other models on the same texts alone."
    )
    pictures: Pictures = {"progression": report.progression, "heatmap": report.heatmap}
    return StudyReport("first-token", asked(__doc__), table, verdict, said, report.about, pictures, {"": report})
