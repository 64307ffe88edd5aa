"""`sinkscope metrics`."""

from __future__ import annotations

import json

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.options import AsJson, Debug
from sinkscope.cli.shown import print_table

EPILOG = "Example: sinkscope metrics; sinkscope measure smollm2-135m --text 'Some words' --metric row_entropy"


def metrics(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the metrics, with one line each."""
    with errors(debug):
        from sinkscope.metrics import available

        found = {name: m.doc for name, m in sorted(available().items())}
        if as_json:
            typer.echo(json.dumps(found))
            return
        print_table(["metric", "what it is"], [[name, doc] for name, doc in found.items()])
