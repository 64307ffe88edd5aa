"""The command line: one command per verb. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from sinkscope.effect import EffectReport
    from sinkscope.report import SinkReport

app = typer.Typer(
    name="sinkscope",
    help="Attention sinks, measured exactly: how much attention lands on one token, beside what chance would give.",
    epilog="Try: sinkscope demo. Exit codes: 0 fine, 1 something you can mend (one line on stderr), 2 wrong usage, "
    "130 interrupted. Tab completion: sinkscope --install-completion.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _metrics(begun: str) -> list[str]:
    from sinkscope.metrics import available

    return [name for name in sorted(available()) if name.startswith(begun)]


def _interventions(begun: str) -> list[str]:
    from sinkscope.interventions import Intervention

    return [name for name in sorted(Intervention.registry) if name.startswith(begun)]


def _studies(begun: str) -> list[str]:
    from sinkscope.studies import STUDIES

    return [name for name in ["all", *STUDIES] if name.startswith(begun)]


def _models(begun: str) -> list[str]:
    """Names that need no network, and what lies in the directory."""
    there = [str(p) for p in Path().glob("*") if p.suffix == ".gguf" or (p / "config.json").is_file()]
    return [name for name in ["smollm2-135m", *sorted(there)] if name.startswith(begun)]


Model = Annotated[
    str,
    typer.Argument(help="smollm2-135m, a hub name such as gpt2, a directory, or a .gguf file.", autocompletion=_models),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text; repeat for more.")]
Files = Annotated[
    list[Path] | None,
    typer.Option("--file", help="A UTF-8 text file; repeat for more. Or one directory of .txt files, or one .jsonl file."),
]
PerText = Annotated[
    bool | None, typer.Option("--per-text/--no-per-text", help="Keep every text's finest rows. Default: of up to 100 texts.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Keep this many tokens, BOS included.")]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="BOS first? Default: the model's convention.")]
Out = Annotated[Path | None, typer.Option("--out", help="Directory for tables, pictures and report.html.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; default: the GPU when there is one.")]
#: Options that are called otherwise than the argument that they give.
NAMES = {"checkpoints": "checkpoint"}
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto: spread a model that is too large for one device over all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")]


@app.command(epilog="Example: sinkscope measure smollm2-135m --file novel.txt --max-tokens 4096 --out results")
def measure(
    model: Model,
    text: Texts = None,
    file: Files = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Such as sink_mass or sink_rate@0.5; default: all.", autocompletion=_metrics),
    ] = None,
    max_tokens: MaxTokens = None,
    bos: Bos = None,
    engine: Annotated[str, typer.Option("--engine", help="auto, flash or hooks.")] = "auto",
    key: Annotated[
        list[str] | None, typer.Option("--key", help="Sink position: 0, -1 (last), or a token such as [SEP].")
    ] = None,
    chunk: Annotated[str, typer.Option("--chunk", help="Query rows per step: auto, none, or a number.")] = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts per forward pass.")] = 8,
    per_text: PerText = None,
    backend: Annotated[str, typer.Option("--backend", help="bridge or hooked_transformer.")] = "bridge",
    device: Device = None,
    device_map: DeviceMap = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure the attention sink of a model on texts."""
    with _errors(debug):
        texts = _texts(text or [], file or [])
        report = _measure(
            model,
            texts,
            metric or None,
            out,
            {"backend": backend, "device": device, "device_map": device_map},
            key=[_key(k) for k in key] if key else 0,
            bos=bos,
            max_tokens=max_tokens,
            engine=engine,
            chunk=_chunk(chunk),
            batch_size=batch_size,
            per_text=per_text,
        )
        if report is not None:
            _show(report, as_json)
            _say_where(out, as_json)


@app.command(
    epilog="Example: sinkscope evaluate smollm2-135m --file novel.txt --max-tokens 4096 --score-from 512 "
    '--intervention "window(size=256)" --intervention "sink_window(size=256, sinks=4)"'
)
def evaluate(
    model: Model,
    text: Texts = None,
    file: Files = None,
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervention",
            help='Such as "window(size=256)"; repeat for more. Default: window and sink_window.',
            autocompletion=_interventions,
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    score_from: Annotated[int, typer.Option("--score-from", help="Score predictions from this position on (0-based).")] = 1,
    bos: Bos = None,
    per_text: PerText = None,
    device: Device = None,
    device_map: DeviceMap = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Edit the forward pass (evict, mask, zero, drop a token) and see what happens to the loss."""
    with _errors(debug):
        from sinkscope.causal import evaluate as run
        from sinkscope.files import check_writable
        from sinkscope.interventions import parse
        from sinkscope.models import load_model
        from sinkscope.resume import claimed
        from sinkscope.share import joined

        edits = [parse(i) for i in intervention or ["window(size=256)", "sink_window(size=256, sinks=4)"]]
        texts = _texts(text or [], file or [])
        if out is not None:
            check_writable(out)
        how: dict[str, Any] = {"score_from": score_from, "bos": bos, "max_tokens": max_tokens, "per_text": per_text}
        with joined() as share, claimed(out if share.rank == 0 else None):
            loaded = load_model(model, device=device, device_map=device_map)
            report = run(loaded, texts, edits, progress=True, resume=out, distributed=share.world > 1, **how)
            if share.rank > 0:
                return
            if out is not None:
                report.save(out)
        _show_effects(report, as_json)
        _say_where(out, as_json)


@app.command(epilog="Example: sinkscope study bos smollm2-135m --out study; sinkscope study all smollm2-135m --out studies")
def study(
    name: Annotated[
        str, typer.Argument(help="`all`, or a study: first-token, sink-rate, non-first, bos, ...", autocompletion=_studies)
    ],
    model: Model,
    file: Annotated[Path | None, typer.Option("--file", help="A long UTF-8 text; default: Python's own reference.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Keep this many tokens, BOS included.")] = None,
    sequences: Annotated[int | None, typer.Option("--sequences", help="Pieces that the text is cut into.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", help="Tokens of each piece, BOS included.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Of whatever is drawn.")] = None,
    score_from: Annotated[int | None, typer.Option("--score-from", help="First position scored.")] = None,
    budget: Annotated[int | None, typer.Option("--budget", help="streaming-llm: keys in a window, sinks included.")] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="streaming-llm: also re-computation, which is slow.")
    ] = False,
    ratio: Annotated[float | None, typer.Option("--ratio", help="massive-activations: times the median.")] = None,
    also: Annotated[list[str] | None, typer.Option("--also", help="architectures: another model; repeat for more.")] = None,
    checkpoint: Annotated[
        list[int] | None, typer.Option("--checkpoint", help="emergence: a training step of MODEL, as Pythia's; repeat.")
    ] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a published experiment: our figures beside the published ones."""
    with _errors(debug):
        from sinkscope.errors import SinkscopeError
        from sinkscope.files import check_writable
        from sinkscope.models import load_model
        from sinkscope.studies import find, run_all
        from sinkscope.tokens import read_text

        text = None if file is None else {file.name: read_text(file)}
        options: dict[str, Any] = {
            "max_tokens": max_tokens,
            "sequences": sequences,
            "tokens": tokens,
            "seed": seed,
            "score_from": score_from,
        }
        options |= {"budget": budget, "ratio": ratio, "recompute": recompute or None}
        options |= {"also": also or None, "checkpoints": checkpoint or None}
        how = {key: value for key, value in options.items() if value is not None}
        run: Any = run_all if name == "all" else find(name)
        strange = sorted(how.keys() - inspect.signature(run).parameters.keys())
        if strange:
            raise SinkscopeError(f"study {name!r} takes no --{NAMES.get(strange[0], strange[0].replace('_', '-'))}")
        if name == "all" and out is None:
            raise SinkscopeError("study all writes a directory: give it, --out DIR")
        if out is not None:
            check_writable(out)
        if also:
            how["also"] = [load_model(other, device=device) for other in also]
        loaded = model if "checkpoints" in how else load_model(model, device=device)
        if name == "all" and out is not None:
            typer.echo(f"every study: {run_all(loaded, text, out, progress=True)}")
            return
        report = run(loaded, text, progress=True, **how)
        if as_json:
            typer.echo(report.table.to_json(orient="records"))
        else:
            table = report.shown()
            _table(list(table.columns), table.to_numpy().tolist())
            _say(f"\n{report.verdict}\n\n{report.said}")
        if out is not None:
            report.save(out)
            if not as_json:
                typer.echo(f"\nstudy: {out / 'study.html'}")


@app.command(epilog="Example: sinkscope demo --out first-look, then open first-look/report.html")
def demo(
    out: Annotated[Path, typer.Option("--out", help="Directory for the results.")] = Path("sinkscope-demo"),
    device: Device = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure SmolLM2-135M on five sample texts, and say what the numbers mean."""
    with _errors(debug):
        from sinkscope.models import SMOLLM2
        from sinkscope.samples import samples

        report = _measure(SMOLLM2, samples(), None, out, {"device": device})
        if report is None:
            return
        _show(report, as_json)
        if not as_json:
            typer.echo("\nWhat this means")
            for sentence in report.about["sentences"].values():
                _say(f"  - {sentence}")
        _say_where(out, as_json)


@app.command(epilog="Example: sinkscope compare gpt2-results smollm2-results")
def compare(
    directories: Annotated[list[Path], typer.Argument(help="Directories that measure wrote.")],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Put saved reports side by side: value and null of every model-level number."""
    with _errors(debug):
        from sinkscope.compare import side_by_side
        from sinkscope.errors import SinkscopeError
        from sinkscope.files import load_report
        from sinkscope.report import SinkReport

        reports = {}
        for directory in directories:
            report = load_report(directory)
            if not isinstance(report, SinkReport):
                raise SinkscopeError(f"{str(directory)!r} holds what evaluate wrote; compare takes what measure wrote")
            reports[str(directory)] = report
        table = side_by_side(reports)
        if as_json:
            typer.echo(table.reset_index().to_json(orient="records"))
            return
        _table([str(c) for c in table.reset_index().columns], [[str(x) for x in row] for row in table.reset_index().values])


@app.command(epilog="Example: sinkscope metrics; sinkscope measure smollm2-135m --text 'Some words' --metric row_entropy")
def metrics(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the metrics, with one line each."""
    with _errors(debug):
        from sinkscope.metrics import available

        found = {name: m.doc for name, m in sorted(available().items())}
        if as_json:
            typer.echo(json.dumps(found))
            return
        _table(["metric", "what it is"], [[name, doc] for name, doc in found.items()])


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        from sinkscope import __version__

        typer.echo(__version__)
        raise typer.Exit


def _measure(
    name: str,
    texts: dict[str, str] | Path,
    metric: list[str] | None,
    out: Path | None,
    load: dict[str, Any],
    **how: Any,
) -> SinkReport | None:
    """Check what can be checked before the model is loaded; then load, measure and write.

    Of several processes that `torchrun` started, the first gives the report.
    """
    from dataclasses import replace

    from sinkscope.attention import attention_map
    from sinkscope.files import check_writable
    from sinkscope.metrics import resolve
    from sinkscope.models import load_model
    from sinkscope.observe import measure as run
    from sinkscope.resume import claimed
    from sinkscope.share import joined

    resolve(metric)
    if out is not None:
        check_writable(out)
    if sys.stderr.isatty():
        typer.echo(f"loading {name} ...", err=True)
    with joined() as share, claimed(out if share.rank == 0 else None):
        model = load_model(name, **load)
        report = run(model, texts, metric, progress=True, resume=out, distributed=share.world > 1, **how)
        if share.rank > 0:
            return None
        if out is not None:
            if isinstance(texts, dict):
                short = min(texts.values(), key=len)
                report = replace(report, attention=attention_map(model, short, bos=how.get("bos")))
            report.save(out)
    return report


def _texts(texts: list[str], files: list[Path]) -> dict[str, str] | Path:
    from sinkscope.errors import SinkscopeError
    from sinkscope.tokens import as_stream, read_text

    if not texts and not files:
        raise SinkscopeError("no text: give --text 'some words' or --file PATH (each may be repeated)")
    for path in files:
        if as_stream(path) is not None:
            if texts or len(files) > 1:
                raise SinkscopeError(f"{str(path)!r} is a whole corpus, which is read as a stream: give it alone")
            if path.is_dir() and not any(path.glob("*.txt")):
                raise SinkscopeError(f"the directory {str(path)!r} holds no .txt file")
            return path
    found = {f"text {i}": text for i, text in enumerate(texts)}
    for path in files:
        label = path.name if path.name not in found else str(path)
        if label in found:
            raise SinkscopeError(f"the file {label!r} is given twice")
        found[label] = read_text(path)
    for index, (label, text) in enumerate(found.items()):
        if not text.strip():
            raise SinkscopeError(f"text {index} ({label!r}) is empty: give it at least two tokens of text, or leave it out")
    return found


def _key(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def _chunk(text: str) -> int | str | None:
    return None if text == "none" else int(text) if re.fullmatch(r"-?[0-9]+", text) else text


def _show(report: SinkReport, as_json: bool) -> None:
    from sinkscope.words import KEY_NUMBERS, number

    if as_json:
        typer.echo(report.summary().to_json(orient="records"))
        return
    n = len(report.texts)
    about = report.about
    _say(f"{about['model']} on {n} text{'s' * (n != 1)} ({about['device']}, {about['dtype']}); {about['bos']}")
    _say(f"engine {about['engine']}: {about['engine_why']}\n")
    rows = report.intervals()
    order = {name: i for i, name in enumerate(KEY_NUMBERS)}
    rows = rows.sort_values(
        "metric", key=lambda names: names.map(lambda m: order.get(m.partition("[")[0], 99)), kind="stable"
    )
    cells = []
    for _, row in rows.iterrows():
        value, low, high, null = (number(float(row[c])) for c in ("value", "low", "high", "null"))
        cells.append([str(row["metric"]), value, f"{low} to {high}" if low else "", null])
    _table(["metric", "value", "95% interval", "chance"], cells)
    if n == 1:
        typer.echo("One text: no interval (give several texts for one).")


def _show_effects(report: EffectReport, as_json: bool) -> None:
    from sinkscope.words import number, percent

    rows = report.summary()
    if as_json:
        typer.echo(rows.to_json(orient="records"))
        return
    about = report.about
    _say(f"{report} ({about['device']}, {about['dtype']}); {about['bos']}")
    typer.echo(f"loss in nats per token, of {int(rows['tokens'].max())} tokens; interval: {about['interval']}\n")
    if "no_clean_run" in about:
        _say(f"{about['no_clean_run']}\n")
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
    _table(["intervention", "loss", "perplexity", "difference", "95% interval", "KL", "on token 0", "most goes to"], cells)


def _say_where(out: Path | None, as_json: bool) -> None:
    if out is not None and not as_json:
        typer.echo(f"\nreport: {out / 'report.html'}")


def _table(header: list[str], rows: list[list[str]]) -> None:
    """Print a table: drawn on a terminal, plain columns when piped."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for index, name in enumerate(header):
        right = index > 0 and all(r[index][:1].isdigit() or r[index][:1] in "-" for r in rows if r[index])
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_plain(cell) for cell in row))
    console = Console(markup=False, highlight=False)
    console.width = max(console.width, 200) if not console.is_terminal else console.width
    console.print(table)


def _say(words: str) -> None:
    """Print text that may hold names from anywhere."""
    typer.echo("\n".join(map(_plain, words.split("\n"))))


def _plain(cell: str) -> str:
    """Keep control characters of hostile names away from the terminal."""
    return "".join(c if c.isprintable() else "?" for c in cell)


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn an error that the user can mend into one line and exit code 1."""
    from sinkscope.errors import SinkscopeError

    try:
        yield
    except SinkscopeError as error:
        if debug:
            raise
        typer.echo(f"sinkscope: error: {_plain(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("sinkscope: interrupted", err=True)
        raise typer.Exit(130) from None
