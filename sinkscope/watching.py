"""The watching verb: a model that runs in anybody's code -> passes -> statistics by text and over time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Literal, SupportsIndex

import pandas as pd

from sinkscope.block import Block
from sinkscope.capture.attended import Rows
from sinkscope.capture.blocks import ATTENTION
from sinkscope.capture.layout import Layout, size
from sinkscope.capture.overheard import UNREADABLE, Overheard
from sinkscope.capture.passes import Passes
from sinkscope.errors import SinkscopeError
from sinkscope.metrics import base_of, resolve
from sinkscope.metrics.base import AnyMetric, Metric
from sinkscope.metrics.observer import Finish, keys_of
from sinkscope.models import Adapter, adapt
from sinkscope.observing import PER_TEXT
from sinkscope.reports.sink import SinkReport
from sinkscope.results import Tally, TextResult
from sinkscope.runs.owner import alone
from sinkscope.runs.undo import Undo
from sinkscope.steps import Step, Watched
from sinkscope.tokens import whole_number
from sinkscope.watched import Pass, Run

#: What is watched if nothing is said, and batches that may go on in turn, each with a cache of its own.
DEFAULT, OPEN = ("sink_mass", "sink_rate"), 4


def watch(
    model: Any,
    metrics: Iterable[str | AnyMetric | Callable[[Block], Any]] | None = None,
    every: SupportsIndex = 1,
    key: SupportsIndex | str | Iterable[SupportsIndex | str] = 0,
) -> Watch:
    """Keep statistics of attention while any code of yours runs a model: generation with its cache, training, anything.

    Inside `with ss.watch(model, ["sink_mass"]) as seen:` the code runs as without it: attention is computed by the function
    that the model would call anyway, of the same arguments, and looked at afterwards; so outputs, gradients, caches and
    drawn tokens are equal to the bit. Afterwards (or meanwhile) `seen.series()` has a row per pass, which is one per
    generated token or training step, and `seen.report()` is a SinkReport of all queries that were seen.

    Positions are those of the texts: past a cache, without pads on either side. Inside `with edit.on(model)` the edited
    attention is what is seen.

    Args:
        model: as for :func:`sinkscope.measure`, but a HookedEncoder; of plain Hugging Face models those that ask the
            attention interface.
        metrics: as there, of those that look at attention alone; None for sink_mass and sink_rate. First-token metrics
            (`needs="mass"`) cost least.
        every: look at every n-th pass. Tokens, positions and texts are followed in any case.
        key: the sink position looked at, counted from 0; or several.

    Raises:
        SinkscopeError: a metric that needs other activations, or the last token of a text; a position from the end.
        InertHookError: attention of this model can't be seen from outside.

    >>> import torch, sinkscope as ss
    >>> model = ss.testing.tiny_hf_model("llama")
    >>> with ss.watch(model, ["sink_mass"]) as seen:
    ...     made = model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    >>> seen.series()["position"].tolist()  # the text, then token by token; what comes last is not read by the model
    [0, 3, 4, 5]
    """
    adapter = adapt(model, edited=True)
    asked = resolve(DEFAULT if metrics is None else metrics)
    base = base_of(asked)
    for m in base:
        others = sorted(set(m.needs) - ATTENTION)
        if others:
            raise SinkscopeError(f"{m.name} needs {others[0]!r}, and watch sees attention alone: ss.measure takes it")
        if m.name == "last_row_share":
            raise SinkscopeError(
                "last_row_share needs the end of a text, which is being written: series() of 'sink_mass' has it"
            )
    keys = keys_of(key)
    wrong = [k for k in keys if isinstance(k, str) or k < 0]
    if wrong:
        raise SinkscopeError(f"key={wrong[0]!r}: give positions from 0 on; a text that is being written has no end yet")
    step = whole_number(every, "every")
    if step < 1:
        raise SinkscopeError(f"every={step}: give 1 to look at every pass, or n for every n-th")
    return Watch(adapter, asked, base, [int(k) for k in keys], step)


class Watch:
    """What :func:`watch` gives: a context, and what was seen in it."""

    def __init__(self, adapter: Adapter, asked: list[AnyMetric], base: list[Metric], keys: list[int], every: int) -> None:
        self.adapter, self.asked, self.every = adapter, asked, every
        self.passes = 0
        self._watched = Watched(adapter, base, keys, [m for m in asked if isinstance(m, Metric)] or base)
        self._finish = Finish(asked, base, list(keys), adapter.causal, adapter.layers, adapter.windows)
        self._overheard = Overheard(adapter, bool(self._watched.whole), self._take, self._refuse)
        self._edges = Passes(adapter, self._begin, self._end)
        self._steps: dict[int, Step] = {}
        self._unread: Counter[str] = Counter()
        self._tally, self._results = Tally(), list[TextResult]()
        self._here, self._lock, self._open = threading.local(), threading.RLock(), dict[int, list[Run]]()
        self._undo: ExitStack = Undo()

    def __deepcopy__(self, memo: Any) -> Watch:
        """Stay one, where a model is copied: copies are not watched."""
        return self

    def __enter__(self) -> Watch:
        """Begin to watch."""
        with Undo() as undo, alone(self.adapter.network):
            undo.enter_context(self._edges.attached())
            undo.enter_context(self._overheard.attached())
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        """End it; the model is as it was."""
        with alone(self.adapter.network):
            self._undo.close()

    def series(self, by: Literal["layer", "head"] | None = None) -> pd.DataFrame:
        """Give the course of every metric: a row per pass, which is one per generated token or training step.

        Args:
            by: None for means over the model, `"layer"` or `"head"` for a row per pass and layer, or layer and head.

        Returns:
            Columns `step` (number of the pass, from 0), `position` (of its first query), `queries`, `texts`, `metric`,
            `value` and `null` (the same on uniform attention; NaN of metrics of your own); with `by`, `layer` and `head`
            too. Means are over each text's queries in the pass first, thresholds are applied to these, then means over
            texts. A metric that gives one number per key is in :meth:`report` alone, as are numbers made of others.

        Raises:
            SinkscopeError: nothing was seen; says why.
        """
        if by not in (None, "layer", "head"):
            raise SinkscopeError(f"by={by!r}: give None, 'layer' or 'head'")
        self._settle()
        with self._lock:
            steps = [self._steps[number] for number in sorted(self._steps)]
        if not steps:
            raise self._nothing()
        return self._watched.series(steps, by)

    def report(self) -> SinkReport:
        """Give all queries that were seen as a SinkReport, in which every row of every batch is a text.

        Of beams a text is what stood in its row. Where every n-th pass was looked at, means and nulls are over the queries of
        these alone.

        Raises:
            SinkscopeError: nothing was seen; says why.
        """
        self._settle()
        tally, results = Tally(), list[TextResult]()
        with self._lock:
            tally.merge(self._tally)
            results += self._results
            for run in (run for runs in self._open.values() for run in runs):
                self._finished(run, tally, results)
        if not tally.texts:
            raise self._nothing()
        whole = len(tally.texts) <= PER_TEXT
        about = self.adapter.describe() | {
            "engine": "watch",
            "engine_why": "attention as it ran in somebody's code, looked at beside it",
            "bos": "tokens are those that the code gave",
            "arguments": {
                "metrics": [m.name for m in self.asked],
                "key": self._watched.keys,
                "max_tokens": None,
                "batch_size": None,
                "chunk": None,
                "every": self.every,
            },
        }
        report = SinkReport.assemble(tally, self.asked, about, results if whole else [])
        notes = [f"{n} of {self.passes} passes were not read: {why}" for why, n in self._unread.items()]
        return replace(report, about=report.about | {"notes": [*report.about["notes"], *notes]})

    def __repr__(self) -> str:
        """Say what was seen so far."""
        unread = sum(self._unread.values())
        said = f"Watch of {self.adapter.name}: {self.passes} passes" + (f", every {self.every}th" if self.every > 1 else "")
        return said + (f"; {unread} not read: {next(iter(self._unread))}" if unread else "")

    # While the user's code runs.

    def _begin(self, given: Mapping[str, Any], cached: Callable[[], int]) -> None:
        with self._lock:
            number, self.passes = self.passes, self.passes + 1
        self._here.now = None
        self._overheard.begin(None)
        try:
            batch, before = size(given)[0], cached()
            run = self._going_on(batch, before)
            real = None if run is None else run.layout.real
            layout = Layout.of(given, before, None if real is None else real[:, :before])
        except UNREADABLE as error:
            self._unread[str(error)[:200]] += 1
            return
        run = run or self._begun(layout, number)
        run.extend(layout)
        if number % self.every == 0:
            self._here.now = Pass(number, layout, run, self._watched)
            self._overheard.begin(layout)

    def _take(self, layer: int, first: int, n: int, rows: Rows) -> None:
        self._here.now.take(layer, first, n, rows)

    def _refuse(self, why: str) -> None:
        self._here.now.why = why

    def _end(self) -> None:
        now: Pass | None = getattr(self._here, "now", None)
        self._here.now = None
        self._overheard.begin(None)
        if now is None:
            return
        if now.why is None and now.missing:
            some = "its attention" if len(now.missing) == len(self.adapter.layers) else f"layer {now.missing[0]}"
            now.why = f"nothing came from {some} (compiled, or attention of its own?)"
        if now.why is None:
            try:
                now.settle()
            except UNREADABLE as error:  # never raised into the user's code
                now.why = str(error)[:200]
        if now.why is not None:
            self._unread[now.why] += 1
            return
        with self._lock:
            now.run.add(now)

    def _going_on(self, batch: int, cached: int) -> Run | None:
        """Find the texts that a pass goes on with."""
        going = [run for run in self._open.get(threading.get_ident(), []) if run.goes_on(batch, cached)]
        return next((run for run in reversed(going) if run.layout.total == cached), going[-1] if going else None)

    def _begun(self, layout: Layout, number: int) -> Run:
        """Begin new texts; of those that may still go on the oldest are done with."""
        with self._lock:
            runs = self._open.setdefault(threading.get_ident(), [])
            while len(runs) >= OPEN:
                old = runs.pop(0)
                old.settle()
                self._finished(old, self._tally, self._results)
            runs.append(Run(self._watched, layout, number, self._keep))
            return runs[-1]

    # What was seen.

    def _keep(self, step: Step) -> None:
        self._steps[step.number] = step

    def _settle(self) -> None:
        with self._lock:
            for run in (run for runs in self._open.values() for run in runs):
                run.settle()

    def _finished(self, run: Run, tally: Tally, results: list[TextResult]) -> None:
        """Add the texts of a batch to what is reported."""
        if not run.rows:
            return
        for row, text in run.texts(self.adapter.tokenizer, read=len(results) <= PER_TEXT):
            if len(text) > max(self._watched.keys):
                result = TextResult(text, self._finish(run, row, text))
                tally.add(result)
                if len(results) <= PER_TEXT:  # one more, and no single text is reported
                    results.append(result)

    def _nothing(self) -> SinkscopeError:
        if not self.passes:
            return SinkscopeError("nothing was seen: run the model inside `with ss.watch(model) as seen:`")
        why = next(iter(self._unread), f"every={self.every}, and there were {self.passes}, or texts too short for the key")
        return SinkscopeError(f"nothing was read of {self.passes} pass(es): {why}")
