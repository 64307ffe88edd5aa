"""Several saved reports of one kind: a table of edits or of places, and a page of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports import page
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.files import check_writable, write
from sinkscope.reports.sink import SinkReport
from sinkscope.reports.sweep import PLACE, SweepReport

Report = SinkReport | EffectReport | SweepReport
MADE_BY: dict[type, str] = {SinkReport: "measure", EffectReport: "evaluate", SweepReport: "sweep"}


def of_one_kind(reports: Mapping[str, Report]) -> str:
    """Tell what found these: `measure`, `evaluate` or `sweep`.

    Raises:
        SinkscopeError: fewer than two reports, reports of several kinds, or sweeps over different things.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    kinds = {name: MADE_BY[type(report)] for name, report in reports.items()}
    (first, kind), *others = kinds.items()
    for name, other in others:
        if other != kind:
            raise SinkscopeError(f"{first!r} holds what {kind} wrote, {name!r} what {other} wrote: give reports of one kind")
    overs = {name: report.over for name, report in reports.items() if isinstance(report, SweepReport)}
    for name, over in overs.items():
        if over != overs[first]:
            raise SinkscopeError(f"{first!r} is a sweep over {overs[first]}, {name!r} one over {over}")
    return kind


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


def places_side_by_side(reports: Mapping[str, SweepReport]) -> pd.DataFrame:
    """Put what each place costs in several sweeps over the same into one table, the places that differ most first.

    Args:
        reports: name to report.

    Returns:
        Indexed by place (`layer` and `head`, `layer`, or `position`); for every report `NAME` (difference in loss, nats per
        token), `NAME low` and `NAME high`; for every report after the first `NAME - FIRST`. What a report has not is NaN.
    """
    columns = {"": "delta_loss", " low": "low", " high": "high"}
    (first, base), *others = reports.items()
    axes = [axis for axis in PLACE if axis in base.summary()]
    tables = {name: report.summary().set_index(axes) for name, report in reports.items()}
    found = pd.DataFrame({f"{name}{end}": table[column] for name, table in tables.items() for end, column in columns.items()})
    for name, _ in others:
        found[f"{name} - {first}"] = found[name] - found[first]
    largest = found[[f"{name} - {first}" for name, _ in others]].abs().max(axis=1)
    return found.loc[largest.sort_values(ascending=False, kind="stable").index]


def save_compared(reports: Mapping[str, Report], directory: str | Path) -> Path:
    """Write the page of several reports of one kind, `report.html`, into a directory.

    Raises:
        SinkscopeError: the directory can't be written.
    """
    path = check_writable(directory)
    shown = page.render(page.compared({name: report.data() for name, report in reports.items()}))
    write(path / "report.html", lambda p: p.write_text(shown, encoding="utf-8"))
    return path
