"""Saved reports side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from sinkscope.errors import SinkscopeError

if TYPE_CHECKING:
    from sinkscope.reports.sink import SinkReport


def side_by_side(reports: Mapping[str, SinkReport]) -> pd.DataFrame:
    """Put the summaries of several reports into one table.

    Args:
        reports: name to report.

    Returns:
        Indexed by metric; for every report the columns `NAME` (value) and `NAME null`. A metric that a report does not
        have is NaN there.

    Raises:
        SinkscopeError: fewer than two reports.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    columns = {}
    for name, report in reports.items():
        rows = report.summary("all").set_index("metric")
        columns[name], columns[f"{name} null"] = rows["value"], rows["null"]
    order = dict.fromkeys(m for report in reports.values() for m in report.summary("all")["metric"])
    return pd.DataFrame(columns).reindex(list(order))
