"""For pytest, under `tests/gpu/run.sh`: outcomes go into the record at once, and a lost CUDA context ends its worker."""

from __future__ import annotations

import os

import pytest

from tests.gpu.record import Record

#: What CUDA says of every later call in a process, once a kernel has gone astray.
LOST = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure", "CUDA error")


class Recorder:
    """Sits in the process that hears from all workers."""

    def __init__(self, folder: str) -> None:
        self.record = Record(folder)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note the outcome: a failure of setup or teardown is one of the test."""
        if report.when != "call" and report.passed:
            return
        lines = str(report.longrepr).strip().splitlines() if report.longrepr else [""]
        told = next((line[1:].strip() for line in lines if line.startswith("E ")), lines[-1])
        before = self.record.found["tests"].get(report.nodeid, {})
        if before.get("outcome") != "failed":
            self.record.found["tests"][report.nodeid] = {
                "outcome": report.outcome,
                "seconds": round(report.duration, 3),
                "why": told[:300],
                "properties": dict(report.user_properties),
            }
            self.record.write()


def pytest_configure(config: pytest.Config) -> None:
    folder = os.environ.get("SINKSCOPE_GPU_RECORD")
    if folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(folder))


lost = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    global lost
    report = yield
    lost = lost or (call.excinfo is not None and any(said in str(call.excinfo.value) for said in LOST))
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """End the process, and only this test with it: pytest-xdist starts another for the rest."""
    if lost and hasattr(item.config, "workerinput"):
        os._exit(70)
