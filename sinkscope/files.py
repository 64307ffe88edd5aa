"""A report as a directory, and back. Every file is written under another name first and then moved into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from sinkscope.effect import EffectReport
from sinkscope.errors import SinkscopeError
from sinkscope.report import COLUMNS, SUMMARY_COLUMNS, SinkReport
from sinkscope.resume import claimed, forget

#: Written last: a directory without it holds no whole report.
SEAL = "summary.json"
#: How text begins that a spreadsheet would run.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: What an earlier report, also of the other kind, may have left behind.
PICTURES = ("heatmap", "progression", "distribution", "positions", "attention", "loss")
TABLES = ("measurements", "summary", "attention", "effects", "details", "curves")


def check_writable(directory: str | Path) -> Path:
    """Make a directory, or say before anything is computed that it can't be written.

    Raises:
        SinkscopeError: it can't be made or written; says why.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".sinkscope-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SinkscopeError(f"can't write to the directory {str(path)!r}: {error.strerror}") from None
    return path


def save(report: SinkReport, directory: str | Path) -> Path:
    """Write a report.

    Args:
        report: what to write.
        directory: made if need be; files of an earlier report in it are replaced.

    Returns:
        The directory: `measurements.csv`, `summary.csv`, both as `.parquet`, `summary.json`, the pictures as PNG and
        `report.html`.

    Raises:
        SinkscopeError: the directory can't be written.
    """
    path = check_writable(directory)
    tables = {"measurements": report.frame, "summary": report.summary()}
    if report.attention is not None:
        tables["attention"] = report.attention
    with claimed(path):
        _unseal(path)
        _write_tables(tables, path)
        for name, figure in report.figures().items():
            write(path / f"{name}.png", partial(figure.savefig, format="png", dpi=160, bbox_inches="tight"))
        _seal(report, path)
        forget(path)
    return path


def save_effects(report: EffectReport, directory: str | Path) -> Path:
    """Write what `evaluate` found.

    Returns:
        The directory: `effects.csv`, `details.csv` (intervals, agreement, tokens) and `curves.csv` (loss by position), the
        same as `.parquet`, `loss.png`, `report.html` and `summary.json`.

    Raises:
        SinkscopeError: the directory can't be written.
    """
    from matplotlib.figure import Figure

    from sinkscope.plots import WIDE

    path = check_writable(directory)
    with claimed(path):
        _unseal(path)
        _write_tables({"effects": report.frame, "details": report.details, "curves": report.curves}, path)
        figure = Figure(**WIDE)
        report.loss_curve(ax=figure.add_subplot())
        write(path / "loss.png", partial(figure.savefig, format="png", dpi=160, bbox_inches="tight"))
        _seal(report, path)
        forget(path)
    return path


def _unseal(path: Path) -> None:
    """Take away what says that a directory holds a whole report, and what an earlier one may leave behind."""
    tables = (f"{table}{kind}" for table in TABLES for kind in (".csv", ".parquet"))
    for name in (SEAL, "report.html", *tables, *(f"{p}.png" for p in PICTURES)):
        (path / name).unlink(missing_ok=True)


def _write_tables(tables: Mapping[str, pd.DataFrame], path: Path) -> None:
    for name, table in tables.items():
        write_table(table, path / name)


def _seal(report: SinkReport | EffectReport, path: Path) -> None:
    page = report.page()
    write(path / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
    about = json.dumps(report.about, indent=1, ensure_ascii=False)
    write(path / SEAL, lambda p: p.write_text(about, encoding="utf-8"))


def write_table(table: pd.DataFrame, stem: Path) -> None:
    r"""Write a table as `.csv` and, exactly, as `.parquet`.

    In the CSV, text that a spreadsheet would run as a formula (it begins with `=`, `+`, `-`, `@`, a tab or a carriage return)
    gets an apostrophe before it, as OWASP advises; and a carriage return, which readers take for a line's end, becomes `\r`.
    """
    safe = table.copy()
    for column in safe.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in safe.dtypes]]:
        safe[column] = [_harmless(x) if isinstance(x, str) else x for x in safe[column]]
    write(stem.with_name(f"{stem.name}.csv"), partial(safe.to_csv, index=False))
    write(stem.with_name(f"{stem.name}.parquet"), partial(table.to_parquet, index=False))


def _harmless(cell: str) -> str:
    return ("'" if cell.startswith(FORMULA) else "") + cell.replace("\r", "\\r")


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Have `fill` write a file under another name, and move it into place."""
    half = path.with_name(f".{path.name}.half")
    try:
        fill(half)
        half.replace(path)
    except OSError as error:
        raise SinkscopeError(f"can't write {str(path)!r}: {error.strerror or error}") from None
    finally:
        half.unlink(missing_ok=True)


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
        attention = path / "attention.parquet"
        shown = pd.read_parquet(attention) if attention.is_file() else None
        if list(frame.columns) != COLUMNS or list(summary.columns) != SUMMARY_COLUMNS:
            raise ValueError("its tables have other columns")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SinkscopeError(f"the report in {str(path)!r} can't be read: {error}") from None
    return SinkReport(frame, summary, about, shown)
