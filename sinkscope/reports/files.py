"""A report as a directory, whatever kind of report it is: tables, pictures, a page, and the seal."""

from __future__ import annotations

import re
import tempfile
import unicodedata
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports.seals import SEAL, replace
from sinkscope.runs.store import claimed, forget

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SEAL", "check_writable", "save", "write", "write_table"]

#: How a cell begins that a spreadsheet would run, here or after a semicolon, which is the separator in some countries.
FORMULA = re.compile("(^|;)(?=[=+\\-@\uff1d\uff0b\uff0d\uff20])")


def check_writable(directory: str | Path) -> Path:
    """Make a directory, or say before anything is computed that it can't be written.

    Raises:
        SinkscopeError: it can't be made or written; says why.
    """
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
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
    """Write a report beside the old one, and put it in its place when it is whole.

    Args:
        directory: made if need be; an earlier report in it stays as it was until this one is whole.
        tables: stem -> table, written as `.csv` and `.parquet`.
        figures: stem -> picture, written as `.png`.
        page: `report.html`.
        about: the seal, `summary.json`; the SHA-256 of every file is added.
        large: stem -> table that nobody reads as text, written as `.parquet` alone.

    Returns:
        The directory.

    Raises:
        SinkscopeError: it can't be written.
    """
    path = check_writable(directory)
    fills: dict[str, Callable[[Path], Any]] = {}
    for stem, table in tables.items():
        fills |= {f"{stem}{kind}": partial(fill, table) for kind, fill in TABLE.items()}
    fills |= {f"{stem}.parquet": partial(_to_parquet, table) for stem, table in (large or {}).items()}
    for stem, figure in figures.items():
        fills[f"{stem}.png"] = partial(figure.savefig, format="png", dpi=160, bbox_inches="tight")
    fills["report.html"] = lambda p: p.write_text(page, encoding="utf-8")
    with claimed(path):
        try:
            replace(path, fills, about)
        except (OSError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise SinkscopeError(f"can't write the report to {str(path)!r}: {why}. What was there is still there") from None
        forget(path)
    return path


def write_table(table: pd.DataFrame, stem: Path) -> None:
    r"""Write a table as `.csv` and, exactly, as `.parquet`.

    In the CSV, text that a spreadsheet would run as a formula (`=`, `+`, `-` or `@`, full-width or not, at its beginning or
    after a semicolon) gets an apostrophe, as OWASP advises; control characters, line feeds and tabs among them, become
    escapes such as `\n` and `\x1b`.
    """
    for kind, fill in TABLE.items():
        write(stem.with_name(f"{stem.name}{kind}"), partial(fill, table))


def write(path: Path, fill: Callable[[Path], Any]) -> None:
    """Have `fill` write a file under another name, and move it into place."""
    half = path.with_name(f".{path.name}.half")
    try:
        half.unlink(missing_ok=True)  # of a killed run; or a link
        fill(half)
        half.replace(path)
    except OSError as error:
        raise SinkscopeError(f"can't write {str(path)!r}: {error.strerror or error}") from None
    finally:
        half.unlink(missing_ok=True)


def _to_csv(table: pd.DataFrame, path: Path) -> None:
    safe = table.copy()
    for column in safe.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in safe.dtypes]]:
        safe[column] = [_harmless(x) if isinstance(x, str) else x for x in safe[column]]
    safe.to_csv(path, index=False)


def _to_parquet(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path, index=False)


def _harmless(cell: str) -> str:
    return FORMULA.sub(r"\1'", cell if cell.isprintable() else "".join(map(_shown, cell)))


def _shown(character: str) -> str:
    """Escape what moves a cursor or turns the direction of writing: control and format characters, ends of lines."""
    if unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
        return character.encode("unicode_escape").decode()
    return character


TABLE: dict[str, Callable[[pd.DataFrame, Path], None]] = {".csv": _to_csv, ".parquet": _to_parquet}
