"""`sinkscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.options import AsJson, Debug
from sinkscope.cli.shown import print_table, say, say_where

if TYPE_CHECKING:
    import pandas as pd

    from sinkscope.reports.sink import SinkReport

#: Places that are printed.
SHOWN = 20
EPILOG = "Example: sinkscope compare gpt2-results smollm2-results --out both"


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Directories that measure wrote, or evaluate, or sweep.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory for the page of all of them, report.html.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put saved reports side by side: every number, null and difference to the first; what each edit costs, or each place."""
    with errors(debug):
        from sinkscope.reports.compare import side_by_side
        from sinkscope.reports.load import load_report
        from sinkscope.reports.together import edits_side_by_side, of_one_kind, places_side_by_side, save_compared

        reports: dict[str, Any] = {str(directory): load_report(directory) for directory in directories}
        kind = of_one_kind(reports)
        if not as_json and len({Path(name).name for name in reports}) == len(reports):
            reports = {Path(name).name: report for name, report in reports.items()}
        tables: dict[str, Any] = {"measure": side_by_side, "evaluate": edits_side_by_side, "sweep": places_side_by_side}
        both = tables[kind](reports).reset_index()
        if out is not None:
            save_compared(reports, out)
        if as_json:
            typer.echo(both.to_json(orient="records"))
            return
        if kind == "measure":
            print_table(*_cells(both, list(reports)))
            for note in _notes(both, reports):
                say(f"note: {note}")
        else:
            rows = both.head(SHOWN) if kind == "sweep" else both
            print_table([str(c) for c in both], [[str(x) for x in row] for row in rows.to_numpy()])
        if kind == "sweep" and len(both) > SHOWN:
            say(f"the {SHOWN} of {len(both)} places that differ most; --json gives all")
        say_where(out, as_json)


def _notes(both: pd.DataFrame, reports: dict[str, SinkReport]) -> list[str]:
    """Say once what makes the reports hard to compare; that chance differs follows from lengths that do."""
    from sinkscope.reports.compare import lengths_differ

    lengths = lengths_differ(reports)
    found = [lengths] if lengths else []
    for name in list(reports)[1:]:
        said = both[f"{name} - {next(iter(reports))} note"].dropna().str.split("; ")
        parts = dict.fromkeys(part for note in said for part in note if part)
        others = [part for part in parts if not part.startswith("chance differs")]
        if others:
            found.append(f"{name} has {others[0]}: not compared pair by pair")
        elif len(parts) and not lengths:
            found.append(f"chance is not the same for {name}, in {len(parts)} numbers")
    return found


def _cells(both: pd.DataFrame, names: list[str]) -> tuple[list[str], list[list[str]]]:
    """Lay the table out for people: numbers with three digits, an interval in a cell, why there is none in its place."""
    from sinkscope.reports.words import number

    header, rows = ["metric", *(f"{name}{what}" for name in names for what in ("", " null"))], []
    titles = [f"{name} - {names[0]}" for name in names[1:]]
    for row in both.to_dict("records"):
        cells = [row["metric"], *(number(row[column]) for column in header[1:])]
        for title in titles:
            low, high = (number(row[f"{title} {end}"]) for end in ("low", "high"))
            how = row[f"{title} interval"]
            cells += [number(row[title]), f"{low} to {high}" if low else how if how == how else "", how if low else ""]
        rows.append(cells)
    return [*header, *(column for title in titles for column in (title, "95% interval", "how"))], rows
