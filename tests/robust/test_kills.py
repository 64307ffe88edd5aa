"""Runs that are killed (SIGKILL, at any moment) and called again give, bit by bit, what a run in one piece gives."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
#: Kills of each kind of run; `make fuzz` has more.
KILLS = 2 if "SINKSCOPE_FUZZ" not in os.environ else 20


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_bits():
    """In a process with one thread: what forks beside others' threads may hang."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.robust.test_kills", str(KILLS)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    lines = told.stdout.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert f"{KILLS} killed" in line
        assert line.endswith("the same bits")


def killed(call, after):
    """Fork, run a call, and kill it after some seconds; whether it was still running."""
    pid = os.fork()
    if pid == 0:
        try:
            call()
        finally:
            os._exit(0)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 0


def tables(report):
    return [
        report.frame,
        report.summary(),
        *(getattr(report, name) for name in ("details", "curves") if hasattr(report, name)),
    ]


def main(kills):
    import sinkscope as ss
    from sinkscope.testing import tiny_model
    from tests.robust.test_corpora import METRICS, words

    model, texts, draw = tiny_model("llama"), words(240), random.Random(0)
    runs = {
        "measure": lambda out: ss.measure(model, texts[:96], METRICS, batch_size=4, resume=out),
        "a stream": lambda out: ss.measure(model, iter(texts), METRICS, batch_size=8, resume=out),
        "evaluate": lambda out: ss.evaluate(model, texts[:24], ["window(size=4)", "mask_keys"], resume=out),
        "sweep": lambda out: ss.sweep(model, texts[:4], "zero_head", resume=out),
    }
    for name, run in runs.items():
        start = time.perf_counter()
        whole, took = tables(run(None)), time.perf_counter() - start
        n = calls = 0
        while n < kills:
            with tempfile.TemporaryDirectory() as out:
                struck = 0
                while struck < 3 and n < kills:  # the same directory is killed up to three times
                    calls += 1
                    if not killed(partial(run, out), draw.uniform(0.05, 0.95) * took):
                        break
                    struck, n = struck + 1, n + 1
                for ours, theirs in zip(tables(run(out)), whole, strict=True):
                    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
        print(f"{name}: {n} killed of {calls} begun, the same bits")


if __name__ == "__main__":
    main(int(sys.argv[1]))
