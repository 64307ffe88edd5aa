"""What the first screen says: how large the sink is, against chance, and where in depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pandas import DataFrame

from sinkscope.reports.drawing import labelled, visible
from sinkscope.reports.page.kinds import base, quiet
from sinkscope.reports.words import key_name, number, percent, said

#: The metric that a reader should see first, if it was measured.
FIRST = "sink_mass"


def glance(rows: DataFrame, inside: Mapping[str, Any], keys: Sequence[int | str], about: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the picture's metric and three numbers.

    Args:
        rows: the model-level numbers over all texts.
        inside: `layers`, `cells`, `texts` of the page's data.
        keys: the sink positions that were looked at.
        about: how it was measured.

    Returns:
        `metric`: what is drawn by layer, or None; `text`: of which text, or `all`; `numbers`: each with `what`, `value` and
        `chance`, as words.
    """
    cells = inside["cells"]
    metric = next((name for name in cells if base(name) == FIRST), next(iter(cells), None))
    text = None if metric is None else "all" if "all" in cells[metric] else next(iter(cells[metric]), None)
    given = zip(rows["metric"], rows["value"], rows["null"], strict=True)
    known = {name: (value, null) for name, value, null in given if not math.isnan(value)}
    numbers = []
    if metric is not None and base(metric) == FIRST and metric in known:
        where = visible(key_name(list(keys), about))
        numbers.append(_number(said(f"of an average token's attention goes to {where}", about), *known[metric]))
        rate = next((name for name in known if base(name) == "sink_rate"), None)
        if rate is not None:
            bar = rate.partition("@")[2].partition("[")[0]
            numbers.append(_number(f"of the heads give {where} more than {bar} of it", *known[rate]))
        deepest = _deepest(cells[metric].get(text), inside["layers"])
        if deepest is not None:
            layer, value, null = deepest
            numbers.append(_number(f"where it is strongest: layer {layer}, of {len(inside['layers'])}", value, null))
    taken = {metric} if numbers else set()
    for name, (value, null) in known.items():
        if len(numbers) < 3 and not quiet(value, null) and name not in taken and base(name) not in (FIRST, "sink_rate"):
            share = labelled(name).endswith(("share of attention)", "share of heads)"))
            numbers.append(_number(visible(labelled(name)), value, null, share))
    return {"metric": metric, "text": text, "numbers": numbers}


def _number(what: str, value: float, null: float, share: bool = True) -> dict[str, Any]:
    write = percent if share else number
    return {"what": what, "value": write(value), "chance": None if math.isnan(null) else write(null)}


def _deepest(grids: Mapping[str, Any] | None, layers: Sequence[int]) -> tuple[int, float, float] | None:
    """Give the layer whose heads' mean is largest, that mean, and its null."""
    if grids is None or len(layers) < 2 or not isinstance(grids["value"], list):
        return None
    value, null = (np.array(grids[of], dtype=float) for of in ("value", "null"))
    means = [np.nanmean(row) if np.isfinite(row).any() else -math.inf for row in value]
    at = int(np.argmax(means))
    chance = float(null if null.ndim == 0 else np.nanmean(null[at]))
    return (layers[at], float(means[at]), chance) if math.isfinite(means[at]) else None
