"""From last hidden states to losses: each edited pass beside the clean one, token by token, logits never whole.

Logits cost more than attention does: tokens x vocabulary, and a weight matrix that is read anew for every product. So the
states of all passes at some positions are unembedded in one product, of as many rows as it takes to run at full speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.edited import Edited
from sinkscope.capture.routes import Route
from sinkscope.models import Adapter
from sinkscope.results import Run, mean
from sinkscope.tokens import TextTokens, Tokens

#: Rows of logits at a time, over all passes: fewer would wait for the weights; more, up to `NUMBERS`, where they are short.
ROWS, NUMBERS = 400, 4 << 20
#: Numbers of one run that a processor's cache holds while they are gone through again and again: of a GPU, all of them.
CACHED = 2_000_000
NO_STATES = torch.zeros(0, 0)


@dataclass
class Passed:
    """One forward pass over one text: which row of it predicts which original token, and where attention went."""

    route: Route
    hidden: Float[Tensor, "position d_model"]
    row_of: Int[Tensor, " token"]
    mass: float = math.nan
    sink: int = -1
    sink_token: str = ""

    @classmethod
    def nothing(cls, route: Route) -> Passed:
        """Stand for a run that the context does not hold."""
        return cls(route, NO_STATES, torch.zeros(0, dtype=torch.long))


class Scores:
    """Per token scored: loss of the clean and of the edited run in nats, KL(clean || edited), whether top-1 agrees.

    All memory is taken beforehand: small pieces that stay, between large ones that go, would keep the heap from shrinking.
    """

    def __init__(self, length: int) -> None:
        self.numbers = np.full((4, length), math.nan)
        self.scored = np.zeros(length, dtype=bool)

    def add(self, positions: Tensor, *numbers: Tensor | float) -> None:
        """Add the numbers of some tokens."""
        at = positions.numpy()
        self.scored[at] = True
        for row, n in zip(self.numbers, numbers, strict=True):
            row[at] = n.cpu().numpy() if isinstance(n, Tensor) else n

    def run(self, sequence: TextTokens, made: Passed) -> Run:
        """Put a pass and its scores on record."""
        clean, loss, kl, same = self.numbers[:, self.scored]
        return Run.of(
            sequence.label,
            made.route.name,
            self.scored.nonzero()[0],
            loss,
            clean,
            kl=mean(kl),
            agreement=mean(same),
            sink_mass=made.mass,
            sink_position=made.sink,
            sink_token=made.sink_token,
        )


def passed(
    adapter: Adapter,
    capture: Edited,
    sequence: TextTokens,
    route: Route,
    tick: Callable[[], None],
    at_once: Callable[[int, Tensor], None] | None = None,
) -> Passed:
    """Run once. `at_once(first position, hidden)` takes pieces that then are not kept."""
    text, across = sequence.keyed, sequence.keyed is not sequence  # whose positions are edited: it, or its source
    ids, origin = route.edit.input(text.ids)
    strings = tuple(text.strings[int(i)] for i in origin)
    edited = replace(text, ids=ids, strings=strings)
    (batch,) = Tokens((replace(sequence, source=edited) if across else edited,), "").batches(1, adapter.device)
    pieces, done = [], 0
    for piece in capture.pieces(batch, route, tick):
        if at_once is None:
            pieces.append(piece)
        else:
            at_once(done, piece)
        done += len(piece)
    queries = len(sequence if adapter.side == "cross" else ids)
    received = capture.received / (sum(adapter.heads.values()) * queries)
    first, same = (origin == 0).nonzero().flatten().tolist(), ids == text.ids[origin]
    row_of = torch.arange(len(sequence)) - 1
    if not across:
        row_of = torch.full((len(sequence),), -1)
        row_of[origin[same]] = torch.arange(len(ids))[same] - 1
    hidden = torch.cat(pieces) if pieces else NO_STATES
    if bool(received.isnan().any()):
        return Passed(route, hidden, row_of)
    top = int(received.argmax())
    return Passed(
        route,
        hidden,
        row_of,
        mass=float(received[first[0]]) if first else math.nan,
        sink=int(origin[top]),
        sink_token=strings[top] if same[top] else f"(token {int(ids[top])})",
    )


def in_layers(adapter: Adapter, vocabulary: int) -> int:
    """Give how many layers take as long as unembedding, for a bar: a layer has about 12 width squared weights."""
    return max(1, round(vocabulary / (12 * adapter.width)))


def rows_at_a_time(vocabulary: int, passes: int) -> int:
    """Give how many tokens of each of some passes are unembedded at a time."""
    return max(1, max(ROWS, NUMBERS // vocabulary) // passes)


def alone(
    adapter: Adapter, sequence: TextTokens, score_from: int, rows: int, into: Scores, first: int, hidden: Tensor
) -> None:
    """Score the tokens that a piece predicts; there is no clean run to compare with."""
    end = min(first + len(hidden) + 1, len(sequence))
    targets = torch.arange(min(max(first + 1, score_from), end), end)
    for part in torch.split(targets, rows):
        if len(part):
            logits = adapter.logits(hidden[part - 1 - first])
            truth = logits.gather(1, sequence.ids[part].to(logits.device)[:, None])[:, 0]
            into.add(part, math.nan, logits.logsumexp(-1) - truth, math.nan, math.nan)


def beside_clean(
    adapter: Adapter,
    sequence: TextTokens,
    score_from: int,
    rows: int,
    passes: Sequence[Passed],
    done: Callable[[float], None],
) -> list[Scores]:
    """Score each pass against the first, some tokens at a time; `done(share)` is told how far it is.

    A token is scored where it stands in both runs, after at least one other.
    """
    scores = [Scores(len(sequence)) for _ in passes]
    targets = torch.arange(score_from, len(sequence))
    room = adapter.room(min(rows, len(targets)) * len(passes))
    for part in torch.split(targets, rows):
        _score(adapter, sequence, part, passes, scores, room)
        done((int(part[-1]) + 1 - score_from) / len(targets))
    return scores


def _score(
    adapter: Adapter,
    sequence: TextTokens,
    part: Tensor,
    passes: Sequence[Passed],
    scores: Sequence[Scores],
    room: Tensor | None,
) -> None:
    """Score some tokens of every pass; their logits are gone, or overwritten in the room, when the next ones' are made."""
    there = [made.row_of[part] >= 0 for made in passes]
    states = [made.hidden[made.row_of[part][here].to(made.hidden.device)] for made, here in zip(passes, there, strict=True)]
    logits = torch.split(adapter.logits(torch.cat(states), room), [len(s) for s in states])
    clean = logits[0]
    step = len(part) if clean.is_cuda else max(1, min(len(part), CACHED // clean.shape[1]))
    aside = clean.new_empty(2, step, clean.shape[1])
    for start in range(0, len(part), step):
        few = slice(start, start + step)
        now = [_rows(mine, here, few) for mine, here in zip(logits, there, strict=True)]
        _compare(sequence, part[few], [here[few] for here in there], now, scores, aside)


def _rows(logits: Tensor, there: Tensor, few: slice) -> Tensor:
    """Give the rows of logits that are of a few tokens; there are rows of those alone that are `there`."""
    first = int(there[: few.start].sum())
    return logits[first : first + int(there[few].sum())]


def _compare(
    sequence: TextTokens,
    tokens: Tensor,
    there: Sequence[Tensor],
    logits: Sequence[Tensor],
    scores: Sequence[Scores],
    room: Float[Tensor, "2 token vocabulary"],
) -> None:
    """Score some tokens of every run, each against the first; `room` is for what is computed on the way."""
    clean, *edited = logits
    truth = sequence.ids[tokens].to(clean.device)[:, None]
    known = _Known.of(clean, truth, room[0])
    scores[0].add(tokens, known.loss, known.loss, 0.0, 1.0)
    for mine, here, into in zip(edited, there[1:], scores[1:], strict=True):
        if len(mine):
            on = here.to(mine.device)
            into.add(tokens[here], known.loss[on], *known.compare(mine, truth, on, room[1]))


@dataclass
class _Known:
    """The clean run at some tokens: logits, their log-sum-exp, probabilities, loss and first choice."""

    logits: Float[Tensor, "token vocabulary"]
    lse: Float[Tensor, " token"]
    share: Float[Tensor, "token vocabulary"]
    loss: Float[Tensor, " token"]
    best: Int[Tensor, "token 1"]

    @classmethod
    def of(cls, logits: Tensor, truth: Tensor, room: Tensor) -> _Known:
        best, raised, total = _exponentials(logits, room)
        lse = best[:, 0] + total.log()
        loss = lse - logits.gather(1, truth)[:, 0]
        return cls(logits, lse, raised.div_(total[:, None]), loss, logits.argmax(-1, keepdim=True))

    def compare(self, logits: Tensor, truth: Tensor, on: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give loss, KL(clean || edited) and agreement of an edited run, which is `on` at some of these tokens."""
        whole = bool(on.all())
        clean, share, clean_lse, best = (x if whole else x[on] for x in (self.logits, self.share, self.lse, self.best))
        most, _, total = _exponentials(logits, room)
        lse = most[:, 0] + total.log()
        loss = lse - logits.gather(1, truth[on])[:, 0]
        same = (logits.gather(1, best) == most)[:, 0]
        apart = torch.linalg.vecdot(share, logits.sub_(clean))  # differences of logits first: they are small
        return loss, lse - clean_lse - apart, same


def _exponentials(logits: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give each row's largest logit, exp(logits - the largest) and their sum, which make a log-sum-exp and a softmax."""
    most = logits.amax(-1, keepdim=True)
    raised = torch.sub(logits, most, out=room[: len(logits)]).exp_()
    return most, raised, raised.sum(-1)
