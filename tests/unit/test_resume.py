"""A killed run goes on after the last finished batch, and ends with the very numbers of one that was never stopped."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import sinkscope as ss
from sinkscope.runs.resume import FOLDER
from sinkscope.testing import tiny_model

TEXTS = {f"t{i}": "so it goes, and goes on" + " again" * (i % 5) for i in range(12)}


@pytest.fixture(scope="module")
def llama():
    return tiny_model("llama")


def counting(batches, stop_after=10**9, error=KeyboardInterrupt):
    """A metric that counts the batches that are run, and stops the run in the one after `stop_after`.

    Whatever a metric closes over is a part of it: where to stop stands apart, that a run may be taken up.
    """
    stop = SimpleNamespace(after=stop_after, error=error)

    @ss.metric(needs="pattern", null=None)
    def counted(block):
        if block.layer == 0 and block.start == 0:
            if len(batches) == stop.after:
                raise stop.error
            batches.append(len(block.lengths))
        return block.pattern[..., 0]

    return counted


def run(model, folder, batches, **how):
    metrics = ["sink_mass", "position_profile", "sink_positions", counting(batches, **how)]
    return ss.measure(model, TEXTS, metrics, batch_size=3, resume=folder)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(llama, tmp_path):
    whole = run(llama, None, [])
    before, after = [], []
    with pytest.raises(KeyboardInterrupt):
        run(llama, tmp_path, before, stop_after=2)
    assert len(list((tmp_path / FOLDER).glob("*.npz"))) == 2
    report = run(llama, tmp_path, after)
    assert (len(before), len(after)) == (2, 2)
    pd.testing.assert_frame_equal(report.frame, whole.frame, check_exact=True)
    pd.testing.assert_frame_equal(report.summary(), whole.summary(), check_exact=True)
    report.save(tmp_path)
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize("damage", [b"", b"PK half", None])
def test_a_half_written_batch_is_run_again(llama, tmp_path, damage):
    whole = run(llama, tmp_path, [])
    for path in (tmp_path / FOLDER).glob("*.npz"):
        path.write_bytes(damage if damage is not None else path.read_bytes()[: path.stat().st_size // 2])
    pd.testing.assert_frame_equal(run(llama, tmp_path, []).frame, whole.frame)


def test_batches_of_another_run_are_not_taken_up(llama, tmp_path):
    ss.measure(llama, TEXTS, ["sink_mass"], batch_size=3, resume=tmp_path)
    other = ss.measure(tiny_model("llama", seed=1), TEXTS, ["sink_mass"], batch_size=3, resume=tmp_path)
    fresh = ss.measure(tiny_model("llama", seed=1), TEXTS, ["sink_mass"], batch_size=3)
    np.testing.assert_array_equal(other.frame["value"], fresh.frame["value"])
    keyed = ss.measure(llama, TEXTS, ["sink_mass"], key=2, batch_size=3, resume=tmp_path)
    assert set(keyed.frame["key"]) == {2}


SCRIPT = """
import os, signal, sys
import sinkscope as ss
from tests.unit.test_resume import TEXTS, tiny_model

seen = []

@ss.metric(needs="pattern", null=None)
def first(block):
    if block.layer == 1 and block.start == 0:
        seen.append(block)
        if len(seen) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
    return block.pattern[..., 0]

report = ss.measure(tiny_model("llama"), TEXTS, ["sink_mass", first], batch_size=3, resume=sys.argv[1])
report.save(sys.argv[1])
"""


@pytest.mark.slow
def test_a_killed_process_goes_on(llama, tmp_path):
    """SIGKILL in the third batch; the second process runs what is left; a third, undisturbed, writes the same tables."""
    root = Path(__file__).parents[2]

    def process(folder, kill_at):
        command = [sys.executable, "-c", SCRIPT, str(folder), str(kill_at)]
        return subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, check=False).returncode

    assert process(tmp_path / "killed", 3) == -signal.SIGKILL
    with pytest.raises(ss.SinkscopeError, match="no finished report"):
        ss.load_report(tmp_path / "killed")
    assert len(list((tmp_path / "killed" / FOLDER).glob("*.npz"))) == 2
    assert process(tmp_path / "killed", 0) == 0
    assert process(tmp_path / "whole", 0) == 0
    for name in ("measurements.csv", "summary.csv"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
