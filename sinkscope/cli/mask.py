"""`sinkscope mask`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli.inputs import errors, texts
from sinkscope.cli.options import AsJson, Bos, Debug, Device, DeviceMap, Files, MaxTokens, Model, Out, Texts
from sinkscope.cli.running import carried_out
from sinkscope.cli.shown import print_table, say

if TYPE_CHECKING:
    from sinkscope.reports.mask import SinkMask

EPILOG = "Example: sinkscope mask smollm2-135m --file corpus.jsonl --by attention --by norm=10 --out sinks"


def rule_names(begun: str) -> list[str]:
    """Complete the name of a rule."""
    from sinkscope.masks import RULES

    return [name for name in RULES if name.startswith(begun)]


def mask(
    model: Model,
    text: Texts = None,
    file: Files = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            help="attention, norm, massive, bos_cosine or first, or with a threshold: norm=10; repeat for more.",
            autocompletion=rule_names,
        ),
    ] = None,
    layer: Annotated[list[int] | None, typer.Option("--layer", help="A layer that counts; repeat. Default: all.")] = None,
    max_tokens: MaxTokens = None,
    bos: Bos = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Texts per forward pass.")] = 8,
    device: Device = None,
    device_map: DeviceMap = None,
    out: Out = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Tell which tokens of texts are sinks; --out holds one row per flagged token."""
    with errors(debug):
        from sinkscope.errors import unknown
        from sinkscope.masks import RULES, sink_mask

        rules, eps = thresholds(by or ["attention"])
        given = texts(text or [], file or [])
        for name in rules:
            if name not in RULES:
                raise unknown("rule", name, RULES)
        how: dict[str, Any] = {"layers": layer or None, "eps": eps or None, "bos": bos, "max_tokens": max_tokens}
        how |= {"batch_size": batch_size, "progress": True, "resume": out}
        found = carried_out(
            model,
            out,
            lambda loaded, share: sink_mask(loaded, given, rules, distributed=share.world > 1, **how),
            quiet=as_json,
            device=device,
            device_map=device_map,
        )
        if found is None:
            return
        if as_json:
            typer.echo(found.agreement().to_json(orient="records"))
            return
        _show(found)
        if out is not None:
            say(f"\none row per flagged token: {out / 'mask.parquet'}")


def _show(found: SinkMask) -> None:
    """Print what each rule takes, and how far they agree."""
    say(f"{found}\n")
    table = found.agreement()
    also = [name for name in table if str(name).startswith("also_")]
    cells = [
        [r["rule"], str(r["tokens"]), f"{r['share']:.4f}", str(r["texts"]), *(f"{r[name]:.2f}" for name in also)]
        for r in table.to_dict("records")
    ]
    header = ["rule", "tokens", "share", "texts", *(f"also by {str(name).removeprefix('also_')}" for name in also)]
    print_table(header, cells)


def thresholds(by: list[str]) -> tuple[list[str], dict[str, float]]:
    """Read rules such as `norm` and `norm=10`.

    Raises:
        SinkscopeError: a threshold that is no number.
    """
    from sinkscope.errors import SinkscopeError

    rules, eps = [], {}
    for given in by:
        name, at, threshold = given.partition("=")
        rules.append(name)
        if at:
            try:
                eps[name] = float(threshold)
            except ValueError:
                raise SinkscopeError(f"--by {given}: the threshold after = must be a number, as in {name}=10") from None
    return rules, eps
