"""Writes docs/compatibility.md: what runs on which family, tried out; a test holds the page current."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import sinkscope as ss
from sinkscope.interventions import parse
from sinkscope.testing import FAMILIES, tiny_hf_model, tiny_model

PAGE = Path(__file__).with_name("compatibility.md")
EDITS = {
    "windows": "sink_window(size=8, sinks=2)",
    "cache positions": "streaming_window(size=8, sinks=2)",
    "mask, scale, bias": "scale_attention(keys=[0], factor=2)",
    "zero attention": "zero_attention(keys=[0])",
    "values": "replace_value(keys=[0], by='noise')",
    "heads, outputs": "zero_head(heads=[0])",
    "quantised cache": "quantize_kv(bits=2)",
    "neurons": "zero_neuron(layer=1, neurons=[0])",
    "input": "drop_tokens(positions=[0])",
    "residual": "edit_activation(to=0.0, positions=[0], dims=[3], layers=[1])",
}
IDS = [1, *range(4, 24)]
HEAD = """# What runs on what

Tiny random models of each family, tried out one by one (`python docs/compatibility.py` writes this page, a test keeps it
current). *flash*, *hooks*: the engines of `measure`; *chunks*: hooks with a KV cache that is proved right; *plain*: Hugging
Face's own model, without TransformerLens. The other columns are edits: *op*, made beside an engine inside the attention op;
*hook*, beside hooks at points that were proved live; a dash: refused by name, with what works instead.

"""


def attempt(call: Callable[[], Any]) -> Any:
    """Give what a call returns, or None where it is refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except ss.SinkscopeError:
            return None


def row(family: str) -> list[str]:
    """Try one family."""
    model, plain = tiny_model(family), tiny_hf_model(family)
    metrics = ["sink_mass", "row_entropy"]
    flash, hooks = (attempt(lambda e=e: ss.measure(model, [IDS], metrics, engine=e)) for e in ("flash", "hooks"))
    chunks = attempt(lambda: ss.measure(model, [IDS * 2], metrics, chunk=8))
    alone = attempt(lambda: ss.measure(plain, [IDS], metrics))
    found = ["yes" if report is not None else "-" for report in (flash, hooks, chunks, alone)]
    for edit in EDITS.values():
        report = attempt(lambda edit=edit: ss.evaluate(model, [IDS], parse(edit)))
        found.append("-" if report is None else {"flash": "op", "hooks": "hook"}[report.about["engine"]])
    return found


def families() -> str:
    """Write the table of families."""
    names = ["family", "flash", "hooks", "chunks", "plain", *EDITS]
    table = [names, ["---"] * len(names)]
    for family in FAMILIES:
        if family != "mamba":
            table.append([f"`{family}`", *row(family)])
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("transformer-lens", "transformers", "torch"))
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"{HEAD}{lines}\n\nWith {versions}. State-space models (Mamba) have no attention and are refused by name.\n"


def page(only: Sequence[str] = ()) -> str:
    """Write the page; of architectures, try some alone."""
    import architectures  # beside this file
    import versions

    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return f"{families()}\n{architectures.section(architectures.everything(before, only))}\n{versions.section(before)}"


if __name__ == "__main__":
    made = page(sys.argv[1:])  # names of architectures, to try them alone
    PAGE.write_text(made, encoding="utf-8")
    print(made)
