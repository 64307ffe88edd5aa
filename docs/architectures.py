"""What the library makes of each architecture in TransformerLens's registry, tried out; `compatibility.py` writes it down.

A tiny random model is saved, loaded with `ss.load_model`, and measured with nothing said; what comes out is compared with
what Hugging Face's own model, eager and asked for `output_attentions`, gives for each text alone.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_inputs, tiny_tokenizer
from sinkscope.testing.architectures import ALSO_CALLED, ARCHITECTURES
from sinkscope.testing.senses import BY_CLASS

#: Two texts of unequal length, past every window; ids from 60 on stand for images or sound.
TEXTS = {
    f"of {length}": [1, *torch.randint(4, 60, (length - 1,), generator=torch.Generator().manual_seed(length)).tolist()]
    for length in (13, 26)
}
#: What an encoder-decoder reads; the texts are then its targets.
SOURCE = [*range(5, 25), 2]
METRICS = ["sink_mass", "row_entropy", "received_profile"]
TOLERANCE = 1e-5
RIGHT, REFUSED, WRONG, FOREIGN = "right", "refused", "**wrong**", "**an error**"
REMOTE, UNTRIED = "remote code", "not tried"
#: What a tiny model can't be built of here.
NEEDS = {"Gemma3nForConditionalGeneration": "timm, for its images"}
#: Of what is said, at most.
LONGEST = 150
HEAD = """## Every architecture of the registry

A tiny random model of each architecture that TransformerLens lists is saved, loaded with `ss.load_model` and measured with
nothing said. *Right*: sink mass, row entropy and received profile of two texts of unequal length (two images, two
sounds) are those of Hugging Face's eager `output_attentions`, of each alone, to 1e-5 (of an encoder-decoder, the decoder's
own). *Refused*: with a `SinkscopeError` that says what works instead. *Remote code*: the architecture's code lies in its
repository, and is not run. Models are those that the registry lists. Of models of text that take images or sound as well, it
is the text model that is right, on text (with images or sound in it, fourteen of them are under test); of
`GlmMoeDsaForCausalLM`, texts of up to as many tokens as its indexer chooses keys, longer ones are refused.
`python docs/compatibility.py NAME ...` tries some architectures anew and keeps the other rows.

| by default | architectures | models | share |
| --- | --- | --- | --- |
"""
TABLE = """| architecture | models | by default | engine, or what is said |
| --- | --- | --- | --- |
"""


class Verdict(NamedTuple):
    """What one architecture came to: a word, and the engine, or what is said."""

    architecture: str
    models: int
    verdict: str
    how: str = ""


def registry() -> Counter[str]:
    """Count the models of each architecture that TransformerLens lists on the hub."""
    from transformer_lens.tools.model_registry.api import get_supported_models

    return Counter(entry.architecture_id for entry in get_supported_models())


def tried(architecture: str, models: int) -> Verdict:
    """Load, measure and compare."""
    name = ALSO_CALLED.get(architecture, architecture)
    if name not in ARCHITECTURES:
        return Verdict(architecture, models, REMOTE)
    if name in NEEDS:
        return Verdict(architecture, models, UNTRIED, f"needs {NEEDS[name]}")
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        place = Path(directory, name)
        plain = tiny_hf_model(name)
        plain.save_pretrained(place)
        inputs = inputs_of(plain)
        if name not in BY_CLASS:
            tiny_tokenizer(name).save_pretrained(place)
        try:
            report = ss.measure(ss.load_model(place), {label: given for label, (given, _) in inputs.items()}, METRICS)
        except ss.SinkscopeError as error:
            return Verdict(architecture, models, REFUSED, said(error))
        except Exception as error:  # what must not be
            return Verdict(architecture, models, FOREIGN, f"{type(error).__name__}: {said(error)}")
        plain = type(plain).from_pretrained(place, attn_implementation="eager")  # some weights are not saved, but made
        expected = {label: attentions(plain, asked) for label, (_, asked) in inputs.items()}
    causal = all(not weights.triu(1).any() for layers in expected.values() for weights in layers)
    if report.about["causal"] != causal:
        return Verdict(architecture, models, WRONG, f"causal is {report.about['causal']}")
    gap, where = max(apart(report, label, layers, causal) for label, layers in expected.items())
    if not gap < TOLERANCE:
        return Verdict(architecture, models, WRONG, f"{where} by {gap:.1g}")
    return Verdict(architecture, models, RIGHT, report.about["engine"])


def row(verdict: Verdict) -> str:
    """Write a row of the table."""
    return f"| `{verdict.architecture}` | {verdict.models:,} | {verdict.verdict} | {verdict.how} |"


def section(verdicts: list[Verdict]) -> str:
    """Write the table, and above it how many of the registry's models each verdict stands for."""
    total = sum(verdict.models for verdict in verdicts)
    lines = []
    for word in (RIGHT, REFUSED, REMOTE, UNTRIED, WRONG, FOREIGN):
        ones = [verdict for verdict in verdicts if verdict.verdict == word]
        models = sum(verdict.models for verdict in ones)
        lines.append(f"| {word} | {len(ones)} | {models:,} | {models / total:.1%} |")
    counts, rows = "\n".join(lines), "\n".join(map(row, verdicts))
    return f"{HEAD}{counts}\n\n{TABLE}{rows}\n"


def everything(page: str, only: Collection[str] = ()) -> list[Verdict]:
    """Try the whole registry, most models first: some minutes. Or try some, and keep the others' rows of a page."""
    cells = (re.split(r" (?<!\\)\| ", line.strip("| ")) for line in page.splitlines() if line.startswith("| `"))
    kept = {name.strip("`"): how for name, _, *how in cells} if only else {}
    return [
        Verdict(name, models, *kept[name]) if name in kept and name not in only else tried(name, models)
        for name, models in registry().most_common()
    ]


def said(error: Exception) -> str:
    """Give the first line of an error as a cell of a table."""
    words = str(error).strip().partition("\n")[0].replace("|", "\\|")
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rpartition(' ')[0]} ..."


def inputs_of(plain: Any) -> dict[str, tuple[Any, dict[str, torch.Tensor]]]:
    """Give two texts, images or sounds: label -> what `measure` is given, and what Hugging Face's model is."""
    name = type(plain).__name__
    if name in BY_CLASS:
        made = {f"input {seed}": tiny_inputs(name, 1, seed) for seed in range(2)}
        return {label: (given, given) for label, given in made.items()}
    if plain.config.is_encoder_decoder:
        read = torch.tensor([SOURCE])
        return {
            label: ((SOURCE, ids), {"input_ids": read, "decoder_input_ids": torch.tensor([ids])})
            for label, ids in TEXTS.items()
        }
    return {label: (ids, {"input_ids": torch.tensor([ids])}) for label, ids in TEXTS.items()}


def attentions(plain: Any, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Give what Hugging Face says of one input, `[head, query, key]` for each layer that attends.

    Behind the columns of tokens there may be some of keys that stand for several (DeepSeek V4).
    """
    with torch.no_grad():
        found = plain(**given, output_attentions=True)["decoder_attentions" if "decoder_input_ids" in given else "attentions"]
    return [layer[0, ..., : layer.shape[2]] for layer in found if isinstance(layer, torch.Tensor)]


def apart(report: ss.SinkReport, label: str, layers: list[torch.Tensor], causal: bool) -> tuple[float, str]:
    """Give the largest difference of a text, and in which metric."""
    gaps = []
    for metric in METRICS:
        rows = report.frame[(report.frame["metric"] == metric) & (report.frame["text"] == label)]
        for layer, weights in zip(report.about["layers"], layers, strict=True):
            here = rows[rows["layer"] == layer].sort_values(["head", "key"])
            expected = expectation(metric, weights, causal).numpy()
            gaps.append((float(np.abs(here["value"].to_numpy().reshape(expected.shape) - expected).max()), metric))
    return max(gaps)


def expectation(metric: str, weights: torch.Tensor, causal: bool) -> torch.Tensor:
    """Reduce one layer's attention, `[head, query, key]`, as the metric's definition says."""
    weights = weights.double()
    if metric == "sink_mass":
        return weights[:, :, 0].mean(1)
    if metric == "row_entropy":
        return torch.special.entr(weights).sum(-1).mean(1)
    n = weights.shape[1]
    return weights.mean(0).sum(0) / (n - torch.arange(n) if causal else n)
