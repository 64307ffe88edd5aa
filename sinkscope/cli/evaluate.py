"""`sinkscope evaluate`."""

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
    PerText,
    Side,
    Targets,
    Texts,
    intervention_names,
)
from sinkscope.cli.running import carried_out
from sinkscope.cli.shown import say_where, show_effects

EPILOG = (
    "Example: sinkscope evaluate smollm2-135m --file novel.txt --max-tokens 4096 --score-from 512 "
    '--intervention "window(size=256)" --intervention "sink_window(size=256, sinks=4)"'
)


def evaluate(
    model: Model,
    text: Texts = None,
    file: Files = None,
    target: Targets = None,
    side: Side = None,
    intervention: Annotated[
        list[str] | None,
        typer.Option(
            "--intervention",
            help='Such as "window(size=256)"; repeat for more. Default: window and sink_window.',
            autocompletion=intervention_names,
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    score_from: Annotated[int, typer.Option("--score-from", help="Score predictions from this position on (0-based).")] = 1,
    placebo: Annotated[int, typer.Option("--placebo", help="Run as many placebos beside each edit.")] = 0,
    bos: Bos = None,
    per_text: PerText = None,
    device: Device = None,
    device_map: DeviceMap = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Edit the forward pass (evict, mask, zero, drop a token) and see what happens to the loss."""
    with errors(debug):
        from sinkscope.causal import evaluate as run
        from sinkscope.interventions import parse

        edits = [parse(i) for i in intervention or ["window(size=256)", "sink_window(size=256, sinks=4)"]]
        given = paired(texts(text or [], file or []), target or [])
        how: dict[str, Any] = {"score_from": score_from, "placebo": placebo, "bos": bos, "max_tokens": max_tokens}
        how |= {"side": side, "per_text": per_text, "progress": True, "resume": out}
        report = carried_out(
            model,
            out,
            lambda loaded, share: run(loaded, given, edits, distributed=share.world > 1, **how),
            quiet=as_json,
            device=device,
            device_map=device_map,
        )
        if report is not None:
            show_effects(report, as_json)
            say_where(out, as_json)
