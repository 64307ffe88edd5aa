"""A metric, an edit or a hook that was changed is not the one that a run began with; one that only moved is."""

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.models import adapt
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.resume import FOLDER
from sinkscope.testing import tiny_model


def made(source: str, name: str = "f"):
    """Give what a module of its own defines."""
    space = {"__name__": "mine", "torch": torch, "ss": ss, "np": np}
    exec(compile(source, "mine.py", "exec"), space)
    return space[name]


CHANGED = {
    "an operator": ("f = lambda x: x + 1", "f = lambda x: x - 1"),
    "a constant": ("f = lambda x: x + 1", "f = lambda x: x + 2"),
    "the method called": ("f = lambda x: x.exp()", "f = lambda x: x.log()"),
    "a default": ("def f(x, by=1): return x + by", "def f(x, by=2): return x + by"),
    "a keyword's default": ("def f(x, *, by=1): return x + by", "def f(x, *, by=2): return x + by"),
    "a closure": ("f = (lambda by: lambda x: x + by)(1)", "f = (lambda by: lambda x: x + by)(2)"),
    "a function in it": ("f = lambda x: (lambda y: y + 1)(x)", "f = lambda x: (lambda y: y + 2)(x)"),
    "a function beside it": ("g = lambda x: x + 1\nf = lambda x: g(x)", "g = lambda x: x + 2\nf = lambda x: g(x)"),
    "a number beside it": ("BY = 1\nf = lambda x: x + BY", "BY = 2\nf = lambda x: x + BY"),
    "an array in it": ("f = (lambda a: lambda x: x @ a)(np.eye(3))", "f = (lambda a: lambda x: x @ a)(np.ones((3, 3)))"),
    "a tensor in it": ("f = (lambda a: lambda x: x @ a)(torch.eye(3))", "f = (lambda a: lambda x: x @ a)(torch.ones(3, 3))"),
    "an attribute": (
        "class C:\n    def __init__(s, by): s.by = by\n    def __call__(s, x): return x + s.by\nf = C(1)",
        "class C:\n    def __init__(s, by): s.by = by\n    def __call__(s, x): return x + s.by\nf = C(2)",
    ),
    "a method": (
        "class C:\n    def __call__(s, x): return x + 1\nf = C()",
        "class C:\n    def __call__(s, x): return x + 2\nf = C()",
    ),
    "a probe's weights": (
        "torch.manual_seed(0)\nf = (lambda p: lambda x: p(x))(torch.nn.Linear(2, 2))",
        "torch.manual_seed(1)\nf = (lambda p: lambda x: p(x))(torch.nn.Linear(2, 2))",
    ),
    "the rows averaged": (
        "f = ss.metric(name='m', over=lambda b: b.valid)(lambda block: block.pattern)",
        "f = ss.metric(name='m', over=lambda b: ~b.valid)(lambda block: block.pattern)",
    ),
    "a path": (
        "from pathlib import Path\nf = (lambda p: lambda x: p)(Path('a'))",
        "from pathlib import Path\nf = (lambda p: lambda x: p)(Path('b'))",
    ),
    "a type of numbers": ("f = (lambda t: lambda x: x.to(t))(torch.half)", "f = (lambda t: lambda x: x.to(t))(torch.float)"),
    "the built-in called": ("f = (lambda g: lambda x: g(x))(torch.exp)", "f = (lambda g: lambda x: g(x))(torch.log)"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_a_change_is_noticed_and_a_move_is_not(what):
    before, after = CHANGED[what]
    assert fingerprint(made(before)) != fingerprint(made(after))
    assert fingerprint(made(before)) == fingerprint(made("# moved\n\n\n" + before))


def test_two_processes_agree():
    source = "f = (lambda by: lambda x: sorted({'a', 'b', x}) + [(lambda y: y)(by)])(2)"
    program = f"""
from tests.unit.test_fingerprint import fingerprint, made
print(fingerprint(made({source!r}), {{"b", "a", "c"}}))
"""
    run = [sys.executable, "-c", program]
    results = {subprocess.run(run, cwd=Path(__file__).parents[2], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(results) == 1


def test_what_holds_itself_ends():
    around: list = []
    around.append(around)
    assert fingerprint(around) == fingerprint(around)
    assert fingerprint(functools.partial(fingerprint, around))
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert fingerprint(deep) == fingerprint(deep)


def test_hooks_of_the_caller_count_and_those_of_the_bridge_do_not():
    model = tiny_model("llama")
    untouched = adapt(model).state()
    model(torch.tensor([[1, 2, 3]]))  # leaves TransformerLens's own
    assert adapt(model).state() == untouched
    point, digests = model.hook_dict["blocks.1.hook_resid_pre"], []
    for factor in (0.5, 0.9, 0.5):
        point.add_hook(lambda value, hook, factor=factor: value * factor)
        digests.append(adapt(model).state()["hooks"])
        point.remove_hooks("fwd")
    assert digests[0] == digests[2]
    assert len({untouched["hooks"], *digests}) == 3
    assert adapt(model).state() == untouched


def test_a_run_under_other_hooks_is_not_taken_up(tmp_path):
    model, how = tiny_model("llama"), {"metrics": ["sink_mass"], "resume": tmp_path}
    plain = ss.measure(model, "so it goes", **how)
    model.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda value, hook: value * 0.1)
    hooked = ss.measure(model, "so it goes", **how)
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 2
    assert abs(hooked.frame["value"] - plain.frame["value"]).max() > 1e-3


def test_an_edit_of_ones_own_that_was_changed_is_run_anew(tmp_path):
    def edit(hidden: int):
        source = f"""
from dataclasses import dataclass
from sinkscope.interventions import Intervention
@dataclass(frozen=True)
class _HideOne(Intervention):
    touches = frozenset({{"scores"}})
    def hides(self, layer, queries, keys, heads, length):
        return keys == {hidden}
"""
        return made(source, "_HideOne")()

    model = tiny_model("llama")
    losses = [ss.evaluate(model, "so it goes", edit(k), resume=tmp_path).frame["loss"].iloc[1] for k in (0, 2, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 2


def test_what_was_located_is_kept_with_the_runs(tmp_path, monkeypatch):
    model, edit = tiny_model("llama"), "edit_activation(layers=[0], positions=[0], dims=[3], to='mean')"
    first = ss.evaluate(model, ["so it goes, and goes on", "and on it goes"], edit, resume=tmp_path)
    assert set(first.about["located"]) == {"text 0", "text 1"}

    def never(*_):
        raise AssertionError("located anew")

    monkeypatch.setattr("sinkscope.capture.looks.Looks.__call__", never)
    again = ss.evaluate(model, ["so it goes, and goes on", "and on it goes"], edit, resume=tmp_path)
    assert again.about == first.about
