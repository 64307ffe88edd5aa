"""A report as a directory, whatever kind of report it is: every file is written under another name and moved into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.runs.resume import claimed, forget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Written last: a directory without it holds no whole report.
SEAL = "summary.json"
#: How text begins that a spreadsheet would run.
FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: What an earlier report, also of the other kind, may have left behind.
PICTURES = ("heatmap", "progression", "distribution", "positions", "attention", "loss")
TABLES = ("measurements", "summary", "attention", "effects", "details", "curves", "patterns")


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


def save(
    directory: str | Path,
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, Figure],
    page: str,
    about: Mapping[str, Any],
    large: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write a report: its tables, its pictures, its page, and last the seal that says that all of it is there.

    Args:
        directory: made if need be; files of an earlier report in it are replaced.
        tables: stem -> table, written as `.csv` and `.parquet`.
        figures: stem -> picture, written as `.png`.
        page: `report.html`.
        about: the seal, `summary.json`.
        large: stem -> table that nobody reads as text, written as `.parquet` alone.

    Returns:
        The directory.

    Raises:
        SinkscopeError: it can't be written.
    """
    path = check_writable(directory)
    with claimed(path):
        _unseal(path)
        for name, table in tables.items():
            write_table(table, path / name)
        for name, table in (large or {}).items():
            write(path / f"{name}.parquet", partial(table.to_parquet, index=False))
        for name, figure in figures.items():
            write(path / f"{name}.png", partial(figure.savefig, format="png", dpi=160, bbox_inches="tight"))
        write(path / "report.html", lambda p: p.write_text(page, encoding="utf-8"))
        seal = json.dumps(about, indent=1, ensure_ascii=False)
        write(path / SEAL, lambda p: p.write_text(seal, encoding="utf-8"))
        forget(path)
    return path


def _unseal(path: Path) -> None:
    """Take away what says that a directory holds a whole report, and what an earlier one may leave behind."""
    tables = (f"{table}{kind}" for table in TABLES for kind in (".csv", ".parquet"))
    for name in (SEAL, "report.html", *tables, *(f"{p}.png" for p in PICTURES)):
        (path / name).unlink(missing_ok=True)


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
