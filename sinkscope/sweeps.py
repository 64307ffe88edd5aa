"""The sweep: one edit at every head, layer or position in turn -> what each costs, beside its placebo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, SupportsIndex

from sinkscope.capture.edited import Edited
from sinkscope.capture.looks import Looks
from sinkscope.capture.losses import check_logits
from sinkscope.capture.plans import plan
from sinkscope.capture.prefix import starts
from sinkscope.capture.routes import Route, Routes, routes
from sinkscope.capture.scored import in_layers
from sinkscope.capture.together import Together, first_edited, parts
from sinkscope.causal import PER_TEXT, check, following, gathered
from sinkscope.errors import SinkscopeError, unknown
from sinkscope.interventions import Intervention, parse
from sinkscope.interventions.asked import with_placebos
from sinkscope.interventions.places import OVER, Place, at, fits, places, seeds
from sinkscope.models import Adapter, adapt_side
from sinkscope.reports.sweep import Row, SweepReport
from sinkscope.results import NONE, Effects
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.progress import Shares, bar, saying
from sinkscope.runs.resume import Found, Store, claimed, keep_runs, kept_runs
from sinkscope.runs.share import Share
from sinkscope.runs.undo import surely
from sinkscope.tokens import Corpus, TextTokens, Tokens, at_most, whole_number

#: Texts of a stream that are read at a time.
PORTION = 32


def sweep(
    model: Any,
    texts: Any,
    edit: Intervention | str,
    over: str = "heads",
    *,
    side: str | None = None,
    placebo: bool | SupportsIndex | None = None,
    positions: Sequence[SupportsIndex] | None = None,
    score_from: int = 1,
    bos: bool | None = None,
    max_tokens: SupportsIndex | None = None,
    progress: bool = False,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> SweepReport:
    """Make one edit at every head, layer or position in turn, and see what each costs: `evaluate` of them all.

    What all runs share is computed once: the clean run, and of every other run the layers before the edited one, where that
    is proved to give the same. Edits of one layer are run side by side.

    Args:
        model: as for :func:`sinkscope.evaluate`.
        texts: as for :func:`sinkscope.measure`.
        edit: an intervention or its text form, such as `"zero_value(0)"`. Layers and heads that it names bound the sweep.
        over: `"heads"` (each head of each layer), `"layers"` or `"positions"` (in place of those that the edit names).
        side: as for :func:`sinkscope.evaluate`.
        placebo: run the edit's placebo at each place as well? A number: so many draws, of which the mean is reported. None:
            once, where the edit has one; never where it is another place of the sweep.
        positions: those to go over; None for all of each text but the last, which predicts nothing (of a source, all).
        score_from: as for :func:`sinkscope.evaluate`, like `bos` and `max_tokens`.
        bos: BOS first?
        max_tokens: tokens kept of each text.
        progress: show a progress bar on stderr.
        resume: as for :func:`sinkscope.measure`, some places of a text at a time.
        distributed: as for :func:`sinkscope.measure`, text by text.

    Returns:
        A :class:`SweepReport`. Differences are to the unedited run on the same tokens, in nats per token.

    Raises:
        SinkscopeError: bad input; an edit that can't be made head by head, or has no placebo where one is asked for.
        InertHookError: an edit that would do nothing on this model; names what works.
    """
    adapter, share = adapt_side(model, side, whole=True), Share.of(distributed)
    made = _Made.of(adapter, edit, over, placebo, positions)
    score_from, most = whole_number(score_from, "score_from"), at_most(max_tokens)

    def prepare(first: int, some: Any) -> tuple[Tokens, _Ready]:
        tokens = adapter.tokenize(some, bos=bos, max_tokens=most, first=first)
        adapter.check(tokens)
        ways = {}
        for n in set(map(made.length, tokens.sequences)):
            ways[n] = routes(adapter, list(made.named(n).items()), n, NONE)
            alike = Tokens(tuple(s for s in tokens.sequences if made.length(s) == n), tokens.bos)
            check(adapter, alike, list(made.named(n).items()), {n: ways[n]}, score_from, {})
        return tokens, _Ready(plan(adapter, tokens, list(made.named(max(ways)).values())), ways)

    corpus = Corpus(texts, PORTION, prepare)
    tokens, ready = corpus.head
    vocabulary = check_logits(adapter, tokens)
    about = adapter.describe() | {"engine": ready.capture.name, "engine_why": ready.capture.why, "bos": tokens.bos}
    about["arguments"] = made.arguments | {"score_from": score_from, "max_tokens": most}
    store = Store.of(resume, about | adapter.state() | {"edit": fingerprint(made.edit)} if resume else {})
    with saying(progress and share.rank == 0, "proving which layers all runs can share ..."), surely(ready.capture):
        begun = starts(adapter, ready.capture, tokens.sequences[0], ready.firsts(adapter))
    one, lengths = _One(adapter, made, score_from, vocabulary, begun), dict[str, int]()
    effects = Effects(len(tokens) <= PER_TEXT)
    with claimed(resume if share.rank == 0 else None), bar(progress and share.rank == 0, one.total(corpus), "sweep") as tick:
        numbers = count()
        for tokens, ready in corpus:
            for s, other in zip(tokens.sequences, following(tokens.sequences, corpus.head[0].sequences[0]), strict=True):
                lengths[s.label] = made.length(s)
                if share.mine(next(numbers)):
                    one.text(ready, s, other, store, effects, tick)
                else:
                    tick(one.ticks(ready.ways[made.length(s)]))
    effects, about = gathered(effects, share, corpus.labels, about | {"shared": one.shared}, adapter)
    return SweepReport.assemble(effects.runs, {label: made.rows(n) for label, n in lengths.items()}, about)


@dataclass(frozen=True)
class _Made:
    """What is swept: the edit at every place of a text of some length, each with its placebos.

    Those that nobody `asked` for are left out where a text is too short for them.
    """

    adapter: Adapter
    edit: Intervention
    over: str
    seeds: int
    asked: bool
    positions: tuple[int, ...] | None
    _known: dict[int, dict[Place, list[Intervention]]] = field(default_factory=dict)

    @classmethod
    def of(cls, adapter: Adapter, edit: Any, over: str, placebo: Any, positions: Any) -> _Made:
        """Read the arguments.

        Raises:
            SinkscopeError: names what is wrong.
        """
        edit = parse(edit) if isinstance(edit, str) else edit
        if not isinstance(edit, Intervention):
            raise SinkscopeError(f"expected an intervention or its text form, got a {type(edit).__name__}")
        if over not in OVER:
            raise unknown("sweep over", over, OVER)
        if positions is not None and over != "positions":
            raise SinkscopeError(f"positions= belongs to over='positions', not to over={over!r}")
        edit.check_model(adapter.heads)
        chosen = None
        if positions is not None:
            chosen = tuple(dict.fromkeys(whole_number(p, "positions", "whole numbers") for p in positions))
            if not chosen or min(chosen) < 0:
                raise SinkscopeError(f"positions={list(chosen)}: give at least one, counted from 0")
        return cls(adapter, edit, over, seeds(edit, over, placebo), placebo is not None, chosen)

    @property
    def of_source(self) -> bool:
        """Whether the positions that the edit names are those of a source."""
        return self.adapter.side == "encoder" or (self.adapter.side == "cross" and not self.edit.at_queries)

    def text(self, sequence: TextTokens) -> TextTokens:
        """Give the text whose positions the edit names."""
        return sequence.keyed if self.of_source else sequence

    def length(self, sequence: TextTokens) -> int:
        """Count its tokens."""
        return len(self.text(sequence))

    @property
    def arguments(self) -> dict[str, Any]:
        """For the report."""
        of = {"edit": str(self.edit), "over": self.over, "placebo": self.seeds}
        return of | ({} if self.positions is None else {"positions": list(self.positions)})

    def at(self, length: int) -> dict[Place, list[Intervention]]:
        """Give each place's edit, and its placebos after it."""
        if length not in self._known:
            positions = range(length - (not self.of_source)) if self.positions is None else self.positions
            every = places(self.edit, self.over, self.adapter.heads, positions)
            edits = {place: at(self.edit, place) for place in every}
            drawn = {place: self._placebos(edit) for place, edit in edits.items()}
            fit = self.asked or all(fits(edit, length) for several in drawn.values() for edit in several)
            self._known[length] = {place: [edit, *(drawn[place] if fit else [])] for place, edit in edits.items()}
        return self._known[length]

    def _placebos(self, edit: Intervention) -> list[Intervention]:
        (_, *placebos), _ = with_placebos([(str(edit), edit)], self.seeds)
        return [placebo for _, placebo in placebos]

    def named(self, length: int) -> dict[str, Intervention]:
        """Give every run by its name, once: a placebo may be that of several places."""
        return {str(edit): edit for several in self.at(length).values() for edit in several}

    def rows(self, length: int) -> list[Row]:
        """Give what a report has a row for."""
        return [Row(place, str(edit), tuple(map(str, placebos))) for place, (edit, *placebos) in self.at(length).items()]


@dataclass(frozen=True)
class _Ready:
    """What texts are run with: the engine, and the way of every edit by the text's length."""

    capture: Edited
    ways: dict[int, Routes]

    def firsts(self, adapter: Adapter) -> set[int]:
        """Give every layer that some run begins with."""
        return {first_edited(adapter, route) for way in self.ways.values() for route in way.edited}


@dataclass(frozen=True)
class _One:
    """What is done with one text; a tick of the bar is a layer of one run, or as much of scoring."""

    adapter: Adapter
    made: _Made
    score_from: int
    vocabulary: int
    starts: dict[int, int]

    @property
    def shared(self) -> str:
        """Say what was not run twice."""
        early = sum(first != start for first, start in self.starts.items())
        if not any(self.starts):
            return "nothing: every run edits the first layer or the input"
        if early:
            return f"layers before the edited one, but for {early} of {len(self.starts)} layers, which ask for more"
        return "layers before the edited one (proved equal on the first tokens)"

    @cached_property
    def _scoring(self) -> int:
        return in_layers(self.adapter, self.vocabulary)

    def _layers(self, route: Route) -> int:
        start = self.starts.get(first_edited(self.adapter, route), 0)
        return sum(layer >= start for layer in self.adapter.layers)

    def ticks(self, way: Routes) -> int:
        """Count those of a text."""
        return len(self.adapter.layers) + sum(self._layers(route) + self._scoring for route in way.edited)

    def total(self, corpus: Corpus[_Ready]) -> int | None:
        """Count those of all texts, if that is known before they are read."""
        tokens, ready = corpus.head
        counts = [self.ticks(ready.ways[self.made.length(s)]) for s in tokens.sequences]
        if corpus.total == len(tokens):
            return sum(counts)
        return corpus.total and (corpus.total * counts[0] if len(set(counts)) == 1 else None)

    def text(
        self,
        ready: _Ready,
        sequence: TextTokens,
        other: TextTokens | None,
        store: Store,
        into: Effects,
        tick: Callable[[int], None],
    ) -> None:
        """Add what is found in a text: what was kept of an interrupted run, or run now and kept, part by part."""
        look, n = Looks(self.adapter.within(sequence), ready.capture, other), self.made.length(sequence)
        texts = [s for s in (sequence, other if self.made.edit.borrows else None) if s is not None]
        todo: list[tuple[Store, list[Route]]] = []
        done: list[Found] = []
        for part in parts(self.adapter, ready.ways[n].edited, n):
            here = replace(store, run=f"{store.run} {[route.name for route in part]}")
            found = kept_runs(here, *texts)
            if found is None:
                todo.append((here, [route.settled(route.edit.settle(sequence.keyed.ids, look)) for route in part]))
            else:
                tick(sum(self._layers(route) + self._scoring for route in part))
                done.append(found)
        if todo:
            with surely(ready.capture):
                done += self._run(ready.capture, texts, todo, tick)
        else:
            tick(len(self.adapter.layers))
        located = {name: made for _, of in done for name, made in of.items()}
        into.add([run for runs, _ in done for run in runs], located, self.made.text(sequence))

    def _run(
        self,
        capture: Edited,
        texts: Sequence[TextTokens],
        todo: Sequence[tuple[Store, list[Route]]],
        tick: Callable[[int], None],
    ) -> Iterator[Found]:
        """Run parts of a text, the first of `texts`, and keep each."""
        together = Together(self.adapter, capture, texts[0], self.starts, tick)
        clean = together.clean()
        for store, part in todo:
            share = Shares(tick, self._scoring * len(part))
            runs = [run.slim() for run in together.scored(clean, part, self.score_from, self.vocabulary, share)]
            found = runs, {r.name: str(r.edit) for r in part if r.name != str(r.edit)}
            keep_runs(store, found, *texts)
            yield found
