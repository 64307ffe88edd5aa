"""`sinkscope compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.options import AsJson, Debug
from sinkscope.cli.shown import print_table

EPILOG = "Example: sinkscope compare gpt2-results smollm2-results"


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Directories that measure wrote.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put saved reports side by side: value and null of every model-level number."""
    with errors(debug):
        from sinkscope.errors import SinkscopeError
        from sinkscope.reports.compare import side_by_side
        from sinkscope.reports.load import load_report
        from sinkscope.reports.sink import SinkReport

        reports = {}
        for directory in directories:
            report = load_report(directory)
            if not isinstance(report, SinkReport):
                raise SinkscopeError(f"{str(directory)!r} holds what evaluate wrote; compare takes what measure wrote")
            reports[str(directory)] = report
        both = side_by_side(reports)
        if as_json:
            typer.echo(both.reset_index().to_json(orient="records"))
            return
        rows = both.reset_index()
        print_table([str(c) for c in rows.columns], [[str(x) for x in row] for row in rows.to_numpy()])
