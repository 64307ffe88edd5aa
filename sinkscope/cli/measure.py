"""`sinkscope measure`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli.inputs import chunk_of, errors, key_of, media, paired, texts
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
    metric_names,
)
from sinkscope.cli.running import carried_out
from sinkscope.cli.shown import say_where, show

if TYPE_CHECKING:
    from sinkscope.reports.sink import SinkReport
    from sinkscope.runs.share import Share

EPILOG = "Example: sinkscope measure smollm2-135m --file novel.txt --max-tokens 4096 --out results"


def measure(
    model: Model,
    text: Texts = None,
    file: Files = None,
    target: Targets = None,
    side: Side = None,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="Such as sink_mass or sink_rate@0.5; default: all.", autocompletion=metric_names),
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
    with errors(debug):
        given = paired(media(text or [], file or []) or texts(text or [], file or []), target or [])
        report = measured(
            model,
            given,
            metric or None,
            out,
            {"backend": backend, "device": device, "device_map": device_map},
            quiet=as_json,
            key=[key_of(k) for k in key] if key else 0,
            side=side,
            bos=bos,
            max_tokens=max_tokens,
            engine=engine,
            chunk=chunk_of(chunk),
            batch_size=batch_size,
            per_text=per_text,
        )
        if report is not None:
            show(report, as_json)
            say_where(out, as_json)


def measured(
    name: str,
    texts: dict[str, Any] | Path,
    metric: list[str] | None,
    out: Path | None,
    load: dict[str, Any],
    *,
    quiet: bool = False,
    **how: Any,
) -> SinkReport | None:
    """Check what can be checked before the model is loaded; then load, measure and write.

    Texts are label -> text, or the path of a corpus; images and sounds label -> file, which the model's own processor reads.
    Of several processes that `torchrun` started, the first gives the report.
    """
    from sinkscope.attention import LONGEST, attention_map, attention_patterns
    from sinkscope.metrics import resolve
    from sinkscope.models.adapting import reads
    from sinkscope.models.media import processed
    from sinkscope.observe import measure as run

    def work(model: Any, share: Share) -> SinkReport:
        files = _files(texts)
        given = texts if not files else _with(texts, processed(name, reads(model), files))
        report = run(model, given, metric, progress=True, resume=out, distributed=share.world > 1, **how)
        if share.rank > 0 or out is None or not isinstance(given, dict):
            return report
        chosen = _short(report)
        asked: dict[str, Any] = {"bos": how.get("bos"), "side": how.get("side")}
        if files:  # which are not cut
            if chosen["n_tokens"] > LONGEST:
                return report
            asked["max_tokens"] = chosen["n_tokens"]
        text = given[chosen["label"]]
        kept: dict[str, Any] = {"attention": attention_map(model, text, **asked)}
        if asked["side"] != "cross":
            kept["patterns"] = attention_patterns(model, text, **asked)
        return replace(report, **kept)

    resolve(metric)
    return carried_out(name, out, work, quiet=quiet, **load)


def _files(texts: dict[str, Any] | Path) -> dict[str, Path]:
    """Give the files of images or sounds, by label; none where there are texts."""
    found = {} if isinstance(texts, Path) else {label: t[0] if isinstance(t, tuple) else t for label, t in texts.items()}
    return found if all(isinstance(path, Path) for path in found.values()) else {}


def _with(texts: Any, seen: dict[str, Any]) -> dict[str, Any]:
    """Put what was read of files in their places, beside their targets where they have some."""
    return {label: (seen[label], t[1]) if isinstance(t, tuple) else seen[label] for label, t in texts.items()}


def _short(report: SinkReport) -> dict[str, Any]:
    """Choose the text that is shown whole: the longest of those that need no cut, else the shortest."""
    from sinkscope.attention import LONGEST

    def tokens(text: dict[str, Any]) -> int:
        return int(text["n_tokens"])

    texts: list[dict[str, Any]] = report.about["texts"]
    whole = [text for text in texts if tokens(text) <= LONGEST]
    return max(whole, key=tokens) if whole else min(texts, key=tokens)
