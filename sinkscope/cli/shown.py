"""What the command line prints: tables, sentences, and where the report is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from sinkscope.reports.effect import EffectReport
    from sinkscope.reports.sink import SinkReport
    from sinkscope.reports.sweep import SweepReport


def show(report: SinkReport, as_json: bool) -> None:
    """Print what `measure` found: key numbers first, metrics that say the same in one row."""
    from sinkscope.reports.notes import tokens_of
    from sinkscope.reports.words import KEY_NUMBERS, folded, number, said

    if as_json:
        typer.echo(report.summary().to_json(orient="records"))
        return
    n = len(report.texts)
    about = report.about
    lengths = tokens_of([t["n_tokens"] for t in about["texts"]])
    of = said(f"{n} text{'s' * (n != 1)} of {lengths}", about)
    say(f"{about['model']} on {of} ({about['device']}, {about['dtype']}); {about['bos']}")
    say(f"engine {about['engine']}: {about['engine_why']}\n")
    rows = report.intervals()
    order = {name: i for i, name in enumerate(KEY_NUMBERS)}
    rows = rows.sort_values(
        "metric", key=lambda names: names.map(lambda m: order.get(m.partition("[")[0], 99)), kind="stable"
    )
    cells = []
    for name, row in folded(rows):
        value, low, high, null = (number(float(row[c])) for c in ("value", "low", "high", "null"))
        without = row["interval"].removeprefix("none: ") if n > 1 and not name.startswith("consistency") else ""
        cells.append([name, value, f"{low} to {high}" if low else without, null])
    print_table(["metric", "value", "95% interval", "chance"], cells)
    if n == 1:
        typer.echo(said("One text: no interval (give several texts for one).", about))
    else:
        how = said("Intervals are across texts: Student's t", about)
        say(f"{how}, of shares on the logit scale, of what is never negative on the log.")
    show_notes(about)


def show_effects(report: EffectReport, as_json: bool) -> None:
    """Print what `evaluate` found: a row per edit."""
    if as_json:
        typer.echo(report.summary().to_json(orient="records"))
        return
    about = report.about
    say(f"{report.headline} ({about['device']}, {about['dtype']}); {about['bos']}")
    scored = int(report.summary()["tokens"].max())
    typer.echo(f"loss in nats per token, of {scored} tokens; interval: {about['interval']}\n")
    if "no_clean_run" in about:
        say(f"{about['no_clean_run']}\n")
    print_table(*report.cells())
    show_notes(about)


def show_costs(report: SweepReport, as_json: bool) -> None:
    """Print what `sweep` found: the places that cost most; as JSON all of them."""
    if as_json:
        typer.echo(report.summary().to_json(orient="records"))
        return
    about = report.about
    say(f"{report.headline} ({about['device']}, {about['dtype']}); {about['bos']}")
    typer.echo(f"difference in loss, nats per token; interval: {about['interval']}\n")
    header, rows = report.cells()
    print_table(header, rows)
    more = len(report.summary()) - len(rows)
    if more > 0:
        typer.echo(f"... and {more} {report.over} that cost less")
    show_notes(about)


def show_notes(about: Mapping[str, Any]) -> None:
    """Print what to know before reading the numbers."""
    for note in about.get("notes", []):
        say(f"note: {note}")


def say_where(out: Path | None, as_json: bool) -> None:
    """Print where the page is."""
    if out is not None and not as_json:
        say(f"\nreport: {out / 'report.html'}")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table: drawn on a terminal, plain columns when piped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        right = index > 0 and all(r[index][:1].isdigit() or r[index][:1] in "+-" for r in rows if r[index])
        table.add_column(plain(name), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(plain(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 200) if not console.is_terminal else console.width
    console.print(table)


def say(words: str) -> None:
    """Print text that may hold names from anywhere."""
    typer.echo("\n".join(map(plain, words.split("\n"))))


def plain(cell: str) -> str:
    """Keep control characters of hostile names away from the terminal."""
    return "".join(c if c.isprintable() else "?" for c in cell)
