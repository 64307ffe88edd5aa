"""A report made of arithmetic: the frame, summary and meta of `measure`, with values known by formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

COLUMNS = ["model", "text", "metric", "layer", "head", "key", "value", "std_error", "null", "tokens"]
HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(2)>",
    "$\\frac{$",
    "a\u2028b",
    "\u202eevil",
    "\x00",
    "\n",
    "\ud800",
    "&amp;",
    "{{ 7*7 }}",
]


def mass(layer: Any, head: Any, text: int, layers: int = 4) -> Any:
    """The sink mass of a head: rises with the layer, differs by head and text."""
    return 0.1 + 0.7 * layer / layers + 0.02 * head + 0.01 * text


def profile(length: int, sink: float) -> np.ndarray:
    """A share `sink` on position 0, and the rest spread as uniform causal attention would."""
    null = uniform(length)
    rest = null.copy()
    rest[0] = 0.0
    rest *= (1 - sink) / rest.sum()
    rest[0] = sink
    return rest


def uniform(length: int) -> np.ndarray:
    """What every key receives from uniform causal attention: (H_T - H_k) / T."""
    return np.cumsum((1.0 / np.arange(1, length + 1))[::-1])[::-1] / length


def report(
    texts: Mapping[str, Sequence[str]],
    layers: int = 4,
    heads: int = 3,
    metrics: Sequence[str] = ("sink_mass", "row_entropy", "sink_rate@0.3"),
    model: str = "toy",
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Frame, summary and meta of a made-up run."""
    parts, totals = [], []
    layer, head = (axis.ravel() for axis in np.meshgrid(np.arange(layers), np.arange(heads), indexing="ij"))
    for metric in metrics:
        scale = {"row_entropy": 4.0}.get(metric, 1.0)
        values = {label: scale * mass(layer, head, i, layers) for i, label in enumerate(texts)}
        nulls = {label: scale * uniform(len(tokens))[0] for label, tokens in texts.items()}
        n = len(texts)
        spread = np.std(list(values.values()), axis=0, ddof=1) / n**0.5 if n > 1 else np.full(len(layer), np.nan)
        values["all"], nulls["all"] = (
            np.mean(list(values.values()), axis=0),
            float(np.mean(list(nulls.values()))),
        )
        for label, value in values.items():
            error = spread if label == "all" else np.nan
            rows = {"text": label, "metric": metric, "layer": layer, "head": head, "key": 0, "value": value}
            parts.append(pd.DataFrame(rows | {"std_error": error, "null": nulls[label]}))
            error = 0.02 if label == "all" and n > 1 else np.nan
            totals.append((label, metric, value.mean(), error, nulls[label]))
    for i, (label, tokens) in enumerate(texts.items()):
        for metric, factor in (("position_profile", 1.0), ("received_profile", 1.2)):
            for at in range(layers):
                value = factor * profile(len(tokens), float(mass(at, (heads - 1) / 2, i, layers)))
                rows = {"text": label, "metric": metric, "layer": at, "key": np.arange(len(tokens))}
                null = uniform(len(tokens))
                parts.append(pd.DataFrame(rows | {"value": value, "null": null, "tokens": len(tokens)}))
        rows = {
            "text": label,
            "metric": "sink_positions",
            "key": [0, len(tokens) - 1],
            "value": [0.75, 0.125],
        }
        parts.append(pd.DataFrame(rows | {"null": np.nan}))
        totals.append((label, "first_to_rest_ratio", 20.4, np.nan, 1.0))
    totals.append(("all", "first_to_rest_ratio", 20.4, np.nan, 1.0))
    frame = pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS).assign(model=model)
    for column in ("layer", "head", "key", "tokens"):
        frame[column] = frame[column].astype("Int64")
    summary = pd.DataFrame(totals, columns=["text", "metric", "value", "std_error", "null"])
    meta = {
        "model": model,
        "sinkscope": "0.1.0",
        "torch": "2.13.0",
        "engine": "hooks",
        "engine_why": "the only one there is",
        "dtype": "float32",
        "device": "cpu",
        "bos": "BOS was put first, as the model's tokenizer does.",
        "n_layers": layers,
        "n_heads": heads,
        "causal": True,
        "texts": [{"label": label, "n_tokens": len(t), "tokens": list(t)} for label, t in texts.items()],
        "sentences": {"sink_mass": "An average query pays 48% of its attention to the first token."},
        "arguments": {"key": [0, 1], "max_tokens": None},
        "created": "2026-01-02T03:04:05",
    }
    return frame, summary, meta


def words(count: int) -> list[str]:
    """As many tokens as asked for: a BOS and words with their spaces."""
    some = ["the", "sink", "takes", "attention", "that", "no", "other", "token", "wants", "and", "keeps", "it"]
    return ["<|im_start|>", *(" " + some[i % len(some)] for i in range(count - 1))]


def causal_attention(length: int, sink: float = 0.6) -> pd.DataFrame:
    """A tidy `query, key, value`: a share `sink` on key 0, the rest even over the keys that a query sees."""
    rows = [
        (i, k, (sink if i else 1.0) * (k == 0) + (1 - sink) * (k > 0) / max(i, 1))
        for i in range(length)
        for k in range(i + 1)
    ]
    return pd.DataFrame(rows, columns=["query", "key", "value"])
