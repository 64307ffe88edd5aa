"""The causal loop: interventions -> forward passes on the same tokens -> loss, KL and where the sink went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.attend import NONE
from sinkscope.capture.edited import Edited, plan, streams
from sinkscope.capture.hooks import dropping_patterns
from sinkscope.capture.proof import WRONG, WRONG_IN_HALF
from sinkscope.capture.residuals import residuals
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, parse
from sinkscope.models import Adapter, adapt
from sinkscope.reports.effect import EffectReport
from sinkscope.results import NONE as NO_EDIT
from sinkscope.results import Effects, Run, mean
from sinkscope.runs.fingerprint import fingerprint
from sinkscope.runs.progress import bar
from sinkscope.runs.resume import Store, claimed, keep_runs, kept_runs
from sinkscope.runs.share import Share
from sinkscope.runs.undo import surely
from sinkscope.tokens import Corpus, TextTokens, Tokens, at_most, whole_number

#: Texts whose tokens' losses are kept if nothing is said, and texts of a stream that are read at a time.
PER_TEXT, PORTION = 100, 128
#: Logits at a time, in numbers: tokens x vocabulary is never whole.
LOGITS = 4 << 20
NOTHING = torch.zeros(0, 0)


def evaluate(
    model: Any,
    texts: Any,
    interventions: Intervention | str | Sequence[Intervention | str],
    *,
    score_from: int = 1,
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
        score_from: score the predictions of tokens at this position (0-based) and later ones.
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
    adapter = adapt(model)
    given = [interventions] if isinstance(interventions, Intervention | str) else list(interventions)
    edits = [parse(e) if isinstance(e, str) else e for e in given]
    for edit in edits:
        if not isinstance(edit, Intervention):
            raise SinkscopeError(f"expected an intervention or its text form, got a {type(edit).__name__}")
    if not edits or len({str(e) for e in edits}) < len(edits):
        raise SinkscopeError("give at least one intervention, and each once")
    names, share = [str(e) for e in edits], Share.of(distributed)
    score_from, most = whole_number(score_from, "score_from"), at_most(max_tokens)

    def prepare(first: int, some: Any) -> tuple[Tokens, Edited]:
        tokens = adapter.tokenize(some, bos=bos, max_tokens=most, first=first)
        long = [s for s in tokens.sequences if not _fits(adapter, s)]
        adapter.check(tokens, bounded=not all(streams(adapter, e, len(s)) for e in edits for s in long))
        _check(adapter, tokens, edits, score_from)
        return tokens, plan(adapter, tokens, edits)

    corpus = Corpus(texts, PORTION, prepare)
    tokens, capture = corpus.head
    about = adapter.describe() | {
        "engine": capture.name,
        "engine_why": capture.why,
        "bos": tokens.bos,
        "arguments": {"interventions": names, "score_from": score_from, "max_tokens": most},
    }
    store = Store.of(resume, about | adapter.state() | {"edits": fingerprint(edits)} if resume else {})
    effects = Effects(len(tokens) <= PER_TEXT if per_text is None else per_text)
    rows = max(1, LOGITS // _check_logits(adapter, tokens))
    numbers = count()
    long = False
    layers = len(adapter.layers)
    with (
        claimed(resume if share.rank == 0 else None),
        bar(progress and share.rank == 0, corpus.total and corpus.total * (1 + len(edits)) * layers, "evaluate") as tick,
    ):
        for tokens, capture in corpus:
            long = long or not all(_fits(adapter, s) for s in tokens.sequences)
            mine = [s for s in tokens.sequences if share.mine(next(numbers))]
            tick((1 + len(edits)) * layers * (len(tokens) - len(mine)))
            found = {s.label: kept_runs(store, s) for s in mine}
            settled = {
                s.label: [e.settle(s.ids, partial(residuals, adapter)) for e in edits] for s in mine if not found[s.label]
            }
            with surely(capture):
                for s in mine:
                    kept = found.pop(s.label)
                    if kept is None:
                        made = list(zip(names, settled[s.label], strict=True))
                        runs = list(_runs(adapter, capture, s, made, score_from, rows, partial(tick, 1)))
                        kept = runs, {name: str(edit) for name, edit in made if name != str(edit)}
                        keep_runs(store, s, kept)
                        tick(0 if _fits(adapter, s) else layers)
                    else:
                        tick((1 + len(edits)) * layers)
                    effects.add(*kept)
        effects, *others = share.gather(effects)
    for other in others:
        effects.merge(other)
    place = {label: i for i, label in enumerate(corpus.labels)}
    effects.runs.sort(key=lambda run: place[run.text])
    about["texts"] = [{"label": label, "n_tokens": n} for label, n in corpus.labels.items()]
    if effects.located:
        about["located"] = {label: effects.located[label] for label in corpus.labels if label in effects.located}
    if long:
        about["no_clean_run"] = f"texts of more than {adapter.n_ctx} tokens have no unedited run to compare with"
    return EffectReport.assemble(effects, about)


def _fits(adapter: Adapter, sequence: TextTokens) -> bool:
    """Tell whether a text can be run whole, unedited."""
    return adapter.n_ctx is None or len(sequence) <= adapter.n_ctx


def _check(adapter: Adapter, tokens: Tokens, edits: Sequence[Intervention], score_from: int) -> None:
    """Refuse, before anything runs, what can't be done on these texts."""
    for s in tokens.sequences:
        if not 1 <= score_from < len(s):
            raise SinkscopeError(
                f"score_from={score_from}: {s.label!r} has {len(s)} tokens, so the first one scored can be 1 to {len(s) - 1}"
            )
        for edit in edits:
            edit.check(len(s))
    for edit in edits:
        edit.check_model(adapter.layers, adapter.n_heads)


def _check_logits(adapter: Adapter, tokens: Tokens) -> int:
    """Prove on a few tokens that unembedding the last hidden state gives the model's own logits; give how many there are."""
    ids = tokens.sequences[0].ids[None, :8].to(adapter.device)
    with adapter.quiet(), dropping_patterns(adapter):
        own = adapter.own_logits(ids)
        ours = adapter.logits(adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))[0])
    gap = float((own - ours).abs().max())
    if not gap < WRONG.get(adapter.dtype, WRONG_IN_HALF) * max(1.0, float(own.abs().max())):
        raise SinkscopeError(f"the logits of {adapter.name} are not its output layer's alone (they differ by {gap:.2g})")
    return own.shape[-1]


@dataclass
class _Pass:
    """One forward pass over one text: which row of it predicts which original token, and where attention went."""

    edit: Intervention
    hidden: Float[Tensor, "position d_model"]
    row_of: Int[Tensor, " token"]
    mass: float
    sink: int
    sink_token: str


class _Scores:
    """Per token scored: loss of the clean and of the edited run in nats, KL(clean || edited), whether top-1 agrees.

    All memory is taken beforehand: small pieces that stay, between large ones that go, would keep the heap from shrinking.
    """

    def __init__(self, length: int) -> None:
        self.numbers = np.full((4, length), math.nan)
        self.scored = np.zeros(length, dtype=bool)

    def add(self, positions: Tensor, *numbers: Tensor | float) -> None:
        at = positions.numpy()
        self.scored[at] = True
        for row, n in zip(self.numbers, numbers, strict=True):
            row[at] = n.cpu().numpy() if isinstance(n, Tensor) else n

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.scored.nonzero()[0], self.numbers[:, self.scored]


def _runs(
    adapter: Adapter,
    capture: Edited,
    sequence: TextTokens,
    edits: Sequence[tuple[str, Intervention]],
    score_from: int,
    rows: int,
    tick: Any,
) -> Iterator[Run]:
    """Run all edits on one text; beside the unedited pass where the context holds it, else alone, piece by piece.

    `rows` is how many tokens' logits are formed at a time.
    """
    if not _fits(adapter, sequence):
        yield _run(sequence, NO_EDIT, _Pass(NONE, NOTHING, torch.zeros(0, dtype=torch.long), math.nan, -1, ""), _Scores(0))
        for name, edit in edits:
            scores = _Scores(len(sequence))
            made = _pass(adapter, capture, sequence, edit, tick, partial(_score, adapter, sequence, score_from, rows, scores))
            yield _run(sequence, name, made, scores)
        return
    passes = [_pass(adapter, capture, sequence, edit, tick) for edit in (NONE, *(edit for _, edit in edits))]
    for (name, edit), made, scores in zip(
        [(NO_EDIT, NONE), *edits], passes, _compare(adapter, sequence, score_from, rows, passes), strict=True
    ):
        if not scores.scored.any():
            raise SinkscopeError(f"{edit} leaves no token of {sequence.label!r} to be scored")
        yield _run(sequence, name, made, scores)


def _run(sequence: TextTokens, name: str, made: _Pass, scores: _Scores) -> Run:
    positions, (clean, loss, kl, same) = scores.arrays()
    return Run.of(
        sequence.label,
        name,
        positions,
        loss,
        clean,
        kl=mean(kl),
        agreement=mean(same),
        sink_mass=made.mass,
        sink_position=made.sink,
        sink_token=made.sink_token,
    )


def _pass(
    adapter: Adapter,
    capture: Edited,
    sequence: TextTokens,
    edit: Intervention,
    tick: Any,
    at_once: Callable[[int, Tensor], None] | None = None,
) -> _Pass:
    """Run once. `at_once(first position, hidden)` takes pieces that then are not kept."""
    ids, origin = edit.input(sequence.ids)
    strings = tuple(sequence.strings[int(i)] for i in origin)
    (batch,) = Tokens((TextTokens(sequence.label, ids, strings),), "").batches(1, adapter.device)
    pieces, done = [], 0
    for piece in capture.pieces(batch, edit, tick):
        if at_once is None:
            pieces.append(piece)
        else:
            at_once(done, piece)
        done += len(piece)
    received = capture.received / (len(adapter.layers) * adapter.n_heads * len(ids))
    first, same = (origin == 0).nonzero().flatten().tolist(), ids == sequence.ids[origin]
    row_of = torch.full((len(sequence),), -1)
    row_of[origin[same]] = torch.arange(len(ids))[same] - 1
    hidden = torch.cat(pieces) if pieces else NOTHING
    if bool(received.isnan().any()):
        return _Pass(edit, hidden, row_of, math.nan, -1, "")
    top = int(received.argmax())
    return _Pass(
        edit=edit,
        hidden=hidden,
        row_of=row_of,
        mass=float(received[first[0]]) if first else math.nan,
        sink=int(origin[top]),
        sink_token=strings[top] if same[top] else f"(token {int(ids[top])})",
    )


def _score(
    adapter: Adapter, sequence: TextTokens, score_from: int, rows: int, into: _Scores, first: int, hidden: Tensor
) -> None:
    """Score the tokens that a piece predicts; there is no clean run to compare with."""
    end = min(first + len(hidden) + 1, len(sequence))
    targets = torch.arange(min(max(first + 1, score_from), end), end)
    for part in torch.split(targets, rows):
        if len(part):
            q = adapter.logits(hidden[part - 1 - first]).log_softmax(-1)
            loss = -q.gather(1, sequence.ids[part].to(q.device)[:, None])[:, 0]
            into.add(part, math.nan, loss, math.nan, math.nan)


def _compare(adapter: Adapter, sequence: TextTokens, score_from: int, rows: int, passes: Sequence[_Pass]) -> list[_Scores]:
    """Score each pass against the first, some tokens at a time; each is unembedded once.

    A token is scored where it stands in both runs, after at least one other.
    """
    scores = [_Scores(len(sequence)) for _ in passes]
    clean = passes[0]
    for part in torch.split(torch.arange(score_from, len(sequence)), rows):
        truth = sequence.ids[part].to(clean.hidden.device)[:, None]
        p = adapter.logits(clean.hidden[(part - 1).to(clean.hidden.device)]).log_softmax(-1)
        share, clean_loss, best = p.exp(), -p.gather(1, truth)[:, 0], p.argmax(-1)
        scores[0].add(part, clean_loss, clean_loss, 0.0, 1.0)
        for made, into in zip(passes[1:], scores[1:], strict=True):
            row_of = made.row_of[part]
            there = row_of >= 0
            if not bool(there.any()):
                continue
            q = adapter.logits(made.hidden[row_of[there].to(made.hidden.device)]).log_softmax(-1)
            here = there.to(q.device)
            loss = -q.gather(1, truth[here])[:, 0]
            same = best[here] == q.argmax(-1)
            kl = (share[here] * (p[here] - q)).sum(-1) if not bool(there.all()) else (share * q.sub_(p)).sum(-1).neg_()
            into.add(part[there], clean_loss[here], loss, kl, same)
    return scores
