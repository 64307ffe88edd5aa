"""Engines: model + tokens -> blocks. Each leaves the model exactly as it found it, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, runtime_checkable

from sinkscope.block import Block
from sinkscope.capture import chunks
from sinkscope.errors import unknown
from sinkscope.models import Adapter
from sinkscope.tokens import Batch, Tokens

OnBlock = Callable[[Block, frozenset[str]], None]


@runtime_checkable
class Capture(Protocol):
    """What an engine offers: entered once, run once per batch."""

    name: str
    why: str
    chunk: int | None

    def __enter__(self) -> Capture:
        """Prepare the model."""
        ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Restore the model."""
        ...

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None]) -> None:
        """Run the model's body once and hand every block to `on_block`, calling `tick` after each layer."""
        ...


def choose(
    engine: str, adapter: Adapter, groups: frozenset[frozenset[str]], chunk: int | str | None, tokens: Tokens
) -> Capture:
    """Pick the engine that can run these metrics on this model.

    Args:
        engine: `"auto"` or an engine's name.
        adapter: the model.
        groups: what blocks must carry, one set per group of metrics.
        chunk: query rows per step of a chunked prefill, None, or `"auto"`.
        tokens: what will be run.

    Raises:
        SinkscopeError: no such engine, or one that can't run this.
    """
    if engine not in ("auto", "hooks"):
        raise unknown("engine", engine, ["auto", "hooks"])
    return chunks.plan(adapter, groups, chunk, tokens)
