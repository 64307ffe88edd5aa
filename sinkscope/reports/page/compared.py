"""All that a page shows of several reports of one kind beside each other, as one dictionary; see `docs/report_schema.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sinkscope.errors import SinkscopeError
from sinkscope.reports.drawing import visible
from sinkscope.reports.page.data import SCHEMA_VERSION
from sinkscope.reports.page.sweep import LISTED
from sinkscope.reports.words import nouns

#: What of a report is about single texts, and stays in its own page.
OWN = ("texts", "patterns", "attention", "by_text", "sinks", "profiled", "families", "colours")
#: Where the rows of the table come from, and what names one.
ROWS = {"measure": ("numbers", "metric"), "evaluate": ("edits", "name"), "sweep": ("places", "name")}


def compared(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Put the dictionaries of several reports into one.

    Args:
        reports: name -> what :func:`measured`, :func:`evaluated` or :func:`swept` gave.

    Raises:
        SinkscopeError: fewer than two, or of different kinds.
    """
    if len(reports) < 2:
        raise SinkscopeError(f"nothing to compare: give at least two reports, got {len(reports)}")
    kinds = sorted({data["kind"] for data in reports.values()})
    if len(kinds) > 1:
        raise SinkscopeError(f"these are reports of {' and of '.join(kinds)}: give reports of one kind")
    kind = kinds[0]
    if kind == "sweep":
        reports = {name: _by_head(data) for name, data in reports.items()}
    slim = [{key: value for key, value in data.items() if key not in OWN} for data in reports.values()]
    for data in slim:
        for metric, grids in data.get("cells", {}).items():
            data["cells"] = data["cells"] | {metric: {"all": grids.get("all") or next(iter(grids.values()))}}
    first = next(iter(reports.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "compare",
        "of": kind,
        "nouns": first.get("nouns") or nouns({}),
        "names": [visible(name) for name in reports],
        "reports": slim,
        "rows": _rows(slim, *ROWS[kind]) if kind != "sweep" else _dearest(_rows(slim, *ROWS[kind])),
        "colours": first.get("colours", []),
    }


def _by_head(data: dict[str, Any]) -> dict[str, Any]:
    """Lay a sweep out as a report of `measure` is: what places cost is a number by layer and head, the placebo its null."""
    cells, over = data["cells"]["all"], data["over"]
    return {
        **{name: data[name] for name in ("kind", "model", "n_texts", "over", "edit")},
        "layers": data["rows"],
        "heads": data["columns"],
        "names": data["measures"],
        "glance": {"metric": "delta"},
        "cells": {name: {"all": {"value": cells[name], "null": cells[f"placebo_{name}"]}} for name in data["measures"]},
        "places": [
            {"name": f"layer {row}, head {column}" if over == "heads" else f"{over[:-1]} {row}"}
            | {name: cells[name] and cells[name][r][c] for name in ("delta", "low", "high")}
            for r, row in enumerate(data["rows"])
            for c, column in enumerate(data["columns"])
        ],
    }


def _dearest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the places that cost most in one of the reports."""
    most = {row["of"]: max((cell["delta"] or 0.0 for cell in row["in"] if cell), default=0.0) for row in rows}
    return sorted(rows, key=lambda row: -most[row["of"]])[:LISTED]


def _rows(reports: list[dict[str, Any]], among: str, by: str) -> list[dict[str, Any]]:
    """Every number or edit once, in the order met, with what each report says of it (None: nothing)."""
    tables = [{row[by]: row for row in data[among]} for data in reports]
    names = dict.fromkeys(name for table in tables for name in table)
    return [{"of": name, "in": [table.get(name) for table in tables]} for name in names]
