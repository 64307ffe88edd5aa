"""The command line: one command per verb, a file each. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import compare, demo, evaluate, mask, measure, metrics, study, sweep

app = typer.Typer(
    name="sinkscope",
    help="Attention sinks, measured exactly: how much attention lands on one token, beside what chance would give.",
    epilog="Try: sinkscope demo. Exit codes: 0 fine, 1 something you can mend (one line on stderr), 2 wrong usage, "
    "130 interrupted. Tab completion: sinkscope --install-completion.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command(epilog=measure.EPILOG)(measure.measure)
app.command(epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=sweep.EPILOG)(sweep.sweep)
app.command(epilog=mask.EPILOG)(mask.mask)
app.command(epilog=study.EPILOG)(study.study)
app.command(epilog=demo.EPILOG)(demo.demo)
app.command(epilog=compare.EPILOG)(compare.compare)
app.command(epilog=metrics.EPILOG)(metrics.metrics)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from sinkscope import __version__

        typer.echo(__version__)
        raise typer.Exit
