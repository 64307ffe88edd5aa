"""Options that several commands take, and what completes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def metric_names(begun: str) -> list[str]:
    """Complete the name of a metric."""
    from sinkscope.metrics import available

    return [name for name in sorted(available()) if name.startswith(begun)]


def intervention_names(begun: str) -> list[str]:
    """Complete the name of an intervention."""
    from sinkscope.interventions import Intervention

    return [name for name in sorted(Intervention.registry) if name.startswith(begun)]


def study_names(begun: str) -> list[str]:
    """Complete the name of a study."""
    from sinkscope.studies import STUDIES

    return [name for name in ["all", *STUDIES] if name.startswith(begun)]


def model_names(begun: str) -> list[str]:
    """Names that need no network, and what lies in the directory."""
    there = [str(p) for p in Path().glob("*") if p.suffix == ".gguf" or (p / "config.json").is_file()]
    return [name for name in ["smollm2-135m", *sorted(there)] if name.startswith(begun)]


Model = Annotated[
    str,
    typer.Argument(help="smollm2-135m, a hub name such as gpt2, a directory, or a .gguf file.", autocompletion=model_names),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="A text; repeat for more.")]
Files = Annotated[
    list[Path] | None,
    typer.Option(
        "--file",
        help="A UTF-8 text file (of a model of images or sound: an image, or a .wav); repeat for more. Or one directory of "
        ".txt files, or one .jsonl file.",
    ),
]
PerText = Annotated[
    bool | None, typer.Option("--per-text/--no-per-text", help="Keep every text's finest rows. Default: of up to 100 texts.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Keep this many tokens, BOS included.")]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="BOS first? Default: the model's convention.")]
Side = Annotated[
    str | None, typer.Option("--side", help="Of an encoder-decoder: decoder (if nothing is said), encoder or cross.")
]
Targets = Annotated[
    list[str] | None,
    typer.Option("--target", help="An encoder-decoder's target of each --text, in their order. Default: it writes them."),
]
Out = Annotated[Path | None, typer.Option("--out", help="Directory for tables, pictures and report.html.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps; default: the GPU when there is one.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="auto: spread a model that is too large for one device over all.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON instead of a table.")]
