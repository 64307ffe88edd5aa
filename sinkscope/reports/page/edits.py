"""All that a page shows of `evaluate`, as one dictionary; see `docs/report_schema.md`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from pandas import DataFrame

from sinkscope.metrics.across import t_interval
from sinkscope.reports.drawing import visible
from sinkscope.reports.page.data import MOST_TEXTS, MOST_TOKENS, SCHEMA_VERSION, floats, known
from sinkscope.reports.page.parts import facts

NONE = "none"  # the run without an edit
MOST_LOSSES = 200_000
STRETCHES, FEWEST = 24, 8  # of a text, each with a mean and an interval; tokens in one
NUMBER = re.compile(r"(?<==)-?\d+(?:\.\d+)?")
NUMBERS = {"loss": "loss", "perplexity": "perplexity", "delta": "delta_loss", "low": "low", "high": "high", "kl": "kl"}
NUMBERS |= {"kept": "top1_agreement", "sink_mass": "sink_mass"}


def evaluated(summary: DataFrame, curves: DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what a page shows of edits.

    Args:
        summary: rows of :meth:`EffectReport.summary`.
        curves: loss by position: columns `text, intervention, position, loss`.
        about: how it was made: `model`, `texts`, `interval`, ...
    """
    names = summary["intervention"].tolist()
    placebos: dict[str, str] = about.get("placebos", {})
    edits = []
    for row in summary.to_dict("records"):
        edit = {"name": row["intervention"], "shown": visible(row["intervention"]), "tokens": int(row["tokens"])}
        edit |= {key: known(float(row[column])) for key, column in NUMBERS.items()}
        token = visible(str(row["sink_token"] or ""))
        place = None if pd.isna(row["sink_position"]) or not token else int(row["sink_position"])
        edit |= {"placebo_of": placebos.get(edit["name"]), "placebos": _beside(row)}
        edits.append(edit | {"sink_position": place, "sink_token": token})
    edits.sort(key=lambda edit: (names.index(edit["placebo_of"] or edit["name"]), edit["placebo_of"] is not None))
    texts = about.get("texts", [])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluate",
        "model": visible(str(about.get("model", "a model"))),
        "n_texts": len(texts),
        "n_tokens": sum(text["n_tokens"] for text in texts),
        "sentences": _sentences(edits),
        "notes": [visible(note) for note in about.get("notes", [])],
        "interval": about.get("interval", ""),
        "note": visible(about.get("no_clean_run", "")),
        "edits": edits,
        "families": _families([name for name in names if name not in placebos], placebos),
        "texts": _texts(curves, names, texts),
        "facts": [[name, visible(value)] for name, value in facts(about)],
    }


def _sentences(edits: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what the edit that costs most does, and its placebo."""
    by = sorted(
        (e for e in edits if e["name"] != NONE and e["delta"] is not None and not e["placebo_of"]), key=lambda e: -e["delta"]
    )
    if not by:
        return []
    worst = by[0]
    way = "raises" if worst["delta"] > 0 else "lowers"
    among = " costs most of these edits: it" if len(by) > 1 else ""
    said = f"{worst['shown']}{among} {way} the loss by {abs(worst['delta']):.3f} nats per token"
    said += "" if worst["low"] is None else f" (95% interval {worst['low']:+.3f} to {worst['high']:+.3f})"
    row = next((e for e in edits if e["placebo_of"] == worst["name"] and e["delta"] is not None), None)
    beside = worst["placebos"] or (row and {"n": 1, "delta": row["delta"], "p": None})
    if beside is not None and beside["delta"] is not None:
        several = beside["n"] > 1
        said += f"; its {beside['n']} placebos change" if several else "; its placebo changes"
        said += f" it by {beside['delta']:+.3f}{' on average' if several else ''}"
        said += "" if beside["p"] is None else f" (p = {beside['p']:.2g}, paired permutation test across texts)"
    return [f"{said}."]


def _beside(row: Mapping[Any, Any]) -> dict[str, Any] | None:
    """Give what an edit's placebos did, if there are any."""
    if not row.get("placebos"):
        return None
    numbers = {"delta": "placebo_delta_loss", "std": "placebo_std", "p": "placebo_p"}
    return {"n": int(row["placebos"])} | {key: known(float(row[column])) for key, column in numbers.items()}


def _families(names: Sequence[str], placebos: Mapping[str, str]) -> list[dict[str, Any]]:
    """Find edits that differ in one number: for a slider over it."""
    groups: dict[str, dict[float, str]] = {}
    for name in names:
        for number in NUMBER.finditer(name):
            open_name = f"{name[: number.start()]}…{name[number.end() :]}"
            groups.setdefault(open_name, {})[float(number[0])] = name
    placebo_of = {edit: placebo for placebo, edit in reversed(list(placebos.items()))}
    families = []
    for open_name, members in groups.items():
        if len(members) > 1:
            values = sorted(members)
            edits = [members[value] for value in values]
            families.append(
                {
                    "name": visible(open_name),
                    "over": re.findall(r"(\w+)=…", open_name)[0],
                    "values": values,
                    "edits": edits,
                    "placebos": [placebo_of.get(edit) for edit in edits],
                }
            )
    return sorted(families, key=lambda family: -sum(name is not None for name in family["placebos"]))


def _texts(curves: DataFrame, names: Sequence[str], texts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Give each text's losses along it, for as many texts as there is room for."""
    tokens = {text["label"]: text.get("tokens", []) for text in texts}
    counts = {text["label"]: text["n_tokens"] for text in texts}
    found: list[dict[str, Any]] = []
    room = MOST_LOSSES
    for label, rows in curves.groupby("text", sort=False):
        table = rows.pivot(index="position", columns="intervention", values="loss")
        table = table[[name for name in names if name in table]]
        table = table.reindex(range(int(table.index.min()), min(int(table.index.max()) + 1, MOST_TOKENS)))
        room -= table.size
        if found and (room < 0 or len(found) == MOST_TEXTS):
            break
        losses = {str(name): floats(table[name]) for name in table}
        text = {"label": str(label), "name": visible(str(label)), "count": int(counts.get(label, len(table)))}
        text |= {"first": int(table.index[0]), "tokens": [visible(t) for t in tokens.get(label, [])[:MOST_TOKENS]]}
        found.append(text | {"losses": losses, "stretches": _stretches(table)})
    return found


def _stretches(table: DataFrame) -> dict[str, Any]:
    """Mean difference to the unedited run in consecutive stretches, with the 95% interval over their tokens."""
    if NONE not in table:
        return {}
    found = {}
    for name in table:
        delta = (table[name] - table[NONE]).dropna()
        count = min(STRETCHES, len(delta) // FEWEST)
        if name == NONE or count < 2:
            continue
        parts = np.array_split(np.arange(len(delta)), count)
        values = [delta.iloc[part] for part in parts]
        means = [float(part.mean()) for part in values]
        bounds = [
            t_interval(float(part.mean()), float(part.to_numpy().std(ddof=1) / math.sqrt(len(part))), len(part))
            for part in values
        ]
        edges = [[int(part.index[0]), int(part.index[-1])] for part in values]
        low, high = (floats([bound[side] for bound in bounds]) for side in (0, 1))
        found[str(name)] = {"edges": edges, "mean": floats(means), "low": low, "high": high}
    return found
