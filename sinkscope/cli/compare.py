"""`sinkscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.options import AsJson, Debug
from sinkscope.cli.shown import print_table, say_where

EPILOG = "Example: sinkscope compare gpt2-results smollm2-results --out both"


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Directories that measure wrote, or evaluate.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory for the page of all of them, report.html.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put saved reports side by side: value and null of every model-level number, or what each edit costs."""
    with errors(debug):
        from sinkscope.reports.compare import save_compared, side_by_side
        from sinkscope.reports.load import load_report

        reports = {str(directory): load_report(directory) for directory in directories}
        both = side_by_side(reports)
        if out is not None:
            save_compared(reports, out)
        if as_json:
            typer.echo(both.reset_index().to_json(orient="records"))
            return
        rows = both.reset_index()
        print_table([str(c) for c in rows.columns], [[str(x) for x in row] for row in rows.to_numpy()])
        say_where(out, as_json)
