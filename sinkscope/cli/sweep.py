"""`sinkscope sweep`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sinkscope.cli.inputs import errors, paired, texts
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
    Side,
    Targets,
    Texts,
    intervention_names,
)
from sinkscope.cli.running import carried_out
from sinkscope.cli.shown import say_where, show_costs

EPILOG = (
    'Example: sinkscope sweep smollm2-135m --file novel.txt --max-tokens 256 --edit "zero_value(0)" --over heads --out map'
)


def sweep(
    model: Model,
    text: Texts = None,
    file: Files = None,
    target: Targets = None,
    side: Side = None,
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
        from sinkscope.sweeps import sweep as run

        made, given = parse(edit), paired(texts(text or [], file or []), target or [])
        how: dict[str, Any] = {"score_from": score_from, "bos": bos, "max_tokens": max_tokens, "positions": position or None}
        how |= {"side": side, "placebo": placebo, "progress": True, "resume": out}
        report = carried_out(
            model,
            out,
            lambda loaded, share: run(loaded, given, made, over, distributed=share.world > 1, **how),
            quiet=as_json,
            device=device,
            device_map=device_map,
        )
        if report is not None:
            show_costs(report, as_json)
            say_where(out, as_json)
