"""A sweep's costs as a metric of heads, beside those that were measured: on the same map, in the same frame."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pandas as pd

from sinkscope.errors import SinkscopeError

if TYPE_CHECKING:
    from sinkscope.reports.sink import SinkReport
    from sinkscope.reports.sweep import SweepReport

#: What the metric is called, before the edit.
COST = "cost"


def joined(report: SinkReport, sweep: SweepReport) -> SinkReport:
    """Give a report with what an edit costs in each head as a metric of its own; the null is what its placebo costs.

    Raises:
        SinkscopeError: the sweep is not over heads, or of another model, or no text is in both.
    """
    if sweep.over != "heads":
        raise SinkscopeError(f"the map of heads takes a sweep(over='heads'), this one went over {sweep.over}")
    models = [str(of.about["model"]) for of in (report, sweep)]
    if models[0] != models[1]:
        raise SinkscopeError(f"the report is of {models[0]}, the sweep of {models[1]}: both must be of one model")
    theirs = sweep.frame[sweep.frame["text"].isin(report.frame["text"].unique())]
    if not len(theirs):
        raise SinkscopeError("the report and the sweep have no text in common: run both on the same texts")
    rows = theirs[["model", "text", "layer", "head", "std_error", "tokens"]].assign(
        metric=f"{COST}[{sweep.edit}]", value=theirs["delta_loss"], null=theirs["placebo_delta_loss"]
    )
    kinds = report.frame.dtypes.drop(["model", "text", "metric"])
    rows = rows.reindex(columns=report.frame.columns).astype(kinds.to_dict())
    return replace(report, frame=pd.concat([report.frame, rows], ignore_index=True))
