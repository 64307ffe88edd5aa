"""All that a page shows of a sweep, as one dictionary; see `docs/report_schema.md`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pandas import DataFrame, notna

from sinkscope.reports.drawing import visible
from sinkscope.reports.page.data import MOST_TOKENS, SCHEMA_VERSION, floats, scale
from sinkscope.reports.page.parts import facts

#: Texts to be looked into one by one, and places that are listed.
MOST_TEXTS, LISTED = 8, 24
#: What a place has, by the name that the page calls it.
NUMBERS = {"delta": "delta_loss", "low": "low", "high": "high", "kl": "kl", "error": "std_error"}
NUMBERS |= {f"placebo_{short}": f"placebo_{name}" for short, name in NUMBERS.items()}
MEASURES = {"delta": "difference in loss (nats per token)", "kl": "KL from the unedited run (nats)"}


def swept(frame: DataFrame, about: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what a page shows of a sweep.

    Args:
        frame: rows of :attr:`SweepReport.frame`.
        about: how it was made: `model`, `texts`, `interval`, `arguments` (`edit`, `over`), ...
    """
    texts, arguments = about.get("texts", []), about["arguments"]
    labels = ["all", *(text["label"] for text in texts[:MOST_TEXTS])] if len(texts) > 1 else ["all"]
    whole = frame[frame["text"] == "all"]
    axes = {"heads": ["layer", "head"], "layers": ["layer"], "positions": ["position"]}[arguments["over"]]
    rows, columns = (sorted(whole[axis].tolist()) for axis in (axes[0], axes[-1]))
    rows, columns = list(dict.fromkeys(rows)), list(dict.fromkeys(columns)) if len(axes) > 1 else [0]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "sweep",
        "model": visible(str(about.get("model", "a model"))),
        "n_texts": len(texts),
        "n_tokens": sum(text["n_tokens"] for text in texts),
        "edit": visible(arguments["edit"]),
        "over": arguments["over"],
        "sentences": _sentences(whole, arguments),
        "notes": [visible(note) for note in about.get("notes", [])],
        "interval": about.get("interval", ""),
        "rows": rows,
        "columns": columns,
        "measures": MEASURES,
        "placebo": bool(whole["placebo_delta_loss"].notna().any()),
        "scales": {short: scale(whole[name]) for short, name in NUMBERS.items() if short in MEASURES},
        "names": {label: "all texts (mean)" if label == "all" else visible(label) for label in labels},
        "cells": {label: _cells(frame[frame["text"] == label], axes, rows, columns) for label in labels},
        "top": _top(whole, axes),
        "tokens": [visible(token) for token in texts[0].get("tokens", [])[:MOST_TOKENS]] if len(texts) == 1 else [],
        "facts": [[name, visible(value)] for name, value in facts(about)],
    }


def _cells(of: DataFrame, axes: list[str], rows: list[int], columns: list[int]) -> dict[str, Any]:
    """Give every number as rows and columns; a number that no place has is None."""
    place = of[axes].astype(int).to_numpy()
    at = {row: i for i, row in enumerate(rows)}, {column: i for i, column in enumerate(columns)}
    found: dict[str, Any] = {}
    for short, name in NUMBERS.items():
        values = of[name].to_numpy(float)
        table = np.full((len(rows), len(columns)), np.nan)
        for where, value in zip(place.tolist(), values.tolist(), strict=True):
            table[at[0][where[0]], at[1][where[1]] if len(where) > 1 else 0] = value
        found[short] = [floats(row) for row in table] if np.isfinite(table).any() else None
    return found


def _top(whole: DataFrame, axes: list[str]) -> list[dict[str, Any]]:
    """Give the places that cost most."""
    found = []
    for row in whole.nlargest(LISTED, "delta_loss").to_dict("records"):
        place = {"row": int(row[axes[0]]), "column": int(row[axes[-1]]) if len(axes) > 1 else 0}
        found.append(place | {short: floats([row[name]])[0] for short, name in NUMBERS.items()})
    return found


def _sentences(whole: DataFrame, arguments: Mapping[str, Any]) -> list[str]:
    """Say where the edit costs most, how many places it takes to make half of all that they cost, and the placebo's cost."""
    if not whole["delta_loss"].notna().any():
        return []
    over, one = arguments["over"], arguments["over"].removesuffix("s")
    worst = whole.nlargest(1, "delta_loss").iloc[0]
    where = ", ".join(f"{axis} {int(worst[axis])}" for axis in ("layer", "head", "position") if notna(worst[axis]))
    edit = visible(arguments["edit"])
    said = [f"{edit}, one {one} at a time, costs most at {where}: {worst['delta_loss']:+.3f} nats per token."]
    costs = np.sort(whole["delta_loss"].clip(lower=0).to_numpy(float))[::-1]
    if len(costs) > 4 and costs.sum() > 0:
        half = int(np.searchsorted(costs.cumsum(), costs.sum() / 2)) + 1
        said.append(f"Half of all that the {len(costs)} {over} cost one by one is the cost of {half} of them.")
    theirs = whole["placebo_delta_loss"].dropna()
    if len(theirs):
        said.append(
            f"The edit costs {whole['delta_loss'].mean():+.4f} in the mean, its placebo {theirs.mean():+.4f} "
            f"(at most {theirs.max():+.3f})."
        )
    return said
