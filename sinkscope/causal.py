"""The causal loop: interventions -> forward passes on the same tokens -> loss, KL and where the sink went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any, SupportsIndex

from sinkscope.capture import scored
from sinkscope.capture.edited import Edited
from sinkscope.capture.looks import Looks
from sinkscope.capture.losses import check_logits
from sinkscope.capture.plans import plan
from sinkscope.capture.routes import Route, Routes, routes
from sinkscope.edit import NOTHING
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention
from sinkscope.interventions.asked import named, placebo_of, with_placebos
from sinkscope.models import Adapter, adapt_side
from sinkscope.reports.effect import EffectReport
from sinkscope.results import NONE, Effects, Run
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.progress import Shares, bar
from sinkscope.runs.resume import Found, Store, claimed, keep_runs, kept_runs
from sinkscope.runs.share import Share
from sinkscope.runs.undo import surely
from sinkscope.tokens import Corpus, TextTokens, Tokens, at_most, whole_number

#: Texts whose tokens' losses are kept if nothing is said, and texts of a stream that are read at a time.
PER_TEXT, PORTION = 100, 128


def evaluate(
    model: Any,
    texts: Any,
    interventions: Intervention | str | Sequence[Intervention | str],
    *,
    side: str | None = None,
    score_from: int = 1,
    placebo: bool | SupportsIndex = False,
    bos: bool | None = None,
    max_tokens: SupportsIndex | None = None,
    per_text: bool | None = None,
    progress: bool = False,
    resume: str | Path | None = None,
    distributed: bool = False,
) -> EffectReport:
    """Edit the forward pass and see what happens to the loss, on the same tokens as the unedited pass.

    Args:
        model: a TransformerBridge, a HookedTransformer, or a plain Hugging Face decoder whose attention asks Hugging Face's
            attention interface. It is left exactly as it was.
        texts: as for :func:`sinkscope.measure`.
        interventions: one or several, as objects or in text form, such as `"sink_window(size=256, sinks=4)"`.
        side: of an encoder-decoder, which attention is edited: `"decoder"` (its own; None is that), `"encoder"` or `"cross"`.
            The loss is the target's. In the latter two keys are the source's tokens, and windows are refused; in
            cross-attention no key is the query itself, so a key that is masked is hidden from all.
        score_from: score the predictions of tokens at this position (0-based) and later ones.
        placebo: run each edit's placebo beside it, which does the same where no sink is; a number: as many, of different
            seeds. The report has their mean and spread beside the edit, and across texts tests one against the other.
        bos: as for :func:`sinkscope.measure`.
        max_tokens: keep at most this many tokens of each text, BOS included.
        per_text: keep every token's loss of every text in `.curves`? None: of up to 100 texts; of more, means over texts by
            position, so that memory does not grow with the texts.
        progress: show a progress bar on stderr.
        resume: as for :func:`sinkscope.measure`, text by text.
        distributed: as for :func:`sinkscope.measure`, text by text.

    Returns:
        An :class:`EffectReport`. Losses are in nats per token. Intervals are of the difference to the unedited run, paired
        token by token: across texts where there are several, else across consecutive blocks of the one text.

    Raises:
        SinkscopeError: bad input; keys outside a text; positions that a streaming window can't be defined for.
        InertHookError: an edit that would do nothing on this model; names what works.
    """
    adapter, share = adapt_side(model, side, whole=True), Share.of(distributed)
    asked = named(interventions)
    edits, placebos = with_placebos(asked, placebo)
    score_from, most = whole_number(score_from, "score_from"), at_most(max_tokens)

    def prepare(first: int, some: Any) -> tuple[Tokens, _Ready]:
        tokens = adapter.tokenize(some, bos=bos, max_tokens=most, first=first)
        ways = {n: routes(adapter, edits, n, NONE) for n in {len(s) for s in tokens.sequences}}
        check(adapter, tokens, edits, ways, score_from, placebos)
        return tokens, _Ready(plan(adapter, tokens, [e for _, e in edits]), ways)

    corpus = Corpus(texts, PORTION, prepare)
    tokens, ready = corpus.head
    about = _how(adapter, ready.capture, tokens.bos, asked, score_from, most)
    if placebo:
        about["arguments"]["placebo"], about["placebos"] = int(placebo), about["placebos"] | placebos
        about["unmatched"] = [name for name, _ in asked if name not in placebos.values()]
    store = Store.of(resume, about | adapter.state() | {"edits": fingerprint([e for _, e in edits])} if resume else {})
    effects = Effects(len(tokens) <= PER_TEXT if per_text is None else per_text)
    one = _One(adapter, score_from, 1 + len(edits), check_logits(adapter, tokens))
    total = corpus.total and corpus.total * one.ticks
    with claimed(resume if share.rank == 0 else None), bar(progress and share.rank == 0, total, "evaluate") as tick:
        numbers = count()
        for tokens, ready in corpus:
            beside = zip(tokens.sequences, following(tokens.sequences, corpus.head[0].sequences[0]), strict=True)
            mine = [(s, other) for s, other in beside if share.mine(next(numbers))]
            tick(one.ticks * (len(tokens) - len(mine)))
            one.portion(ready, mine, store, effects, tick)
    return EffectReport.assemble(*gathered(effects, share, corpus.labels, about, adapter))


def _how(
    adapter: Adapter,
    capture: Edited,
    bos: str,
    edits: Sequence[tuple[str, Intervention]],
    score_from: int,
    max_tokens: int | None,
) -> dict[str, Any]:
    names = [name for name, _ in edits]
    return adapter.describe() | {
        "engine": capture.name,
        "engine_why": capture.why,
        "bos": bos,
        "arguments": {"interventions": names, "score_from": score_from, "max_tokens": max_tokens},
        "placebos": {placebo: name for name, edit in edits if (placebo := placebo_of(edit)) in names and placebo != name},
    }


def check(
    adapter: Adapter,
    tokens: Tokens,
    edits: Sequence[tuple[str, Intervention]],
    ways: dict[int, Routes],
    score_from: int,
    placebos: Mapping[str, str],
) -> None:
    """Refuse, before anything runs, what can't be done on these texts; `placebos` are those that nobody wrote down."""
    adapter.check(tokens, bounded=not all(r.clean is not None or r.unbounded for r in ways.values()))
    for s in tokens.sequences:
        if not 1 <= score_from < len(s):
            raise SinkscopeError(
                f"score_from={score_from}: {s.label!r} has {len(s)} tokens, so the first one scored can be 1 to {len(s) - 1}"
            )
        for name, edit in edits:
            with _placebo_of(placebos.get(name)):
                for part in edit.parts():
                    part.check(len(s if part.at_queries and adapter.side == "cross" else s.keyed))
    for name, edit in edits:
        with _placebo_of(placebos.get(name)):
            edit.check_model(adapter.heads)


@contextmanager
def _placebo_of(edit: str | None) -> Iterator[None]:
    """Say of a refusal that it is a placebo that is refused, and of which edit."""
    try:
        yield
    except SinkscopeError as error:
        if edit is None:
            raise
        raise SinkscopeError(f"{error}. It is a placebo of {edit}: give other texts or edits, or no placebo") from None


@dataclass(frozen=True)
class _Ready:
    """What texts are run with: the engine, and the way of every edit by the text's length."""

    capture: Edited
    ways: dict[int, Routes]


@dataclass(frozen=True)
class _One:
    """What is done with one text, and how much of the bar that is: a tick is a layer of one pass, or as much of scoring."""

    adapter: Adapter
    score_from: int
    passes: int
    vocabulary: int

    @property
    def ticks(self) -> int:
        """How many a text takes."""
        return self.passes * (len(self.adapter.layers) + self._scoring)

    @cached_property
    def _scoring(self) -> int:
        return scored.in_layers(self.adapter, self.vocabulary)

    def portion(
        self,
        ready: _Ready,
        texts: Sequence[tuple[TextTokens, TextTokens | None]],
        store: Store,
        into: Effects,
        tick: Callable[[int], None],
    ) -> None:
        """Add what is found in some texts, each with the next: what was kept of an interrupted run, or run now and kept."""
        borrows = any(r.edit.borrows for way in ready.ways.values() for r in way.edited)
        beside = {s.label: [t for t in (s, other) if t is s or (borrows and t)] for s, other in texts}
        kept = {label: kept_runs(store, *some) for label, some in beside.items()}
        ways = {s.label: self._settled(ready, s, other) for s, other in texts if kept[s.label] is None}
        with surely(ready.capture):
            for s, _ in texts:
                found = kept.pop(s.label)
                if found is None:
                    found = self._run(ready.capture, s, ways[s.label], tick)
                    keep_runs(store, found, *beside[s.label])
                else:
                    tick(self.ticks)
                into.add(*found, s)

    def _settled(self, ready: _Ready, sequence: TextTokens, other: TextTokens | None) -> Routes:
        """Locate in a text what edits leave open."""
        way, look = ready.ways[len(sequence)], Looks(self.adapter.within(sequence), ready.capture, other)
        return Routes(way.clean, tuple(r.settled(r.edit.settle(sequence.keyed.ids, look)) for r in way.edited))

    def _run(self, capture: Edited, sequence: TextTokens, way: Routes, tick: Callable[[int], None]) -> Found:
        """Run all edits on one text; beside the unedited pass where the context holds it, else alone, piece by piece.

        Raises:
            SinkscopeError: an edit leaves nothing to be scored.
        """
        runs = list((self._alone if way.clean is None else self._beside)(capture, sequence, way, tick))
        return runs, {route.name: str(route.edit) for route in way.edited if route.name != str(route.edit)}

    def _alone(self, capture: Edited, sequence: TextTokens, way: Routes, tick: Callable[[int], None]) -> Iterator[Run]:
        yield scored.Scores(0).run(sequence, scored.Passed.nothing(Route(NONE, NOTHING, "whole")))
        rows = scored.rows_at_a_time(self.vocabulary, 1)
        tick(len(self.adapter.layers) + self._scoring)
        for route in way.edited:
            scores = scored.Scores(len(sequence))
            score = partial(scored.alone, self.adapter, sequence, self.score_from, rows, scores)
            made = scored.passed(self.adapter, capture, sequence, route, partial(tick, 1), score)
            tick(self._scoring)
            yield scores.run(sequence, made)

    def _beside(self, capture: Edited, sequence: TextTokens, way: Routes, tick: Callable[[int], None]) -> Iterator[Run]:
        ways = [r for r in (way.clean, *way.edited) if r is not None]
        passes = [scored.passed(self.adapter, capture, sequence, route, partial(tick, 1)) for route in ways]
        rows = scored.rows_at_a_time(self.vocabulary, len(passes))
        done = Shares(tick, self._scoring * len(passes))
        scores = scored.beside_clean(self.adapter, sequence, self.score_from, rows, passes, done)
        for made, one in zip(passes, scores, strict=True):
            if not one.scored.any():
                raise SinkscopeError(f"{made.route.edit} leaves no token of {sequence.label!r} to be scored")
            yield one.run(sequence, made)


def following(sequences: Sequence[TextTokens], first: TextTokens) -> list[TextTokens | None]:
    """Give the next text of each; behind the last of a portion comes the first of the call; None where it is the only one."""
    behind = [*sequences[1:], first]
    return [None if other.label == s.label else other for s, other in zip(sequences, behind, strict=True)]


def gathered(
    effects: Effects, share: Share, labels: dict[str, int], about: dict[str, Any], adapter: Adapter
) -> tuple[Effects, dict[str, Any]]:
    """Put together what all processes found, in the order of the texts, and say what there is to say of them."""
    effects, *others = share.gather(effects)
    for other in others:
        effects.merge(other)
    place = {label: i for i, label in enumerate(labels)}
    effects.runs.sort(key=lambda run: place[run.text])
    about |= {"texts": [{"label": label, "n_tokens": n} for label, n in labels.items()]}
    for text in about["texts"]:
        if text["label"] in effects.tokens:
            text["tokens"] = list(effects.tokens[text["label"]])
    if effects.located:
        about["located"] = {label: effects.located[label] for label in labels if label in effects.located}
    if any(adapter.n_ctx is not None and n > adapter.n_ctx for n in labels.values()):
        about["no_clean_run"] = f"texts of more than {adapter.n_ctx} tokens have no unedited run to compare with"
    return effects, about
