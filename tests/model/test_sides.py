"""Encoder-decoders: each of their three attentions, against Hugging Face's own (eager, float32, another copy of the model)."""

import functools

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_hf_model, tiny_tokenizer
from tests.conftest import fingerprint, most_slow, table, total

SIDES = ["decoder", "encoder", "cross"]
RIGHT = ["t5", "marian", "bart", "pegasus", "m2m_100", "mt5", "mbart", "blenderbot", "switch", "t5gemma"]
METRICS = ["sink_mass", "row_entropy", "received_profile", "effective_keys", "last_row_share", "first_to_rest_ratio"]
KEY = 2


def ids(length, seed):
    """A text for a tiny model: pads' id (0) and EOS inside, where a batch has pads of id 0."""
    found = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    found[1:3] = [0, 2]
    return found


#: Sources and targets of different lengths, in an order of lengths that is not the same: all in one padded batch.
PAIRS = {f"text {i}": (ids(s, s), [1, *ids(t - 1, 9 * t)]) for i, (s, t) in enumerate([(21, 11), (9, 20), (14, 13), (5, 16)])}


@functools.cache
def expected(family, side, label, attention="eager"):
    """`output_attentions` of one pair alone, `[layer, head, query, key]` in float64."""
    network = tiny_hf_model(family)
    source, target = (torch.tensor([row]) for row in PAIRS[label])
    masks = {"attention_mask": torch.ones_like(source), "decoder_attention_mask": torch.ones_like(target)}
    with torch.no_grad():
        out = network(input_ids=source, decoder_input_ids=target, output_attentions=True, **masks)
    name = {"decoder": "decoder_attentions", "encoder": "encoder_attentions", "cross": "cross_attentions"}[side]
    return torch.cat(getattr(out, name)).double().numpy()


def entropy(rows):
    return -(rows * np.log(np.where(rows > 0, rows, 1))).sum(-1)


def right(report, family, side, key=0, pairs=PAIRS, tol=1e-5):
    """Compare every text with plain reductions of whole patterns, and with a null that is counted by hand."""
    for label in pairs:
        a = expected(family, side, label)
        queries, keys = a.shape[2:]
        sees = np.tri(queries, dtype=bool) if side == "decoder" else np.ones((queries, keys), dtype=bool)
        chance = sees / sees.sum(1, keepdims=True)
        for of, column in ((a, "value"), (chance[None, None], "null")):
            found = {name: table(report, name, label, column) for name in METRICS[:5]}
            same = functools.partial(np.testing.assert_allclose, rtol=0, atol=tol)
            same(found["sink_mass"], np.broadcast_to(of[..., key].mean(-1), a.shape[:2]), err_msg=f"{label} {column}")
            same(found["last_row_share"], np.broadcast_to(of[..., -1, key], a.shape[:2]))
            same(found["row_entropy"], np.broadcast_to(entropy(of).mean(-1), a.shape[:2]))
            same(found["received_profile"], np.broadcast_to(of.sum(2).mean(1) / sees.sum(0), (len(a), keys)))
            np.testing.assert_allclose(found["effective_keys"], np.broadcast_to(np.exp(entropy(of)).mean(-1), a.shape[:2]), rtol=tol)
        m = a[..., key].mean()
        assert abs(total(report, "first_to_rest_ratio", label) - m / (1 - m) * (keys - 1)) < 1e-3


def test_the_batch_is_padded_on_both_sides():
    tokens = ss.models.adapt_side(tiny_hf_model("t5"), "cross").tokenize(PAIRS)
    (batch,) = tokens.batches(8)
    assert [len(s) for s in batch.sequences] == [11, 13, 16, 20]
    assert batch.sources.lengths.tolist() == [21, 14, 5, 9]


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("family", most_slow(RIGHT, *RIGHT[:5]))
def test_every_side_is_hugging_faces(family, side):
    model = tiny_hf_model(family)
    before = fingerprint(model)
    report = ss.measure(model, PAIRS, METRICS, side=side)
    assert fingerprint(model) == before
    assert (report.about["engine"], report.about["side"]) == ("flash", side)
    assert f"({side})" in str(report)
    right(report, family, side)
