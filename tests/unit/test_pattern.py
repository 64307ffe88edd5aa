"""Attention that somebody has: the numbers of `measure`, of its default metrics, in every form that it comes in."""

import numpy as np
import pandas as pd
import pytest
import torch

import sinkscope as ss
from sinkscope import SinkscopeError
from tests.conftest import TEXTS, attempt, play
from tests.unit.test_where import random_patterns

COLUMNS = ["text", "metric", "layer", "head", "key", "value", "null", "tokens"]


def same(frame, report):
    ours = report.frame[report.frame["text"] != "all"]
    axes = ["text", "metric", "layer", "head", "key"]
    both = frame.merge(ours, on=axes, how="outer", suffixes=("", "_measured"), indicator=True)
    assert set(both["_merge"]) == {"both"}
    for column in ("value", "null", "tokens"):
        assert both[column].to_numpy(float) == pytest.approx(
            both[f"{column}_measured"].to_numpy(float), abs=1e-6, nan_ok=True
        )


@pytest.mark.parametrize("causal", [True, False])
def test_the_numbers_are_those_of_measure(causal):
    patterns = random_patterns(9, 13) if causal else [np.random.default_rng(3).dirichlet(np.ones(7), (2, 3, 7))]
    report = play(patterns, causal=causal, key=[0, 2])
    longest = max(p.shape[-1] for p in patterns)
    padded = [np.pad(p, [(0, 0)] * 2 + [(0, longest - p.shape[-1])] * 2, constant_values=0.5) for p in patterns]
    layers = list(np.stack(padded, axis=1))  # [layer][text, head, query, key]
    frame = ss.metrics.of_pattern(layers, key=[0, 2], lengths=[p.shape[-1] for p in patterns], causal=causal)
    assert list(frame.columns) == COLUMNS
    same(frame, report)


def test_what_hugging_face_gives(llama):
    """`output_attentions=True` on texts padded on the left, against `measure` on each."""
    encoded = llama.tokenizer(list(TEXTS.values()), return_tensors="pt", padding=True, padding_side="left")
    with torch.no_grad():
        attentions = ss.testing.tiny_hf_model("llama")(**encoded, output_attentions=True).attentions
    metrics = ["sink_mass", "sink_rate", "row_entropy"]
    frame = ss.metrics.of_pattern(attentions, metrics, attention_mask=encoded["attention_mask"])
    same(frame, ss.measure(llama, list(TEXTS.values()), metrics))


def test_every_form_of_a_layer_gives_the_same_frame():
    (pattern,) = random_patterns(300)
    one = torch.tensor(pattern[:, None])
    frames = [ss.metrics.of_pattern(form, ["sink_mass", "effective_keys"]) for form in (one, one.numpy(), tuple(one), [*one])]
    for other in frames[1:]:
        pd.testing.assert_frame_equal(frames[0], other)
    skipped = ss.metrics.of_pattern([None, one[0]], ["sink_mass"])
    assert skipped["layer"].unique().tolist() == [1]
    assert ss.metrics.of_pattern(one[0], ["query_profile"])["query"].nunique() == 300


def test_windows_are_respected():
    (pattern,) = random_patterns(12)
    frame = ss.metrics.of_pattern([*pattern[:, None]], ["visible_sink_mass"], windows={1: 4})
    means = frame.set_index(["layer", "head"])["value"]
    for layer, last in ((0, 12), (1, 4)):
        assert means[layer].to_numpy() == pytest.approx(pattern[layer, :, :last, 0].mean(-1))


def test_what_is_no_attention_is_refused():
    (pattern,) = random_patterns(6)
    good = torch.tensor(pattern)[:1]
    words = {
        "'value_drain' needs 'value'": lambda: ss.metrics.of_pattern(good, ["value_drain"]),
        "'nop_rate' needs 'value'": lambda: ss.metrics.of_pattern(good, ["nop_rate"]),
        "about how texts differ": lambda: ss.metrics.of_pattern(good, ["consistency"]),
        "after the softmax": lambda: ss.metrics.of_pattern(good * 3),
        "no shares": lambda: ss.metrics.of_pattern(good - 0.1),
        "NaN": lambda: ss.metrics.of_pattern(good * torch.nan),
        "causal=False": lambda: ss.metrics.of_pattern(good.flip(-1)),
        "of one text, pattern[None]": lambda: ss.metrics.of_pattern(good[0]),
        "as many queries as keys": lambda: ss.metrics.of_pattern(good[:, :, -1:]),
        "not both": lambda: ss.metrics.of_pattern(good, lengths=[6], attention_mask=torch.ones(1, 6)),
        "has 6 positions": lambda: ss.metrics.of_pattern(good, lengths=[7]),
        "2 to 6 tokens": lambda: ss.metrics.of_pattern(good, lengths=[1]),
        "the same texts": lambda: ss.metrics.of_pattern([good, good[:, :, :5, :5]]),
        "positions and no tokens": lambda: ss.metrics.of_pattern(good, key="."),
        "no pattern was given": lambda: ss.metrics.of_pattern(()),
        "is str": lambda: ss.metrics.of_pattern("attention"),
        "lies outside": lambda: ss.metrics.of_pattern(good, key=6),
    }
    for expected, call in words.items():
        found = attempt(call)
        assert isinstance(found, SinkscopeError), expected
        assert expected in str(found)
