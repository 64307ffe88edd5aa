"""What the command line prints: tables, sentences, and where the report is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from sinkscope.reports.effect import EffectReport
    from sinkscope.reports.sink import SinkReport


def show(report: SinkReport, as_json: bool) -> None:
    """Print what `measure` found: key numbers first."""
    from sinkscope.reports.words import KEY_NUMBERS, number

    if as_json:
        typer.echo(report.summary().to_json(orient="records"))
        return
    n = len(report.texts)
    about = report.about
    say(f"{about['model']} on {n} text{'s' * (n != 1)} ({about['device']}, {about['dtype']}); {about['bos']}")
    say(f"engine {about['engine']}: {about['engine_why']}\n")
    rows = report.intervals()
    order = {name: i for i, name in enumerate(KEY_NUMBERS)}
    rows = rows.sort_values(
        "metric", key=lambda names: names.map(lambda m: order.get(m.partition("[")[0], 99)), kind="stable"
    )
    cells = []
    for _, row in rows.iterrows():
        value, low, high, null = (number(float(row[c])) for c in ("value", "low", "high", "null"))
        cells.append([str(row["metric"]), value, f"{low} to {high}" if low else "", null])
    print_table(["metric", "value", "95% interval", "chance"], cells)
    if n == 1:
        typer.echo("One text: no interval (give several texts for one).")


def show_effects(report: EffectReport, as_json: bool) -> None:
    """Print what `evaluate` found: a row per edit."""
    from sinkscope.reports.words import number, percent

    rows = report.summary()
    if as_json:
        typer.echo(rows.to_json(orient="records"))
        return
    about = report.about
    say(f"{report} ({about['device']}, {about['dtype']}); {about['bos']}")
    typer.echo(f"loss in nats per token, of {int(rows['tokens'].max())} tokens; interval: {about['interval']}\n")
    if "no_clean_run" in about:
        say(f"{about['no_clean_run']}\n")
    plain, signed = "{:.3f}".format, "{:+.3f}".format
    how = {"loss": plain, "perplexity": number, "delta_loss": signed, "low": signed, "high": signed, "kl": plain}
    how["sink_mass"] = percent
    cells = []
    for _, r in rows.iterrows():  # what is not known is left empty
        c = {name: show(float(r[name])) if r[name] == r[name] else "" for name, show in how.items()}
        interval = f"{c['low']} to {c['high']}" if c["low"] else ""
        place = f"{r['sink_position']} {r['sink_token']!r}" if r["sink_token"] else ""
        losses = [c["loss"], c["perplexity"], c["delta_loss"], interval, c["kl"]]
        cells.append([r["intervention"], *losses, c["sink_mass"], place])
    print_table(
        ["intervention", "loss", "perplexity", "difference", "95% interval", "KL", "on token 0", "most goes to"], cells
    )


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
        right = index > 0 and all(r[index][:1].isdigit() or r[index][:1] in "-" for r in rows if r[index])
        table.add_column(name, justify="right" if right else "left", overflow="fold")
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
