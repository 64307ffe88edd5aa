"""The study `necessity`: its task against a loop, models whose weights are set by hand, training, and words that follow."""

import pytest
import torch
from torch import Generator

import sinkscope as ss
from sinkscope import studies
from sinkscope.studies import trigger as study
from sinkscope.studies.kinds import ATTENTIONS
from sinkscope.studies.report import Estimate


def test_the_task_is_a_mean_at_the_trigger():
    x, wanted, trigger = study.draw(Generator().manual_seed(0), 200)
    assert (trigger.sum(1) == 1).all()
    assert set(trigger.nonzero()[:, 1].tolist()) == set(range(2, study.LENGTH))
    for row, at in trigger.nonzero().tolist()[:20]:
        torch.testing.assert_close(wanted[row, at], sum(x[row, i] for i in range(1, at + 1)) / at)
        assert (wanted[row, torch.arange(study.LENGTH) != at] == 0).all()
        assert x[row, 0].tolist() == [1.0] + [0.0] * (study.WIDTH - 1)
        assert [int(v) for v in x[row, :, 1]] == [int(i == at) for i in range(study.LENGTH)]
        assert [int(v) for v in x[row, :, -1]] == [int(i not in (0, at)) for i in range(study.LENGTH)]


def planted(kind, strength=40.0):
    """One head that does the task: at the trigger all but the first token, elsewhere the first token (whose value is 0)."""
    model = study.Model(kind, 1)
    q, k, v = torch.zeros(3, study.WIDTH, study.WIDTH)
    v += torch.eye(study.WIDTH)
    v[0, 0] = 0.0
    q[0, 1], k[0, 1], k[0, -1] = 4.0, 1.0, 1.0  # the score is divided by 4
    if kind != "relu":
        k[0] *= strength
        q[1, -1], k[1, 0] = 4.0, strength
    with torch.no_grad():
        model.layers[0].qkv.weight.copy_(torch.cat([q, k, v]))
        model.layers[0].out.weight.copy_(torch.eye(study.WIDTH))
        x, wanted, trigger = study.draw(Generator().manual_seed(1), 300)
        return study.look(*model(x), wanted, trigger)


def test_softmax_does_it_with_a_sink_and_relu_without():
    """Right for the right reason: both have no error at all, and differ in what they pay the first token."""
    for kind, paid in (("softmax", 1.0), ("relu", 0.0)):
        got = planted(kind)
        assert got["unexplained"] < 1e-9
        assert got["largest_error"] < 1e-5
        assert got["first_token_other"] == pytest.approx(paid, abs=1e-6)
        assert got["first_token_trigger"] == pytest.approx(0.0, abs=1e-6)
        assert got["row_sum"] == pytest.approx(paid, abs=1e-6)
    assert planted("softmax", strength=0.0)["unexplained"] > 0.5  # a model that attends evenly is no solution


def test_training_finds_the_sink_and_relu_needs_none():
    for kind, paid in (("softmax", 1.0), ("relu", 0.0)):
        got = study.train(kind, 1, steps=250, seeds=2)
        assert set(got) == set(study.QUANTITIES)
        assert got["first_token_other"] == pytest.approx([paid, paid], abs=0.1)
        assert max(got["unexplained"]) < 0.5


def test_what_is_reported(monkeypatch):
    """A case per kind and size, its numbers those of training, beside uniform attention and the theorem."""
    given = {name: [0.1 * i, 0.1 * i + 0.02] for i, name in enumerate(study.QUANTITIES)}
    monkeypatch.setattr(study, "train", lambda kind, size, **how: given)
    report = studies.necessity(steps=3, seeds=2, sizes=[1, 2])
    assert list(dict.fromkeys(report.ours["case"])) == [f"{kind}, {n}x{n}" for n in (1, 2) for kind in ATTENTIONS]
    for name, values in given.items():
        assert report.estimate("sigmoid, 2x2", name).value == pytest.approx(sum(values) / 2)
    assert report.estimate("softmax, 1x1", "first_token_other").null == pytest.approx(sum(1 / i for i in range(2, 17)) / 15)
    assert report.table[report.table["model"] == "theorem"]["value"].tolist() == [1.0, 0.0]
    ax = report.pictures["first-token"]()
    assert [round(float(x), 3) for x in ax.containers[0].lines[0].get_ydata()] == [0.31] * len(ATTENTIONS)
    with pytest.raises(ss.SinkscopeError, match="seeds=1"):
        studies.necessity(seeds=1)


def values(softmax, relu, left=(0.001, 0.0, 0.01)):
    rows = {}
    for kind in ATTENTIONS:
        paid = {"softmax": softmax, "relu": relu}.get(kind, (0.3, 0.2, 0.4))
        rows[f"{kind}, 1x1", "first_token_other"] = Estimate(*paid, null=0.16)
        rows[f"{kind}, 1x1", "first_token_least"] = Estimate(*paid, null=0.16)
        rows[f"{kind}, 1x1", "unexplained"] = Estimate(*left)
    return rows


def test_words_follow_the_numbers():
    sink, none = (0.99, 0.98, 1.0), (0.0, 0.0, 0.01)
    verdict, said = study._say(values(sink, none), "of", [1])
    assert verdict.startswith("A sink: softmax; no sink: relu; in between: learned sink")
    assert "as the theorem has it" in said
    assert "may grow all the same" not in said
    for softmax, relu in ((none, sink), (sink, sink), ((0.6, 0.3, 0.8), none)):
        verdict, said = study._say(values(softmax, relu), "of", [1])
        assert "is not borne out" in said
        assert ("rows of relu need not" in said) == (relu == sink)
    verdict, said = study._say(values(sink, none, left=(0.04, 0.01, 0.2)), "of", [1])  # not shown to be learned
    assert verdict == f"Not learned: {', '.join(ATTENTIONS)}."
    assert "is not borne out" in said
