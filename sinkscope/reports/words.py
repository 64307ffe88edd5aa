"""Plain words for the key numbers, beside what chance would give; and what a report calls that which was measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from sinkscope.tokens.features import READS

#: The key numbers, in the order in which a newcomer should read them.
KEY_NUMBERS = (
    "sink_mass",
    "sink_mass_excess",
    "sink_rate@0.3",
    "sink_rate@0.8",
    "last_row_share",
    "sink_strength",
    "first_to_rest_ratio",
    "layer_progression",
    "effective_keys",
    "sink_positions",
    "consistency@cv",
)


def percent(value: float) -> str:
    """Write a share as a percentage.

    >>> percent(0.4567)
    '46%'
    """
    return f"{100 * value:.1f}%" if abs(value) < 0.095 else f"{100 * value:.0f}%"


def number(value: float) -> str:
    """Write a number with three significant digits, nothing for NaN.

    >>> number(18.255), number(float("nan"))
    ('18.3', '')
    """
    if math.isnan(value):
        return ""
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def _compare(value: float, null: float) -> str:
    return "more than" if value > null else "no more than"


_SENTENCES: dict[str, Callable[[float, float, str], str]] = {
    "sink_mass": lambda v, n, k: (
        f"On average a token pays {percent(v)} of its attention to {k}; spread evenly, that would be {percent(n)}."
    ),
    "sink_mass_excess": lambda v, n, k: (
        f"Beyond even attention, {k} gets {100 * v:.1f} percentage points of every later token's attention."
    ),
    "sink_rate@0.3": lambda v, n, k: (
        f"{percent(v)} of the heads give {k} over 0.3 of their attention (even attention: {percent(n)} of the heads)."
    ),
    "sink_rate@0.8": lambda v, n, k: f"{percent(v)} of the heads give {k} over 0.8 of their attention: strong sinks.",
    "last_row_share": lambda v, n, k: f"The last token still pays {percent(v)} to {k}, {_compare(v, n)} its even share.",
    "sink_strength": lambda v, n, k: f"Of all attention in the model, {percent(v)} lands on {k}.",
    "first_to_rest_ratio": lambda v, n, k: (
        f"{k[0].upper()}{k[1:]} gets {number(v)} times the attention of an average other token (even attention: {number(n)})."
    ),
    "layer_progression": lambda v, n, k: (
        f"The sink is {abs(100 * v):.1f} percentage points {'stronger' if v > 0 else 'weaker'} in the last third of the "
        "layers than in the first."
    ),
    "effective_keys": lambda v, n, k: f"A row is spread over {number(v)} keys on average, of {number(n)} if it were even.",
    "sink_positions": lambda v, n, k: (
        f"{v:.3g} positions per text act as sinks in at least a tenth of the heads; even attention: {n:.3g}."
    ),
    "consistency@cv": lambda v, n, k: f"From text to text, the sink mass varies by {percent(v)} of its mean.",
}


def nouns(about: Mapping[Any, Any]) -> dict[str, str]:
    """Say what a report calls a text and a token: of images and of sound, an image or a sound, and its positions.

    Args:
        about: of a report; `reads` is what the model reads, where that is no text.

    >>> nouns({"reads": "pixel_values"})
    {'text': 'image', 'token': 'position'}
    """
    kind = READS.get(str(about.get("reads"))) if about.get("side") != "decoder" else None  # a target is text
    return {"text": "text", "token": "token"} if kind is None else {"text": kind[0], "token": "position"}


def said(words: str, about: Mapping[Any, Any]) -> str:
    """Say of images and of sound what is written of texts and tokens.

    >>> said("Text by text: 2 texts of 9 tokens", {"reads": "pixel_values"})
    'Image by image: 2 images of 9 positions'
    """
    called = nouns(about)
    called |= {word.capitalize(): noun.capitalize() for word, noun in called.items()}
    return re.sub(r"\b([Tt]ext|[Tt]oken)(?=s?\b)", lambda found: called[found[0]], words)


def key_name(keys: list[int | str], about: Mapping[Any, Any] | None = None) -> str:
    """Call a sink position by a name that reads well; of images and sound by its own, such as `[CLS]`, where all have it."""
    names, key = {0: "the first token", -1: "the last token"}, keys[0]
    if not isinstance(key, int):
        return f"{key}"
    of = about or {}
    texts = [text.get("tokens", []) for text in of.get("texts", [])] if "reads" in of else []
    own = {tokens[key] if 0 <= key < len(tokens) else "" for tokens in texts}
    return (own.pop() if len(own) == 1 else "") or said(names.get(key, f"position {key}"), of)


def sentences(summary: pd.DataFrame, keys: list[int | str], about: Mapping[Any, Any] | None = None) -> dict[str, str]:
    """Say what each key number means.

    Args:
        summary: rows of :meth:`SinkReport.summary` for `"all"`.
        keys: the sink positions that were looked at; the words speak of the first.
        about: of the report: what it is of, `reads` and `texts`.

    Returns:
        Metric name to sentence, for those measured and not NaN; `sink_strength` not where it is the sink mass again.
    """
    by_name = {str(r["metric"]): (float(r["value"]), float(r["null"])) for r in summary.to_dict("records")}
    tag = f"[key={keys[0]}]" if len(keys) > 1 else ""
    where, found = key_name(keys, about), {}
    given = {name: by_name.get(name, by_name.get(name + tag, (math.nan, math.nan))) for name in KEY_NUMBERS}
    for name, (value, null) in given.items():
        repeated = name == "sink_strength" and math.isclose(value, given["sink_mass"][0], rel_tol=1e-6)
        if not math.isnan(value) and not repeated:
            found[name] = said(_SENTENCES[name](value, null, where), about or {})
    return found


def folded(rows: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Fold rows of a summary that say the same: metrics of one value, null and interval are one row with all their names.

    Args:
        rows: as :meth:`SinkReport.intervals` gives them, in the order in which they are to be read.

    Returns:
        Names, joined by `=`, and the first of their rows.

    >>> rows = pd.DataFrame({"metric": list("abc"), "value": [0.5, 1.0, 0.5], "null": 0.1, "low": 0.0, "high": 1.0})
    >>> [name for name, row in folded(rows)]
    ['a = c', 'b']
    """
    found: dict[tuple[str, ...], list[pd.Series]] = {}
    for _, row in rows.iterrows():
        numbers = tuple(f"{float(row[column]):.6g}" for column in ("value", "null", "low", "high"))
        trivial = row["value"] in (0.0, 1.0)  # two zeros are two facts
        found.setdefault((*numbers, str(row["metric"])) if trivial else numbers, []).append(row)
    return [(" = ".join(str(row["metric"]) for row in same), same[0]) for same in found.values()]
