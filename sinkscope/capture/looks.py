"""What an edit may look at before a text is run: the unedited model's residual stream and values, and the next text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sinkscope.capture.edited import Edited
from sinkscope.capture.residuals import residuals
from sinkscope.capture.routes import Route
from sinkscope.capture.there import check_there
from sinkscope.edit import Edit
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter, adapt_side
from sinkscope.runs.undo import surely
from sinkscope.tokens import TextTokens, Tokens


@dataclass(frozen=True)
class Looks:
    """The looks at one text; `capture` is the engine that will edit it, `next` the next text of the call, if there is one."""

    adapter: Adapter
    capture: Edited | None = None
    next: TextTokens | None = None

    def __call__(self, ids: Int[Tensor, " position"], look: Callable[[int, Tensor], Any]) -> list[Any]:
        """Run some ids, look at the residual stream after each layer, and give what was seen."""
        return residuals(self.adapter, ids, look)

    def donor(self) -> tuple[str, Int[Tensor, " position"]]:
        """Give the next text's label and ids.

        Raises:
            SinkscopeError: there is one text alone.
        """
        if self.next is None:
            raise SinkscopeError("by='donor' takes the next text of the call, and there is one text: give several")
        return self.next.label, self.next.ids

    def values(self, ids: Int[Tensor, " position"], keys: Sequence[int]) -> dict[int, Float[Tensor, "kv_head key d_head"]]:
        """Run some ids without an edit, and give every layer's values of some keys, as the engine that edits sees them."""
        if self.capture is None:
            raise SinkscopeError("values are looked at by evaluate alone")
        (batch,) = Tokens((TextTokens("", ids, ("",) * len(ids)),), "").batches(1, self.adapter.device)
        keeper = _Keeper(keys=tuple(keys))
        with surely(self.capture):
            for _ in self.capture.pieces(batch, Route("", keeper, "whole"), lambda: None):
                pass
        return keeper.found


@dataclass(frozen=True)
class _Keeper(Edit):
    """Edits nothing, and keeps the values of some keys."""

    keys: tuple[int, ...] = ()
    found: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        self.found[layer] = values[0, :, list(self.keys)].clone()
        return values


def settled(model: Any, text: Any, edit: Edit, side: str | None) -> Any:
    """Locate in one text what an edit leaves open."""
    adapter = adapt_side(model, side, whole=True)
    check_there(adapter, [edit])
    tokens = adapter.tokenize(text)
    if len(tokens) != 1:
        raise SinkscopeError(f"one text; got {len(tokens)}")
    adapter.check(tokens)
    (one,) = tokens.sequences
    return edit.settle(one.keyed.ids, Looks(adapter.within(one)))
