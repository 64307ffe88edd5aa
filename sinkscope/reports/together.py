"""Several saved reports of one kind: a table of edits, and a page of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports import page
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.files import check_writable, write
from sinkscope.reports.sink import SinkReport
from sinkscope.reports.sweep import SweepReport


def of_one_kind(reports: Mapping[str, SinkReport | EffectReport | SweepReport]) -> bool:
    """Tell whether these are what `evaluate` found; False: what `measure` found.

    Raises:
        SinkscopeError: fewer than two reports, reports of both kinds, or a sweep.
    """
    swept = next((name for name, report in reports.items() if isinstance(report, SweepReport)), None)
    if swept is not None:
        raise SinkscopeError(
            f"{swept!r} holds a sweep, which is not compared here: its table has a row per place, so merge the frames "
            "(ss.load_report(...).frame) on layer and head"
        )
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    effects = [name for name, report in reports.items() if isinstance(report, EffectReport)]
    if effects and len(effects) < len(reports):
        raise SinkscopeError(
            f"{effects[0]!r} holds what evaluate wrote, another what measure wrote: give reports of one kind"
        )
    return bool(effects)


def edits_side_by_side(reports: Mapping[str, EffectReport]) -> pd.DataFrame:
    """Put what edits cost in several reports into one table.

    Args:
        reports: name to report.

    Returns:
        Indexed by intervention; for every report `NAME` (difference in loss, nats per token), `NAME low` and `NAME high`.
        What a report has not is NaN.
    """
    columns = {"": "delta_loss", " low": "low", " high": "high"}
    tables = {name: report.summary().set_index("intervention") for name, report in reports.items()}
    found = {f"{name}{end}": table[column] for name, table in tables.items() for end, column in columns.items()}
    order = dict.fromkeys(row for table in tables.values() for row in table.index)
    return pd.DataFrame(found).reindex(list(order)).rename_axis("intervention")


def save_compared(reports: Mapping[str, SinkReport | EffectReport], directory: str | Path) -> Path:
    """Write the page of several reports of one kind, `report.html`, into a directory.

    Raises:
        SinkscopeError: the directory can't be written.
    """
    path = check_writable(directory)
    shown = page.render(page.compared({name: report.data() for name, report in reports.items()}))
    write(path / "report.html", lambda p: p.write_text(shown, encoding="utf-8"))
    return path
