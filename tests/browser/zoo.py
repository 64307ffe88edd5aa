"""Reports of every kind that a page must bear, made of arithmetic: no model runs for them."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from sinkscope.interventions import SinkWindow, Window
from sinkscope.reports import page
from sinkscope.reports.sweep import COLUMNS, PLACE
from tests.synthetic import HOSTILE, report, words

RIGHT_TO_LEFT = ["<s>", "שלום", " עולם", "مرحبا", " بالعالم", " left", " وِ", "‏", "👩‍👩‍👧", "e\u0301\u0301\u0301", *HOSTILE]
RIGHT_TO_LEFT.remove("\ud800")  # no tokenizer gives half a character, and no table holds it


def patterns(layers, heads, tokens, causal=True, sink=0.7):
    """Every head pays a share of its own to key 0 and the rest to the neighbours; rows sum to 1."""
    count = len(tokens)
    query, key = np.tril_indices(count) if causal else (axis.ravel() for axis in np.indices((count, count)))
    near = np.exp(-np.abs(query - key) / 3.0)
    rest = near / np.bincount(query, near)[query]
    strength = np.linspace(0.05, sink, layers * heads)[:, None]
    values = (1 - strength) * rest + strength * (key == 0)
    head, pair = (axis.ravel() for axis in np.indices(values.shape))
    table = {"layer": head // heads, "head": head % heads, "query": query[pair], "key": key[pair]}
    words = pd.Categorical.from_codes(
        pd.factorize(np.array(tokens, dtype=object))[0][query[pair]], list(dict.fromkeys(tokens))
    )
    return pd.DataFrame(table | {"query_token": words, "value": values.ravel()})


def measured(texts, layers=4, heads=3, attention=None, short=None, **how):
    frame, summary, meta = report(texts, layers, heads, **how)
    return frame, summary, meta, attention, short


def one():
    return page.measured(*measured({"a": words(6)}, 1, 1, short=patterns(1, 1, words(6))))


def plain():
    return page.measured(*measured({"essay": words(80), "note": words(20)}, short=patterns(4, 3, words(12))))


def largest():
    made = measured({"book": words(8192)}, 48, 64, metrics=["sink_mass"], short=patterns(48, 64, words(26)))
    return page.measured(*made)


def encoder():
    tokens = ["[CLS]", *words(20)[1:], "[SEP]"]
    frame, summary, meta, *_ = measured({"a": tokens})
    meta |= {"causal": False, "arguments": {"key": ["[SEP]"]}}
    return page.measured(frame, summary, meta, None, patterns(4, 3, tokens, causal=False))


PATCHES = ["[CLS]", "[REG1]", *(f"patch {row},{column}" for row in range(12) for column in range(16))]


def images():
    frame, summary, meta, *_ = measured({"image 0": PATCHES, "image 1": PATCHES})
    meta |= {"causal": False, "reads": "pixel_values"}
    return page.measured(frame, summary, meta, None, patterns(4, 3, PATCHES[:30], causal=False))


def keys():
    frame, summary, meta, _, short = measured({"a": words(30)}, short=patterns(4, 3, words(10)))
    for table in (frame, summary):
        table["metric"] = table["metric"].replace("sink_mass", "sink_mass[key=0]")
    second = frame[frame["metric"] == "sink_mass[key=0]"].assign(metric="sink_mass[key=3]", key=3)
    second["value"] /= 2
    meta["arguments"]["key"] = [0, 3]
    return page.measured(pd.concat([frame, second], ignore_index=True), summary, meta, None, short)


def corpus():
    frame, summary, meta, *_ = measured({"all": words(300)})
    meta["texts"] = [{"label": f"text {i}", "n_tokens": 300} for i in range(1000)]
    return page.measured(frame, summary, meta)


def hostile():
    label = "</script><script>alert(3)</script><b>"
    made = measured({label: RIGHT_TO_LEFT, "שלום": words(9)}, model="<i>toy</i>" * 9, short=patterns(4, 3, RIGHT_TO_LEFT))
    return page.measured(*made)


def unknown():
    frame, summary, meta, _, short = measured({"a": words(30), "b": words(8)}, short=patterns(4, 3, words(10)))
    frame.loc[frame.index % 3 == 0, "value"] = np.nan
    frame.loc[frame["layer"] == 2, "value"] = np.nan
    summary["value"] = np.nan
    short.loc[short.index % 2 == 0, "value"] = np.nan
    return page.measured(frame, summary, meta, None, short)


def evaluated(scale=1.0, length=400):
    """Twelve edits: windows, windows with sinks and their placebos, at four sizes."""
    sizes = (8, 16, 32, 64)
    sunk = [SinkWindow(size, sinks=1) for size in sizes]
    edits = [*map(Window, sizes), *sunk, *(edit.placebo() for edit in sunk)]
    names = ["none", *map(str, edits)]
    kinds = [(0.0, (1,)), (1.0, sizes), (0.0, sizes), (0.9, sizes)]  # of `none`, windows, those with sinks, placebos
    cost = scale * np.array([a and a / np.log(n) for a, of in kinds for n in of])
    noise = np.random.default_rng(0).normal(size=(len(names), length - 1))
    losses = 3 + cost[:, None] * (1 + np.linspace(0, 1, length - 1)) + 0.3 * noise
    delta = (losses - losses[0]).mean(1)
    error = 0.1 * (np.arange(len(names)) > 0)
    summary = pd.DataFrame(
        {"intervention": names, "tokens": length - 1, "loss": losses.mean(1), "perplexity": np.exp(losses.mean(1))}
    )
    summary = summary.assign(
        delta_loss=delta, low=delta - error, high=delta + error, kl=np.abs(delta) / 2, top1_agreement=0.8
    )
    summary = summary.assign(sink_mass=0.5 - 0.03 * np.arange(len(names)), sink_position=0, sink_token="<script>")
    at = range(1, length)
    curves = [
        pd.DataFrame({"text": "essay", "intervention": n, "position": at, "loss": y})
        for n, y in zip(names, losses, strict=True)
    ]
    texts = [{"label": "essay", "n_tokens": length, "tokens": words(length)}]
    about = {"model": "toy", "texts": texts, "interval": "95%, Student's t, paired", "dtype": "float32"}
    about["placebos"] = {str(edit.placebo()): str(edit) for edit in sunk}
    return page.evaluated(summary, pd.concat(curves, ignore_index=True), about)


def beside():
    """Four windows, as if two had placebos without rows of their own."""
    data = evaluated()
    data["edits"] = [edit for edit in data["edits"] if "sink" not in edit["name"]]
    names = [edit["name"] for edit in data["edits"]]
    data["families"] = [family for family in data["families"] if set(family["edits"]) <= set(names)]
    for edit in data["edits"][1:3]:
        edit["placebos"] = {"n": 5, "delta": 0.125, "std": 0.02, "p": 0.03}
    return data


def swept(over="heads", layers=6, heads=8, texts=3, tokens=(), placebo=True):
    """A few places cost much, most nothing, some help; nobody knows of one."""
    tokens = list(tokens) or words(40)
    places = {
        "heads": [(layer, head, None) for layer in range(layers) for head in range(heads)],
        "layers": [(layer, None, None) for layer in range(layers)],
        "positions": [(None, None, position) for position in range(len(tokens) - 1)],
    }[over]
    labels, noise = [f"text {i}" for i in range(texts)], np.random.default_rng(1)
    rows = []
    for text in ("all", *labels):
        for place in places:
            cost = 0.02 * noise.normal() + (2.0 if place in (places[0], places[-1]) else 0.0)
            numbers = (cost, cost - 0.02, cost + 0.02, abs(cost) / 2, 0.01)
            other = (0.01 * cost, -0.01, 0.02, 0.001, 0.01) if placebo else (np.nan,) * 5
            rows.append(("toy", text, *place, "zero_attention(keys=[0])", 39, 3.0 + cost, *numbers, 0.9, *other))
    frame = pd.DataFrame(rows, columns=COLUMNS).astype(dict.fromkeys(PLACE, "Int64"))
    frame.loc[frame.index % 17 == 5, "delta_loss"] = np.nan
    about = {
        "model": "toy <b>",
        "interval": "95%, Student's t, paired, across texts",
        "notes": ["a note <i>"],
        "dtype": "float32",
    }
    about["texts"] = [{"label": label, "n_tokens": len(tokens), "tokens": tokens} for label in labels]
    about["arguments"] = {"edit": "zero_attention(keys=[0])", "over": over, "placebo": int(placebo)}
    return page.swept(frame, about)


def compared():
    other = page.measured(*measured({"essay": words(80)}, model="other"))
    return page.compared({"first": plain(), "second with a long name": other, "<b>": keys(), "deep": one()})


ZOO = {
    f.__name__: f for f in (one, plain, largest, encoder, images, keys, corpus, hostile, unknown, evaluated, beside, compared)
}
ZOO["swept heads"] = lambda: swept(layers=48, heads=64)
ZOO["swept layers"] = lambda: swept("layers", texts=1)
ZOO["swept positions"] = lambda: swept("positions", texts=1, tokens=RIGHT_TO_LEFT * 3, placebo=False)
ZOO["one head swept"] = lambda: swept(layers=1, heads=1, texts=1, placebo=False)
ZOO["compared sweeps"] = lambda: page.compared({"first": swept(), "second": swept(placebo=False), "deep": swept(layers=9)})
ZOO["compared edits"] = lambda: page.compared({"first": evaluated(), "second": evaluated(0.5)})


@cache
def page_of(name):
    """Render an animal of the zoo, once; `snippet` is one in somebody else's page, twice."""
    if name == "snippet":
        twice = 2 * page.snippet(plain())
        style = "h1 { color: purple; font-size: 60px } svg, span { display: none !important } * { font-size: 30px }"
        head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{style}</style>'
        return f'<!doctype html><html lang="en">{head}<title>A notebook</title><main><h1>A notebook</h1>{twice}</main></html>'
    return page.render(ZOO[name]())
