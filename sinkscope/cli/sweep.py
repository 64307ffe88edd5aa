"""`sinkscope sweep`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sinkscope.cli.inputs import errors, texts
from sinkscope.cli.options import (
    AsJson,
    Bos,
    Debug,
    Device,
    DeviceMap,
    Files,
    MaxTokens,
    Model,
    Out,
    Texts,
    intervention_names,
)
from sinkscope.cli.shown import say_where, show_costs

EPILOG = (
    'Example: sinkscope sweep smollm2-135m --file novel.txt --max-tokens 256 --edit "zero_value(0)" --over heads --out map'
)


def sweep(
    model: Model,
    text: Texts = None,
    file: Files = None,
    edit: Annotated[
        str,
        typer.Option("--edit", help='What is done at each place, such as "mask_keys(0)".', autocompletion=intervention_names),
    ] = "zero_attention(0)",
    over: Annotated[str, typer.Option("--over", help="heads, layers or positions.")] = "heads",
    placebo: Annotated[
        bool | None,
        typer.Option("--placebo/--no-placebo", help="The edit's placebo at each place, too? Default: if it has one."),
    ] = None,
    position: Annotated[
        list[int] | None, typer.Option("--position", help="With --over positions: one of them; repeat. Default: all.")
    ] = None,
    max_tokens: MaxTokens = None,
    score_from: Annotated[int, typer.Option("--score-from", help="Score predictions from this position on (0-based).")] = 1,
    bos: Bos = None,
    device: Device = None,
    device_map: DeviceMap = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make one edit at every head, layer or position in turn: what does each cost?"""
    with errors(debug):
        from sinkscope.interventions import parse
        from sinkscope.models import load_model
        from sinkscope.reports.files import check_writable
        from sinkscope.runs.progress import saying
        from sinkscope.runs.resume import claimed
        from sinkscope.runs.share import joined
        from sinkscope.sweeps import sweep as run

        made, given = parse(edit), texts(text or [], file or [])
        if out is not None:
            check_writable(out)
        how: dict[str, Any] = {"score_from": score_from, "bos": bos, "max_tokens": max_tokens, "positions": position or None}
        with joined() as share, claimed(out if share.rank == 0 else None):
            with saying(share.rank == 0 and not as_json, f"loading {model} ..."):
                loaded = load_model(model, device=device, device_map=device_map)
            how |= {"placebo": placebo, "distributed": share.world > 1}
            report = run(loaded, given, made, over, progress=True, resume=out, **how)
            if share.rank > 0:
                return
            if out is not None:
                report.save(out)
        show_costs(report, as_json)
        say_where(out, as_json)
