"""Saved reports, read back: what is damaged is named, and what looks otherwise than a report is none."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sinkscope.errors import SinkscopeError
from sinkscope.reports import effect, sink, sweep
from sinkscope.reports.effect import EffectReport
from sinkscope.reports.seals import SEAL, Sealed
from sinkscope.reports.sink import SinkReport
from sinkscope.reports.sweep import SweepReport
from sinkscope.reports.tables import QUERY
from sinkscope.results import ALL
from sinkscope.runs.schema import fits

#: What every seal says, and what those of `measure`, `evaluate` and `sweep` say besides.
ABOUT: dict[str, Any] = dict.fromkeys(("model", "engine", "engine_why", "bos", "dtype", "device", "sinkscope"), str)
ABOUT |= {"texts": [{"label": str, "n_tokens": int}], "layers": [int], "arguments": {}}
MEASURED = {"arguments": {"metrics": [str], "key": [int | str]}, "sentences": {...: str}}
EVALUATED = {"arguments": {"interventions": [str]}, "interval": str}
SWEPT = {"arguments": {"edit": str, "over": str}, "interval": str}
#: Columns of the tables that are text, and whole numbers; all others are numbers.
TEXT = frozenset({"model", "text", "metric", "intervention", "sink_token", "query_token", "key_token"})
WHOLE = frozenset({"layer", "head", "key", "tokens", "position", "sink_position", "query"})
DETAILS = ["text", "intervention", "low", "high", "top1_agreement", "sink_token"]
CURVES = ["text", "intervention", "position", "loss"]
PATTERNS = ["layer", "head", "query", "key", "query_token", "value"]
#: What tells the rows of a table apart, where one row is expected.
ONCE = {"attention": ["query", "key"], "effects": ["text", "intervention"], "details": ["text", "intervention"]}
ONCE |= {"curves": ["text", "intervention", "position"], "sweep": ["text", *sweep.PLACE]}
SHOWN = ["query", "key", "query_token", "key_token", "value"]


Report = SinkReport | EffectReport | SweepReport


def load_report(directory: str | Path) -> Report:
    """Read a saved report: an EffectReport where `evaluate` wrote it, a SweepReport where `sweep` did, else a SinkReport.

    Reports of earlier versions are read as well; from 0.2 on every file's SHA-256 is compared with the seal's.

    Raises:
        SinkscopeError: no whole report there; it says which file is damaged. One that you changed yourself may be deleted, or
            the report saved anew: only the `.parquet` files are needed.
    """
    path = Path(directory).expanduser()
    try:
        return _read(Sealed(path))
    except (FileNotFoundError, NotADirectoryError):
        raise SinkscopeError(
            f"{str(path)!r} holds no finished report (no {SEAL}); write one with report.save(...) or --out"
        ) from None
    except SinkscopeError:
        raise
    except Exception as error:  # whatever damage makes the readers raise, of which there is no list
        why = " ".join(str(error).split()) or type(error).__name__
        raise SinkscopeError(f"the report in {str(path)!r} can't be read: {why[:300]}") from None


def _read(sealed: Sealed) -> Report:
    about, files = sealed.about, sealed.files()
    fits(about, ABOUT, SEAL)
    labels = {ALL, *(text["label"] for text in about["texts"])}
    if "interventions" in about["arguments"]:
        fits(about, EVALUATED, SEAL)
        frame = _table(files, "effects", effect.COLUMNS, labels)
        return EffectReport(frame, _table(files, "details", DETAILS, labels), _table(files, "curves", CURVES, labels), about)
    if "over" in about["arguments"]:
        fits(about, SWEPT, SEAL)
        return SweepReport(_table(files, "sweep", sweep.COLUMNS, labels), about)
    fits(about, MEASURED, SEAL)
    for text in about["texts"]:
        if "tokens" in text:
            fits(text, {"tokens": [str]}, f"{SEAL}.texts")
    frame = _table(files, "measurements", sink.COLUMNS, labels)
    summary = _table(files, "summary", sink.SUMMARY_COLUMNS, labels)
    shown = _table(files, "attention", SHOWN, labels) if "attention.parquet" in files else None
    patterns = _table(files, "patterns", PATTERNS, labels) if "patterns.parquet" in files else None
    return SinkReport(frame, summary, about, shown, patterns)


def _table(files: Mapping[str, bytes], stem: str, columns: list[str], labels: set[str]) -> pd.DataFrame:
    """Read a table, which has these columns at least, each of its kind."""
    name = f"{stem}.parquet"
    if name not in files:
        raise ValueError(f"{name} is missing")
    try:
        table = pd.read_parquet(io.BytesIO(files[name]))
    except Exception as error:  # whatever the reader raises
        raise ValueError(f"{name} is damaged: {error or type(error).__name__}") from None
    if [c for c in table.columns if c != QUERY or QUERY in columns][: len(columns)] != columns:
        raise ValueError(f"{name} has the columns {list(table.columns)}, not {columns}")
    for column in columns if len(table) else ():  # a table without rows has no types
        if not _is_kind(table[column], column):
            raise ValueError(f"{name}: the column {column!r} holds something else than it must")
    if stem in ONCE and table.duplicated(ONCE[stem]).any():
        raise ValueError(f"{name} has two rows of one {' and '.join(ONCE[stem])}")
    if "text" in columns and not labels.issuperset(table["text"]):
        raise ValueError(f"{name} has rows of texts that {SEAL} does not know")
    return table


def _is_kind(values: pd.Series[Any], column: str) -> bool:
    if column in TEXT:
        if isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype(values.cat.categories.dtype)
        return pd.api.types.infer_dtype(values, skipna=False) == "string" and not bool(values.isna().any())
    if column in WHOLE:
        return pd.api.types.is_integer_dtype(values.dtype) and bool((values.dropna() >= 0).all())
    return pd.api.types.is_float_dtype(values.dtype)
