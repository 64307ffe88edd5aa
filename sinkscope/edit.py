"""Edit: all that an engine asks of an intervention. Every answer is "nothing" by default.

Beside :mod:`sinkscope.block` this is the other contract of the library: engines know edits and no intervention, and an
intervention is an edit with a text form. Positions are those of the text, ascending; `edits(layer)` has been asked before
anything that takes a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.errors import SinkscopeError

#: One whole number or several, or None for all of them; kept as a tuple.
Where = Any
#: A whole number of any type; kept as an int.
Whole = Any
#: Looks at `(layer, residual stream after it)`.
Look = Callable[[int, Float[Tensor, "position d_model"]], Any]
#: Why an edit can't be made in code that others run; the first two do not hold of sources, which come whole.
FROM_THE_END = "positions from the end are not known before the text is"
WHOLE_TEXT = "what it takes from the whole text is not known before the text is: evaluate it"
OTHER_INPUT = "it makes another input, and scores of its own: change the ids that you give the model"


@runtime_checkable
class Residuals(Protocol):
    """What an edit may look at before a text is run."""

    def __call__(self, ids: Int[Tensor, " position"], look: Look) -> list[Any]:
        """Run some ids, have a function look at the residual stream after each layer, and give what it saw."""
        ...

    def donor(self) -> tuple[str, Int[Tensor, " position"]]:
        """Give the label and the ids of the next text of the call; the last one's next is the first."""
        ...

    def values(self, ids: Int[Tensor, " position"], keys: Sequence[int]) -> dict[int, Float[Tensor, "kv_head key d_head"]]:
        """Run some ids without an edit, and give every layer's values of some keys."""
        ...


@dataclass(frozen=True)
class Edit:
    """One edit to the forward pass; `layers` are the layers that are edited, None for all."""

    layers: Where = field(default=None, kw_only=True)

    #: Whether it says which keys a cache still holds; one edit of that kind at most makes sense.
    is_window: ClassVar[bool] = False
    #: What it edits: "input", "scores", "pattern", "values", "keys" or "rotated keys" (as a cache holds them), "output" (of a
    #: head), "neurons" or "residual". A model may discard some.
    touches: ClassVar[frozenset[str]] = frozenset()
    #: Whether the positions that it names are those of queries, not of keys.
    at_queries: ClassVar[bool] = False
    #: Whether its settling looks at another text of the call.
    borrows: ClassVar[bool] = False

    def parts(self) -> tuple[Edit, ...]:
        """Give the edits that this one is composed of."""
        return (self,)

    # Before anything runs.

    def check(self, length: int) -> None:
        """Refuse what a text of this length can't have.

        Raises:
            SinkscopeError: names the range.
        """

    def check_model(self, heads: Mapping[int, int]) -> None:
        """Refuse layers and heads that a model has not: `heads` says how many each layer with attention has.

        Raises:
            SinkscopeError: names those there are.
        """
        outside = [layer for layer in self.layers or () if layer not in heads]
        if outside:
            raise SinkscopeError(f"{self}: layers {outside}; those with attention are {min(heads)} to {max(heads)}")
        for layer, n in heads.items():
            missing = [h for h in self.named_heads() if not 0 <= h < n] if self.edits(layer) else []
            if missing:
                few = f"; name layers= with more than the {n} of layer {layer}" if n < max(heads.values()) else ""
                raise SinkscopeError(f"{self}: heads {missing}; the heads are 0 to {n - 1}{few}")

    def named_heads(self) -> tuple[int, ...]:
        """Give the heads that it names; none where it edits all."""
        return ()

    def why_not_live(self) -> str | None:
        """Say what must be known of a whole text beforehand, so that nobody's running code can be edited so; or None."""
        return None

    def settle(self, ids: Int[Tensor, " position"], residuals: Residuals) -> Edit:
        """Give the concrete edit for one text; `residuals` looks at what it does to the unedited model."""
        return self

    # The input.

    def input(self, ids: Int[Tensor, " position"]) -> tuple[Int[Tensor, " position"], Int[Tensor, " position"]]:
        """Give the ids to run, and for each the position that it had in the text."""
        return ids, torch.arange(len(ids))

    def swaps(self) -> tuple[tuple[int, int], ...]:
        """Give (position, token id) of tokens that are swapped on their way in, whatever the rest of the text."""
        return ()

    def rerun(self) -> int | None:
        """Give how many tokens the model is run on anew for every token, or None for one pass over all."""
        return None

    # Attention.

    def edits(self, layer: int) -> bool:
        """Tell whether this layer is edited."""
        return self.layers is None or layer in self.layers

    def reach(self, layer: int, start: int, stop: int) -> Int[Tensor, " key"]:
        """Give every key that queries `start` to `stop` may see, ascending; the others are not even looked at."""
        return torch.arange(stop)

    def hides(
        self, layer: int, queries: Int[Tensor, "query 1"], keys: Int[Tensor, "1 key"], heads: int, length: int
    ) -> Bool[Tensor, "*head query key"] | None:
        """Tell which keys are hidden before softmax; the library lets a query always see itself."""
        return None

    def biases(self, layer: int, keys: Int[Tensor, " key"], heads: int, length: int) -> Float[Tensor, "*head 1 key"] | None:
        """Give what is added to the scores of keys before softmax."""
        return None

    def zeroes(self, layer: int, keys: Int[Tensor, " key"], heads: int, length: int) -> Bool[Tensor, "head 1 key"] | None:
        """Tell which weights become zero after softmax."""
        return None

    def values(
        self,
        layer: int,
        values: Float[Tensor, "batch kv_head key d_head"],
        keys: Int[Tensor, " key"],
        heads: int,
        length: int,
    ) -> Float[Tensor, "batch any_head key d_head"]:
        """Give the values to use, for keys at these positions of a text of this length.

        As many heads as came, or one for each of the `heads` that query, where some of those that share values are edited.
        """
        return values

    def held(
        self, layer: int, what: str, states: Float[Tensor, "batch kv_head key d_head"], keys: Int[Tensor, " key"]
    ) -> tuple[Tensor, Int[Tensor, " key"]] | None:
        """Give the copies of keys or values (`what`) that a cache holds, and for each the first query that sees it.

        Earlier queries see what came; where the two are the same, what counts is the copy.
        """
        return None

    def unrotated(self, layer: int) -> bool:
        """Tell whether the cache holds keys as they are before rotary positions."""
        return False

    def outputs(
        self, layer: int, outputs: Float[Tensor, "batch head query d_head"], queries: Int[Tensor, " query"]
    ) -> Tensor:
        """Give the heads' outputs to use, before the output projection, of queries at these positions."""
        return outputs

    def cache(self, layer: int) -> tuple[int, int] | None:
        """Give (size, sinks) where positions are those inside a cache of that size, else None."""
        return None

    def evicts(self) -> int | None:
        """Give the size of a plain window in every layer, which never looks back at what it has evicted, else None."""
        return None

    # Behind attention.

    def mlp(self, layer: int, activations: Float[Tensor, "*position d_mlp"]) -> Tensor:
        """Give the activations of an MLP's neurons to use: what its last matrix takes."""
        return activations

    def residual(
        self, layer: int, residual: Float[Tensor, "batch position d_model"], positions: Int[Tensor, " position"]
    ) -> Tensor:
        """Give the residual stream to use after a layer."""
        return residual


#: No edit at all.
NOTHING = Edit()
