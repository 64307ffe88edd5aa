"""What is said while something runs: when, to whom, and that short runs say nothing."""

import io
import sys
import time

import pytest

from sinkscope.runs import progress


class Terminal(io.StringIO):
    def __init__(self, person):
        super().__init__()
        self.person = person

    def isatty(self):
        return self.person


@pytest.fixture
def stderr(monkeypatch):
    def use(person, notebook=False):
        stream = Terminal(person)
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress, "in_notebook", lambda: notebook)
        return stream

    return use


def wait_for(stream, seconds):
    end = time.monotonic() + seconds
    while not stream.getvalue() and time.monotonic() < end:
        time.sleep(0.02)
    return stream.getvalue()


def test_in_a_notebook_a_bar_shows_before_anything_is_done(stderr):
    stream = stderr(person=False, notebook=True)
    with progress.bar(True, 10, "measure"):
        assert "measure" in wait_for(stream, 5 * progress.NOTEBOOK_DELAY)
    assert progress.NOTEBOOK_DELAY <= 0.5


def test_a_short_run_says_nothing(stderr):
    for person, notebook in ((True, False), (False, True), (False, False)):
        stream = stderr(person, notebook)
        with progress.bar(True, 10, "measure") as tick:
            tick(10)
        assert stream.getvalue().strip("\r ") == ""


def test_a_person_is_told_at_once_and_a_pipe_when_it_takes_long(stderr, monkeypatch):
    for person, notebook in ((True, False), (False, True)):
        stream = stderr(person, notebook)
        with progress.saying(True, "loading m ..."):
            assert stream.getvalue() == "loading m ...\n"
    pipe = stderr(person=False)
    with progress.saying(True, "loading m ..."):
        assert pipe.getvalue() == ""
    monkeypatch.setattr(progress, "QUIET", 0.05)
    with progress.saying(True, "loading m ..."):
        assert wait_for(pipe, 5) == "loading m ...\n"


def test_nobody_is_told_what_was_not_asked_for(stderr):
    stream = stderr(person=True)
    with progress.saying(False, "loading m ..."), progress.bar(False, 10, "measure"):
        pass
    assert stream.getvalue() == ""


def test_without_ipython_there_is_no_notebook(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not progress.in_notebook()
