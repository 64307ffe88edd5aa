"""What is the same in many runs, computed once: each layer before the edited one hands out what it gave in the clean run.

A layer asks, as a rule, for nothing but the residual stream that the one before gives. Where a family hands on something
else as well, such as the keys of an earlier layer, the last hidden state is another: so it is proved on a few tokens, layer
by layer, and what is not proved is run.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from sinkscope.capture.edited import Edited
from sinkscope.capture.proof import tolerance
from sinkscope.edit import NOTHING
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Batch, TextTokens, Tokens

#: Tokens and copies of the proof.
TOKENS, COPIES = 8, 2
#: What a layer may raise that was not given all that it needs.
MISSING = (SinkscopeError, TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError)


class Prefix:
    """What layers gave in the clean run of one text, to be handed out again."""

    def __init__(self, adapter: Adapter) -> None:
        self._blocks = adapter.blocks
        self._kept: dict[int, Any] = {}

    @contextmanager
    def keeping(self, firsts: Collection[int]) -> Iterator[None]:
        """Keep what the layers before these give, in the run inside."""

        def kept(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **how: Any) -> Any:
                self._kept[layer] = forward(*args, **how)
                return self._kept[layer]

            return run

        blocks = self._blocks[: max(firsts, default=0)]
        with _instead(blocks, [kept(layer, block.forward) for layer, block in enumerate(blocks)]):
            yield

    @contextmanager
    def handed_out(self, first: int, copies: int) -> Iterator[None]:
        """Have each layer before `first` give at once, for so many copies of the text, what it gave; its hooks still fire."""

        def given(layer: int) -> Callable[..., Any]:
            return lambda *args, **how: _copied(self._kept[layer], copies)

        with _instead(self._blocks[:first], list(map(given, range(first)))):
            yield


@contextmanager
def _instead(blocks: Sequence[nn.Module], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Have functions called in place of what modules compute."""
    with Undo() as undo:
        with uninterrupted():
            for block, function in zip(blocks, functions, strict=True):
                own = vars(block).get("forward")  # of a model that somebody has wrapped
                put_back = partial(vars(block).pop, "forward", None)
                undo.callback(put_back if own is None else partial(vars(block).__setitem__, "forward", own))
                vars(block)["forward"] = function
        yield


def _copied(output: Any, copies: int) -> Any:
    """Repeat what a layer gave for one text: a stream, or several things, of which None stays None."""
    if isinstance(output, Tensor):
        return output.expand(copies, *output.shape[1:])
    if isinstance(output, tuple | list):
        return type(output)(_copied(part, copies) for part in output)
    return output


def batch_of(sequence: TextTokens, copies: int, adapter: Adapter) -> Batch:
    """Give copies of one text as a batch."""
    (batch,) = Tokens((sequence,) * copies, "").batches(copies, adapter.device)
    return batch


def starts(adapter: Adapter, capture: Edited, sequence: TextTokens, firsts: Collection[int]) -> dict[int, int]:
    """Tell at which layer a run may begin whose first edited layer is one of these: at itself where that is proved.

    Returns:
        First edited layer -> the last layer up to it that may be begun with; 0 where all must be run.
    """
    few = sequence.first(TOKENS)
    one, several = (batch_of(few, copies, adapter) for copies in (1, COPIES))
    prefix, idle = Prefix(adapter), _idle
    with prefix.keeping(firsts):
        expected = capture.copies(one, NOTHING, idle, 0).float()
    wrong = tolerance(adapter)
    wrong = wrong / 100 if wrong < 1e-2 else wrong  # in float32 the very same numbers are added in another order
    proved = {0}
    for first in set(firsts) - proved:
        try:
            with prefix.handed_out(first, COPIES):
                found = capture.copies(several, NOTHING, idle, first).float()
        except MISSING:
            continue
        if float((found - expected).abs().mean() / expected.abs().mean()) < wrong:
            proved.add(first)
    return {first: max(start for start in proved if start <= first) for first in firsts}


def _idle() -> None:
    """Count nothing."""
