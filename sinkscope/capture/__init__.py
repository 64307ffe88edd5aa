"""Engines: model + tokens -> blocks. Each leaves the model exactly as it found it, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sinkscope.capture import chunks, proof
from sinkscope.capture.blocks import OnBlock
from sinkscope.capture.engine import Capture as Engine
from sinkscope.errors import SinkscopeError, unknown
from sinkscope.models import Adapter
from sinkscope.models.adapting import WRAP
from sinkscope.tokens import Batch, Tokens

#: What `engine=` takes.
ENGINES = ("auto", "flash", "hooks")


@runtime_checkable
class Capture(Protocol):
    """What an engine offers: entered once, run once per batch."""

    @property
    def name(self) -> str:
        """The engine's name."""
        ...

    @property
    def why(self) -> str:
        """Why this one."""
        ...

    @property
    def chunk(self) -> int | None:
        """Query rows per step, or None for one shot."""
        ...

    def __enter__(self) -> Capture:
        """Prepare the model."""
        ...

    def __exit__(self, *how: Any) -> None:
        """Restore the model."""
        ...

    def close(self) -> None:
        """Restore the model, if it is not."""
        ...

    def run(self, batch: Batch, on_block: OnBlock, tick: Callable[[], None], formed: bool = True) -> Tensor:
        """Run the model's body once and hand every block to `on_block`, calling `tick` after each layer.

        `formed` is False where no metric looks at a pattern itself.

        Returns the last hidden state.
        """
        ...


def choose(
    engine: str, adapter: Adapter, groups: frozenset[frozenset[str]], chunk: int | str | None, tokens: Tokens
) -> Engine:
    """Pick the engine that can run these metrics on this model.

    Args:
        engine: `"auto"` (flash where it is proved exact, else hooks) or an engine's name.
        adapter: the model.
        groups: what blocks must carry, one set per group of metrics.
        chunk: query rows per step of a chunked prefill, None, or `"auto"`; anything but `"auto"` asks for `hooks`.
        tokens: what will be run.

    Raises:
        SinkscopeError: no such engine, or one that can't run this.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    plain = not adapter.shows_patterns
    if engine == "hooks" and plain:
        raise SinkscopeError(
            f"{adapter.name} is a plain Hugging Face model, which has no hooks on attention: leave engine out (flash), or "
            f"wrap it, {WRAP}"
            if adapter.kind == "hugging_face"
            else f"TransformerLens has no hook on the attention pattern of {adapter.name}: leave engine out (flash)"
        )
    if engine == "flash" and chunk not in ("auto", None):
        raise SinkscopeError(f"chunk={chunk!r} belongs to engine='hooks'; flash forms no pattern to cut: leave it out")
    why = "a chunk was asked for"
    if engine == "flash" or plain or (engine == "auto" and chunk == "auto"):
        capture = proof.plan(adapter, groups, tokens)
        if not isinstance(capture, str):
            return capture
        why = capture
        if engine == "flash" or plain:
            out = "Leave engine out, or pass engine='hooks'."
            if plain:
                wrap = f"If TransformerLens knows its class, wrap it, {WRAP}; or r"
                own = (
                    "educe what Hugging Face's own model gives with output_attentions=True: ss.metrics.of_pattern(attentions)"
                )
                out = f"{wrap if adapter.kind == 'hugging_face' else 'R'}{own}"
            raise SinkscopeError(f"engine 'flash' can't run this on {adapter.name}: {why}. {out}")
    if adapter.gates and any("gate" in group for group in groups):
        raise SinkscopeError(
            f"output gates of {adapter.name}, which a metric needs, are read by engine flash alone: {why}. Leave out what "
            "asks for another engine, or gate_mean, gate_closed, sink_output_share and nop_rate"
        )
    if adapter.side is not None:
        proof.check_patterns(adapter, tokens)
    hooks = chunks.plan(adapter, groups, chunk, tokens)
    if engine == "auto":
        hooks.why += f"; not flash: {why}"
    return hooks
