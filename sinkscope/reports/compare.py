"""Saved reports side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports import page
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.files import check_writable, write
from sinkscope.reports.sink import SinkReport


def side_by_side(reports: Mapping[str, SinkReport | EffectReport]) -> pd.DataFrame:
    """Put the summaries of several reports of one kind into one table.

    Args:
        reports: name to report.

    Returns:
        Of measurements, indexed by metric: for every report the columns `NAME` (value) and `NAME null`. Of edits, indexed by
        intervention: `NAME` (difference in loss, nats per token), `NAME low`, `NAME high`. What a report has not is NaN.

    Raises:
        SinkscopeError: fewer than two reports, or reports of different kinds.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    kinds = {type(report) for report in reports.values()}
    if len(kinds) > 1:
        effects = [name for name, report in reports.items() if isinstance(report, EffectReport)]
        raise SinkscopeError(
            f"{effects[0]!r} holds what evaluate wrote, another what measure wrote: give reports of one kind"
        )
    by, columns = ("metric", {"": "value", " null": "null"})
    if kinds == {EffectReport}:
        by, columns = ("intervention", {"": "delta_loss", " low": "low", " high": "high"})
    tables = {name: report.summary("all").set_index(by) for name, report in reports.items()}
    found = {f"{name}{end}": table[column] for name, table in tables.items() for end, column in columns.items()}
    order = dict.fromkeys(row for table in tables.values() for row in table.index)
    return pd.DataFrame(found).reindex(list(order)).rename_axis(by)


def save_compared(reports: Mapping[str, SinkReport | EffectReport], directory: str | Path) -> Path:
    """Write the page of several reports of one kind, `report.html`, into a directory.

    Raises:
        SinkscopeError: fewer than two reports, reports of different kinds, or the directory can't be written.
    """
    path = check_writable(directory)
    shown = page.render(page.compared({name: report.data() for name, report in reports.items()}))
    write(path / "report.html", lambda p: p.write_text(shown, encoding="utf-8"))
    return path
