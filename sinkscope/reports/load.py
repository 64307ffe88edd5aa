"""Saved reports, read back."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.files import SEAL
from sinkscope.reports.sink import COLUMNS, SUMMARY_COLUMNS, SinkReport


def load_report(directory: str | Path) -> SinkReport | EffectReport:
    """Read a saved report: an EffectReport where `evaluate` wrote it, else a SinkReport.

    Raises:
        SinkscopeError: no whole report there.
    """
    path = Path(directory).expanduser()
    if not (path / SEAL).is_file():
        raise SinkscopeError(f"{str(path)!r} holds no finished report (no {SEAL}); write one with report.save(...) or --out")
    try:
        about = json.loads((path / SEAL).read_text(encoding="utf-8"))
        if "interventions" in about["arguments"]:
            tables = [pd.read_parquet(path / f"{name}.parquet") for name in ("effects", "details", "curves")]
            return EffectReport(tables[0], tables[1], tables[2], about)
        frame, summary = (pd.read_parquet(path / f"{name}.parquet") for name in ("measurements", "summary"))
        attention, patterns = (_optional(path / f"{name}.parquet") for name in ("attention", "patterns"))
        if list(frame.columns) != COLUMNS or list(summary.columns) != SUMMARY_COLUMNS:
            raise ValueError("its tables have other columns")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SinkscopeError(f"the report in {str(path)!r} can't be read: {error}") from None
    return SinkReport(frame, summary, about, attention, patterns)


def _optional(table: Path) -> pd.DataFrame | None:
    return pd.read_parquet(table) if table.is_file() else None
