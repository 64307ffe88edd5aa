"""One text under many edits: the clean run once, what it shares with the others once, and edits of one layer in one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from sinkscope.capture import scored
from sinkscope.capture.each import Each
from sinkscope.capture.edited import Edited
from sinkscope.capture.prefix import Prefix, batch_of
from sinkscope.capture.routes import Route
from sinkscope.capture.scored import Passed
from sinkscope.edit import NOTHING, Edit
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.results import NONE, Run
from sinkscope.tokens import TextTokens

#: Tokens of a batch: fewer leave processors idle, more don't make them faster.
TOKENS = {"cpu": 1024, "cuda": 16_384}
#: Runs that are scored together, beside one clean run: at most so many, and so many numbers of their hidden states.
RUNS, NUMBERS = 32, 32 << 20

Tick = Callable[[int], None]


def first_edited(adapter: Adapter, route: Route) -> int:
    """Give the first layer that an edit changes; 0 where the input is another, or the model is not run in one pass."""
    if route.how != "whole" or "input" in route.edit.touches:
        return 0
    return next((layer for layer in range(adapter.n_layers) if route.edit.edits(layer)), 0)


def parts(adapter: Adapter, routes: Sequence[Route], length: int) -> list[list[Route]]:
    """Cut many runs into parts that are scored together; those that begin with the same layer stay so where they fit."""
    most = max(1, min(RUNS, NUMBERS // (length * adapter.width)))
    found: list[list[Route]] = [[]]
    for _, some in groupby(routes, partial(first_edited, adapter)):
        alike = list(some)
        for piece in (alike[at : at + most] for at in range(0, len(alike), most)):
            if len(found[-1]) + len(piece) > most:
                found.append([])
            found[-1] += piece
    return [part for part in found if part]


@dataclass
class Together:
    """The runs of one text.

    Attributes:
        adapter: the model.
        capture: the engine, entered.
        sequence: the text.
        starts: first edited layer -> the layer to begin with; see :func:`sinkscope.capture.prefix.starts`.
        tick: told of every layer that has run, for each text of a batch.
    """

    adapter: Adapter
    capture: Edited
    sequence: TextTokens
    starts: Mapping[int, int]
    tick: Tick
    _prefix: Prefix = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing kept."""
        self._prefix = Prefix(self.adapter)

    def clean(self) -> Passed:
        """Run without an edit, and keep what the others share with it."""
        with self._prefix.keeping(self.starts.values()):
            hidden = self.capture.copies(batch_of(self.sequence, 1, self.adapter), NOTHING, partial(self.tick, 1), 0)
        return self._passed(Route(NONE, NOTHING, "whole"), hidden[0])

    def scored(
        self, clean: Passed, routes: Sequence[Route], score_from: int, vocabulary: int, done: Callable[[float], None]
    ) -> Iterator[Run]:
        """Run edits, and score them beside the clean run; `done(share)` is told how far the scoring is.

        Raises:
            SinkscopeError: an edit leaves nothing to be scored.
        """
        passes = [clean, *self._edited(routes)]
        rows = scored.rows_at_a_time(vocabulary, len(passes))
        scores = scored.beside_clean(self.adapter, self.sequence, score_from, rows, passes, done)
        for made, one in zip(passes[1:], scores[1:], strict=True):
            if not one.scored.any():
                raise SinkscopeError(f"{made.route.edit} leaves no token of {self.sequence.label!r} to be scored")
            yield one.run(self.sequence, made)

    def _edited(self, routes: Sequence[Route]) -> Iterator[Passed]:
        most = max(1, TOKENS.get(self.adapter.device.type, TOKENS["cuda"]) // len(self.sequence))
        for (first, fits), some in groupby(routes, lambda r: (first_edited(self.adapter, r), self._fits(r))):
            alike = list(some)
            size = most if fits else 1
            for batch in (alike[at : at + size] for at in range(0, len(alike), size)):
                if fits or ("input" not in batch[0].edit.touches and batch[0].how == "whole"):
                    yield from self._batch(batch, self.starts[first])
                else:
                    yield scored.passed(self.adapter, self.capture, self.sequence, batch[0], partial(self.tick, 1))

    @staticmethod
    def _fits(route: Route) -> bool:
        return route.how == "whole" and Each.fits(route.edit)

    def _batch(self, routes: Sequence[Route], start: int) -> Iterator[Passed]:
        """Run edits of one layer at once, from that layer on."""
        batch = batch_of(self.sequence, len(routes), self.adapter)
        edits = tuple(route.edit for route in routes)
        edit: Edit = edits[0] if len(edits) == 1 else Each(of=edits)
        with self._prefix.handed_out(start, len(routes)):
            hidden = self.capture.copies(batch, edit, partial(self.tick, len(routes)), start)
        for route, one in zip(routes, hidden, strict=True):
            yield self._passed(route, one)

    def _passed(self, route: Route, hidden: Tensor) -> Passed:
        return Passed(route, hidden, torch.arange(len(self.sequence)) - 1)
