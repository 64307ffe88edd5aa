"""The toy of the study `emergence`: its chain, its attentions against slow formulas, its numbers, and its manners."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Generator

from sinkscope.errors import SinkscopeError
from sinkscope.studies.bigrams import BigramBackcopy
from sinkscope.studies.kinds import ATTENTIONS, weigh
from sinkscope.studies.toy import Run, Toy, look, losses, side_by_side, train

TASK = BigramBackcopy(vocabulary=8, triggers=2, length=16)
SMALL = {"steps": 6, "every": 3, "layers": 2, "width": 8, "heads": 2, "batch": 4, "held_out": 5}


def draw(n, seed=0, task=TASK):
    return task.batch(Generator().manual_seed(seed), n)


def toy(attention, layers=2, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Toy(TASK, attention, layers=layers, width=8, heads=2, **{"logit": 0.0, **options})


# --- the chain -------------------------------------------------------------------------------------------------


def test_after_a_trigger_comes_the_token_before_it():
    ids = draw(500)
    trigger = TASK.is_trigger(ids)
    sequence, at = trigger[:, :-1].nonzero(as_tuple=True)
    assert len(at) > 500
    assert at.min() >= 2
    assert torch.equal(ids[sequence, at + 1], ids[sequence, at - 1])
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()


def test_start_and_vocabulary():
    ids = draw(500)
    assert (ids[:, 0] == 0).all()
    assert (ids[:, 1] > TASK.triggers).all()
    assert set(ids[:, 1:].unique().tolist()) == set(range(1, TASK.vocabulary + 1))


def test_otherwise_bigrams_are_as_frequent_as_the_table_says():
    ids = draw(20_000)
    now, after = ids[:, :-1].flatten(), ids[:, 1:].flatten()
    for token in (0, *range(TASK.triggers + 1, TASK.vocabulary + 1)):
        seen = torch.bincount(after[now == token], minlength=TASK.vocabulary + 1).double()
        share, expected = seen / seen.sum(), TASK.table[token].double()
        assert float(expected.sum()) == pytest.approx(1.0, abs=1e-6)
        error = (expected * (1 - expected) / seen.sum()).sqrt()
        assert ((share - expected).abs() <= 5 * error + 1e-4).all()


def test_the_best_loss_is_the_entropy_of_the_rows_and_nothing_after_triggers():
    ids = draw(20_000)
    surprise, now = TASK.surprise(ids), ids[:, :-1]
    assert (surprise[TASK.is_trigger(now)] == 0).all()
    for token in (0, *range(TASK.triggers + 1, TASK.vocabulary + 1)):
        row = TASK.table[token].double().numpy()
        entropy = -sum(p * math.log(p) for p in row if p > 0)
        assert float(surprise[now == token].double().mean()) == pytest.approx(entropy, abs=0.03)


def test_one_seed_one_chain():
    assert torch.equal(draw(4), draw(4, task=BigramBackcopy(vocabulary=8, triggers=2, length=16)))
    assert not torch.equal(draw(4), draw(4, seed=1))
    assert not torch.equal(TASK.table, BigramBackcopy(vocabulary=8, triggers=2, length=16, seed=1).table)


@pytest.mark.parametrize("bad", [{"triggers": 0}, {"triggers": 32}, {"length": 2}])
def test_tasks_that_are_none(bad):
    with pytest.raises(SinkscopeError, match=next(iter(bad))):
        BigramBackcopy(**bad)


# --- the attentions --------------------------------------------------------------------------------------------


#: Kinds whose weights are those of another.
SAME = {"learned sink": "softmax", "key bias": "softmax", "off by one": "softmax", "output gate": "softmax"}


def slow_weights(scores, attention, logit):
    """One query at a time, by the book."""
    length = len(scores)
    weights = np.zeros((length, length))
    for i in range(length):
        for k in range(i + 1):
            rest = math.exp(logit) if attention in ("learned sink", "key bias", "off by one") else 0.0
            weights[i, k] = {
                "softmax": lambda s, i=i, rest=rest: math.exp(s) / (sum(math.exp(x) for x in scores[i, : i + 1]) + rest),
                "sigmoid": lambda s: 1 / (1 + math.exp(-s)),
                "relu": lambda s: max(s, 0.0) / length,
            }[SAME.get(attention, attention)](scores[i, k])
    return weights


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attentions_are_their_formulas(attention):
    scores = 2 * torch.randn(3, 2, 7, 7, generator=Generator().manual_seed(0))
    logits = torch.zeros(2) if attention == "off by one" else torch.tensor([0.5, -1.0])
    got = weigh(scores, attention, None if attention == "off by one" else logits[:, None, None])
    for n in range(3):
        for head in range(2):
            expected = slow_weights(scores[n, head].double().numpy(), attention, float(logits[head]))
            np.testing.assert_allclose(got[n, head].numpy(), expected, atol=1e-6)


def test_sums_of_rows():
    scores = torch.randn(4, 9, 9, generator=Generator().manual_seed(0))
    assert torch.allclose(weigh(scores, "softmax").sum(-1), torch.ones(4, 9))
    assert (weigh(scores, "learned sink").sum(-1) < 1).all()
    assert (weigh(torch.zeros(9, 9), "sigmoid").sum(-1) == torch.arange(1, 10) / 2).all()
    assert (weigh(-scores.abs(), "relu") == 0).all()


@pytest.mark.parametrize("use", [lambda: weigh(torch.zeros(2, 2), "sotfmax"), lambda: train(TASK, "sotfmax")])
def test_unknown_attention(use):
    with pytest.raises(SinkscopeError, match="did you mean 'softmax'"):
        use()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_later_tokens_change_no_earlier_logits(attention):
    model, ids = toy(attention), draw(3)
    changed = ids.clone()
    changed[:, 9] = changed[:, 9] % TASK.vocabulary + 1
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


# --- the numbers -----------------------------------------------------------------------------------------------


class Played(Toy):
    """A model of one layer and two heads that plays back what it is given."""

    def __init__(self, attention, run):
        torch.nn.Module.__init__(self)
        self.attention, self.run = attention, run

    def forward(self, ids):
        return self.run


def played(attention, weights, ids, values=None, residual=None, logits=None):
    n, length = ids.shape
    values = torch.ones(n, 2, length, 4) if values is None else values
    residual = torch.ones(n, length, 8) if residual is None else residual
    logits = torch.zeros(n, length, TASK.vocabulary + 1) if logits is None else logits
    return look(Played(attention, Run(logits, [weights], [values], [residual])), TASK, ids)


def test_uniform_attention_gives_the_null():
    ids = draw(6)
    length = ids.shape[1]
    uniform = weigh(torch.zeros(6, 2, length, length), "softmax")
    got = played("softmax", uniform, ids)
    assert got["null"] == pytest.approx((sum(1 / i for i in range(1, length + 1)) - 1) / (length - 1))
    for name in ("sink_mass", "sink_mass_mean", "sink_weight"):
        assert got[name] == pytest.approx(got["null"])
    assert got["loss"] == pytest.approx(math.log(TASK.vocabulary + 1))
    assert got["excess_loss"] == pytest.approx(got["loss"] - got["best_loss"])
    assert (got["row_sum"], got["value_drain"], got["residual_peak"], got["residual_norm"]) == pytest.approx((1, 1, 1, 1))


def test_a_dormant_head_that_wakes_at_triggers():
    ids = draw(6)
    n, length = ids.shape
    weights = torch.zeros(n, 2, length, length)
    weights[:, 0] = torch.eye(length)
    trigger = TASK.is_trigger(ids)
    for s in range(n):
        for i in range(length):
            weights[s, 1, i, max(i - 1, 0) if trigger[s, i] else 0] = 1.0
    values, residual = torch.ones(n, 2, length, 4), torch.ones(n, length, 8)
    values[:, 1, 0] = 0.25
    residual[:, 0, 3] = -50.0
    copied = torch.zeros(n, length, TASK.vocabulary + 1)
    copied[:, 1:] = 50.0 * trigger[:, 1:, None] * torch.nn.functional.one_hot(ids[:, :-1], TASK.vocabulary + 1)
    got = played("softmax", weights, ids, values=values, residual=residual, logits=copied)
    per_sequence = (~trigger[:, 1:]).double().mean(1)
    assert (got["layer"], got["head"]) == (0, 1)
    assert got["sink_mass"] == pytest.approx(float(per_sequence.mean()))
    assert got["sink_mass_se"] == pytest.approx(float(per_sequence.std()) / math.sqrt(n))
    assert got["sink_mass_low"] < got["sink_mass"] < got["sink_mass_high"]
    assert (got["sink_mass_trigger"], got["sink_mass_other"]) == (0.0, 1.0)
    assert got["loss_trigger"] == pytest.approx(0.0, abs=1e-6)
    assert got["sink_mass_mean"] == pytest.approx(got["sink_mass"] / 2)
    assert (got["value_drain"], got["value_drain_min"]) == pytest.approx((0.25, 0.25))
    assert got["residual_peak"] == pytest.approx(50.0)
    assert got["residual_norm"] == pytest.approx(math.sqrt(2507 / 8))


@pytest.mark.parametrize("attention", ["sigmoid", "relu"])
def test_without_normalisation_the_share_of_a_row_counts_and_empty_rows_are_no_sink(attention):
    ids = draw(2)
    length = ids.shape[1]
    weights = torch.zeros(2, 2, length, length)
    weights[:, :, 1:9, 0] = 0.01
    weights[:, :, 1:9, 1] = 0.03
    got = played(attention, weights, ids)
    assert got["sink_mass"] == pytest.approx(0.25 * 8 / (length - 1))
    assert got["sink_weight"] == pytest.approx(0.01 * 8 / (length - 1))
    assert got["row_sum"] == pytest.approx(0.04 * 8 / (length - 1))


def test_what_the_learned_logit_takes_is_missing_from_the_row():
    ids = draw(2)
    row_sum = {logit: look(toy("learned sink", logit=logit), TASK, ids)["row_sum"] for logit in (-20.0, 20.0)}
    assert row_sum[-20.0] == pytest.approx(1.0, abs=1e-4)
    assert row_sum[20.0] == pytest.approx(0.0, abs=1e-4)


def test_what_a_kind_adds():
    """A bias of the keys is one more key, whose value is zero; a gate multiplies what heads give, number by number."""
    x = torch.randn(2, 6, 8, generator=Generator().manual_seed(1))
    plain, biased, gated = (toy(kind).layers[0].attend for kind in ("softmax", "key bias", "output gate"))
    with torch.no_grad():
        biased.key.copy_(torch.randn(2, 4, 1, generator=Generator().manual_seed(2)))
        gated.gate.copy_(torch.randn(8, 8, generator=Generator().manual_seed(3)))
        q, k, v = plain.qkv(x).view(2, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
        for n, head, i in ((0, 0, 0), (1, 1, 3), (0, 1, 5)):
            keys = torch.cat([biased.key[head].T, k[n, head, : i + 1]])
            row = (keys @ q[n, head, i] / 2).softmax(0)
            torch.testing.assert_close(biased(x)[1][n, head, i, : i + 1], row[1:])
        z = (plain(x)[1] @ v).transpose(1, 2).reshape(2, 6, 8)
        torch.testing.assert_close(gated(x)[0], plain.out(z * torch.sigmoid(x @ gated.gate)))


# --- training --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_history_is_tidy_and_the_same_each_time(attention):
    history = train(TASK, attention, seed=3, **SMALL)
    assert list(history["step"]) == [0, 3, 6]
    assert (history["attention"] == attention).all()
    assert (history["seed"] == 3).all()
    assert history.notna().all(axis=None)
    pd.testing.assert_frame_equal(history, train(TASK, attention, seed=3, **SMALL))
    assert not history["loss"].equals(train(TASK, attention, seed=4, **SMALL)["loss"])


def test_checkpoints_are_denser_early():
    history = train(TASK, **{**SMALL, "steps": 40, "every": 16})
    assert list(history["step"]) == [0, 4, 16, 32, 40]


def test_it_learns_with_whatever_the_caller_has_switched_off():
    options = {**SMALL, "steps": 60, "every": 60, "width": 32, "batch": 32, "rate": 1e-2, "warmup": 5}
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    plain = train(TASK, **options)
    with torch.no_grad():
        pd.testing.assert_frame_equal(plain, train(TASK, **options))
    with torch.inference_mode():
        pd.testing.assert_frame_equal(plain, train(BigramBackcopy(vocabulary=8, triggers=2, length=16), **options))
    with torch.device("meta"):
        pd.testing.assert_frame_equal(plain, train(BigramBackcopy(vocabulary=8, triggers=2, length=16), **options))
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    first, last = plain["excess_loss"].iloc[[0, -1]]
    assert last < first / 3


def test_side_by_side_is_as_one_after_the_other():
    def run(seed):
        if seed == 9:
            raise ValueError("no model")
        return train(TASK, seed=seed, **SMALL)

    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for history, seed in zip(side_by_side(run, range(6)), range(6), strict=True):
        pd.testing.assert_frame_equal(history, run(seed))
    with pytest.raises(ValueError, match="no model"):
        list(side_by_side(run, [0, 9, 1]))
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()


def test_attentions_start_from_the_same_weights():
    models = {}
    for attention in ATTENTIONS:
        models[attention] = {name: p for name, p in toy(attention).named_parameters() if not name.endswith("logit")}
    for name, parameter in models["softmax"].items():
        assert all(torch.equal(parameter, models[attention][name]) for attention in ATTENTIONS)


def test_losses_are_cross_entropies():
    ids, logits = draw(2), torch.randn(2, TASK.length, TASK.vocabulary + 1, generator=Generator().manual_seed(0))
    got = losses(logits, ids)
    for n in range(2):
        for i in range(TASK.length - 1):
            row = logits[n, i].double().numpy()
            assert float(got[n, i]) == pytest.approx(math.log(np.exp(row).sum()) - row[ids[n, i + 1]], rel=1e-4, abs=1e-6)


def test_heads_divide_the_width():
    with pytest.raises(SinkscopeError, match="width=8"):
        train(TASK, **{**SMALL, "heads": 3})
