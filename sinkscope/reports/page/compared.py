"""All that a page shows of several reports of one kind beside each other, as one dictionary; see `docs/report_schema.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.reports.drawing import visible
from sinkscope.reports.page.data import SCHEMA_VERSION

#: What of a report is about single texts, and stays in its own page.
OWN = ("texts", "patterns", "attention", "by_text", "sinks", "profiled", "families", "colours")


def compared(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the dictionaries of several reports into one.

    Args:
        reports: name -> what :func:`measured` or :func:`evaluated` gave.

    Raises:
        SinkscopeError: fewer than two, or of different kinds.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    kinds = sorted({data["kind"] for data in reports.values()})
    if len(kinds) > 1:
        raise SinkscopeError("reports of measure compare with reports of measure, those of evaluate with those of evaluate")
    slim = [{key: value for key, value in data.items() if key not in OWN} for data in reports.values()]
    for data in slim:
        for metric, grids in data.get("cells", {}).items():
            data["cells"] = data["cells"] | {metric: {"all": grids.get("all") or next(iter(grids.values()))}}
    first = next(iter(reports.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "compare",
        "of": kinds[0],
        "names": [visible(name) for name in reports],
        "reports": slim,
        "rows": _rows(slim, "numbers", "metric") if kinds[0] == "measure" else _rows(slim, "edits", "name"),
        "colours": first.get("colours", []),
    }


def _rows(reports: list[dict[str, Any]], among: str, by: str) -> list[dict[str, Any]]:
    """Every number or edit once, in the order met, with what each report says of it (None: nothing)."""
    tables = [{row[by]: row for row in data[among]} for data in reports]
    names = dict.fromkeys(name for table in tables for name in table)
    return [{"of": name, "in": [table.get(name) for table in tables]} for name in names]
