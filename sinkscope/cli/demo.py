"""`sinkscope demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.measure import measured
from sinkscope.cli.options import AsJson, Debug, Device
from sinkscope.cli.shown import say, say_where, show

EPILOG = "Example: sinkscope demo --out first-look, then open first-look/report.html"


def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the results.")] = Path("sinkscope-demo"),
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure SmolLM2-135M on five sample texts, and say what the numbers mean."""
    with errors(debug):
        from sinkscope.models import SMOLLM2
        from sinkscope.samples import samples

        report = measured(SMOLLM2, samples(), None, out, {"device": device}, quiet=as_json)
        if report is None:
            return
        show(report, as_json)
        if not as_json:
            typer.echo("\nWhat this means")
            for sentence in report.about["sentences"].values():
                say(f"  - {sentence}")
        say_where(out, as_json)
