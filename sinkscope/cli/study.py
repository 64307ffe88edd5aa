"""`sinkscope study`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli.inputs import errors
from sinkscope.cli.options import AsJson, Debug, Device, Model, Out, study_names
from sinkscope.cli.shown import print_table, say

if TYPE_CHECKING:
    from sinkscope.studies.report import StudyReport

#: Options that are called otherwise than the argument that they give.
NAMES = {"checkpoints": "checkpoint"}
EPILOG = "Example: sinkscope study bos smollm2-135m --out study; sinkscope study all smollm2-135m --out studies"


def study(
    name: Annotated[
        str, typer.Argument(help="`all`, or a study: first-token, sink-rate, non-first, bos, ...", autocompletion=study_names)
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
    only: Annotated[list[str] | None, typer.Option("--only", help="all: these studies alone; repeat for more.")] = None,
    device: Device = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run a published experiment: our figures beside the published ones."""
    with errors(debug):
        from sinkscope.errors import SinkscopeError
        from sinkscope.models import load_model
        from sinkscope.reports.files import check_writable
        from sinkscope.runs.progress import saying
        from sinkscope.studies import find, run_all
        from sinkscope.tokens import read_text

        text = None if file is None else {file.name: read_text(file)}
        options: dict[str, Any] = {"max_tokens": max_tokens, "sequences": sequences, "tokens": tokens, "seed": seed}
        options |= {"score_from": score_from, "budget": budget, "ratio": ratio, "recompute": recompute or None}
        options |= {"also": also or None, "checkpoints": checkpoint or None, "only": only or None}
        how = {key: value for key, value in options.items() if value is not None}
        run: Any = run_all if name == "all" else find(name)
        strange = sorted(how.keys() - inspect.signature(run).parameters.keys())
        if strange:
            raise SinkscopeError(f"study {name!r} takes no --{NAMES.get(strange[0], strange[0].replace('_', '-'))}")
        if name == "all" and out is None:
            raise SinkscopeError("study all writes a directory: give it, --out DIR")
        if out is not None:
            check_writable(out)
        with saying(not as_json, f"loading {', '.join([model, *(also or [])])} ..."):
            if also:
                how["also"] = [load_model(other, device=device) for other in also]
            loaded = model if "checkpoints" in how else load_model(model, device=device)
        if name == "all" and out is not None:
            say(f"every study: {run_all(loaded, text, out, progress=True, **how)}")
        else:
            _show(run(loaded, text, progress=True, **how), out, as_json)


def _show(report: StudyReport, out: Path | None, as_json: bool) -> None:
    """Print a study, and save it where a directory was given."""
    if as_json:
        typer.echo(report.table.to_json(orient="records"))
    else:
        shown = report.shown()
        print_table(list(shown.columns), shown.to_numpy().tolist())
        say(f"\n{report.verdict}\n\n{report.said}")
    if out is not None:
        report.save(out)
        if not as_json:
            say(f"\nstudy: {out / 'study.html'}")
