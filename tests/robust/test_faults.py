"""Faults injected anywhere: the model is left as it was found, nothing leaks, and the next call gives the same numbers."""

import functools
import gc
import os
import signal
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import sinkscope as ss
from sinkscope.capture import flash, rows
from sinkscope.metrics.accumulate import RowMean
from sinkscope.reports import page
from sinkscope.reports.sink import SinkReport
from sinkscope.testing import tiny_hf_model, tiny_model, tiny_tokenizer
from tests.conftest import fingerprint, fresh, most_slow

TEXTS = ["so it goes, on", "and on"]
TIMES = int(os.environ.get("SINKSCOPE_FUZZ", "1"))
PACKAGE = str(Path(ss.__file__).parent)
MODELS = {
    "gpt2": lambda: fresh(tiny_model("gpt2")),
    "mistral": lambda: fresh(tiny_model("mistral")),
    "plain llama": lambda: _plain("llama"),
}
CALLS = {
    "flash": lambda model: ss.measure(model, TEXTS, ["sink_mass", "row_entropy", "key_norm"], engine="flash"),
    "hooks": lambda model: ss.measure(model, TEXTS, ["sink_mass", "row_entropy"], engine="hooks"),
    "evaluate": lambda model: ss.evaluate(model, TEXTS, ["mask_keys(keys=[0])", "window(size=3)"]),
    "on": lambda model: _generate(model),
}
CASES = [(m, c) for m in MODELS for c in CALLS if (m, c) not in {("plain llama", "hooks"), ("plain llama", "flash")}]


def _plain(family):
    network = tiny_hf_model(family)
    network.tokenizer = tiny_tokenizer()
    return network


def _generate(model):
    with ss.MaskKeys(0).on(model), torch.no_grad():
        ids = torch.tensor([[1, 5, 9, 4]])
        return getattr(model, "original_model", model)(ids).logits


def numbers(result):
    return result if isinstance(result, torch.Tensor) else torch.tensor(result.frame.select_dtypes("float").to_numpy())


class _Interrupts:
    """Sends SIGINT, as Ctrl-C does, before the n-th line of the library that runs."""

    def __init__(self, at):
        self.at, self.lines, self.where = at, 0, None

    def __call__(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self


def interrupted(call, at):
    """Run with an interrupt before the at-th line; gives where it struck, and how many lines there were."""
    tracer, before = _Interrupts(at), sys.gettrace()
    sys.settrace(tracer)
    try:
        call()
    except (KeyboardInterrupt, ss.SinkscopeError):
        pass  # a metric that is interrupted is not a metric that fails: see below
    finally:
        sys.settrace(before)
    return tracer.where, tracer.lines


def state(model):
    gc.collect()
    return fingerprint(model) | {"handler": signal.getsignal(signal.SIGINT), "threads": threading.active_count()}


def open_files():
    descriptors = Path("/proc/self/fd")  # where there is one
    return len(list(descriptors.glob("*")))


@functools.cache
def prepared(model, call):
    """A model, what it must look like, what the call gives, and how many lines of the library that runs."""
    made = MODELS[model]()
    CALLS[call](made)
    before = state(made)
    _, lines = interrupted(lambda: CALLS[call](made), -1)
    return made, before, numbers(CALLS[call](made)), lines


@pytest.mark.parametrize(("name", "call"), most_slow(CASES, *(case for case in CASES if case[0] != "mistral")))
@settings(max_examples=2 if TIMES == 1 else 4 * TIMES, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 0.99))  # a run has some lines more or fewer than the one before
def test_an_interrupt_at_any_moment_leaves_no_mark(name, call, share):
    model, before, expected, lines = prepared(name, call)
    where, _ = interrupted(lambda: CALLS[call](model), 1 + int(share * (lines - 1)))
    assert where is not None
    assert state(model) == before, where
    torch.testing.assert_close(numbers(CALLS[call](model)), expected, rtol=0, atol=0, equal_nan=True)


def failing(function, at, error):
    """The function, which fails when it is called for the at-th time."""
    calls = []

    def wrapped(*args, **given):
        calls.append(1)
        if len(calls) == at:
            raise error
        return function(*args, **given)

    return wrapped


STAGES = {
    "the attention op": (flash, "attention_with_lse"),
    "rows": (rows.Scores, "rows"),
    "an accumulator": (RowMean, "update"),
    "the report": (SinkReport, "assemble"),
    "a table": (pd.DataFrame, "to_csv"),
    "parquet": (pd.DataFrame, "to_parquet"),
    "a picture": (Figure, "savefig"),
    "the page": (page, "render"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_in_any_stage_leaves_no_mark(stage, tmp_path, monkeypatch):
    model, before, expected, _ = prepared("gpt2", "flash")
    owner, name = STAGES[stage]
    at = 1 if stage in ("the report", "the page") else 2  # of which there is one

    def run(folder=tmp_path / "second"):
        report = CALLS["flash"](model)
        report.save(folder)
        return report

    run(tmp_path / "first")
    files = open_files()
    error = OSError(28, "No space left") if stage in ("a table", "parquet", "a picture") else RuntimeError("injected")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), at, error))
        try:
            run()
        except (type(error), ss.SinkscopeError):
            with pytest.raises(ss.SinkscopeError, match="no finished report"):
                ss.load_report(tmp_path / "second")
    assert (state(model), open_files()) == (before, files)
    report = run()
    torch.testing.assert_close(numbers(report), expected, rtol=0, atol=0, equal_nan=True)
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".half")]
    pd.testing.assert_frame_equal(ss.load_report(tmp_path / "second").frame, report.frame)


@pytest.mark.parametrize("where", ["metric", "hook"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_a_fault_in_what_the_user_wrote_leaves_no_mark(where, error):
    model, before, expected, _ = prepared("gpt2", "flash")

    @ss.metric(needs="pattern", null=None)
    def bad(block):
        raise error

    def hook(value, hook):
        raise error

    metrics = ["sink_mass", bad] if where == "metric" else ["sink_mass", "key_norm"]
    fails = pytest.raises(ss.SinkscopeError if (where, error) == ("metric", ZeroDivisionError) else error)
    if where == "hook":
        with model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", hook)]), fails:
            ss.measure(model, TEXTS, metrics)
    else:
        with fails:
            ss.measure(model, TEXTS, metrics)
    del fails
    assert state(model) == before
    torch.testing.assert_close(numbers(CALLS["flash"](model)), expected, rtol=0, atol=0, equal_nan=True)
