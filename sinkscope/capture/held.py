"""Keys and values as queries see them: as they are, or the copies that a cache holds of them from some query on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.capture.op import scores_of
from sinkscope.capture.stream import Rotation, turn
from sinkscope.edit import Edit


@dataclass(frozen=True)
class Held:
    """The keys or the values of a layer."""

    states: Float[Tensor, "batch kv_head key d"]
    copies: Float[Tensor, "batch kv_head key d"] | None = None
    first: Int[Tensor, " key"] | None = None

    @classmethod
    def of(cls, edit: Edit, layer: int, what: str, states: Tensor, at: Tensor, rotation: Rotation | None = None) -> Held:
        """Ask an edit; where it holds keys as they are before rotary positions, they are turned back, and forth again."""
        turned = rotation is not None and edit.unrotated(layer)
        by = at.to(states.device)
        before = turn(states, -by, rotation.frequencies) if turned and rotation is not None else states
        found = edit.held(layer, what, before, at)
        if found is None:
            return cls(states)
        copies, first = found
        return cls(states, turn(copies, by, rotation.frequencies) if turned and rotation is not None else copies, first)

    def seen(self, rows: Tensor, pick: Any) -> Bool[Tensor, "query key"] | None:
        """Tell which copies some queries see; None where there are none."""
        return None if self.first is None else (rows[:, None] >= self.first[pick]).to(self.states.device)

    def scores(self, query: Tensor, pick: Any, rows: Tensor, given: dict[str, Any]) -> Float[Tensor, "batch head query key"]:
        """Score some of these keys."""
        pick, seen = self._here(pick), self.seen(rows, pick)
        scores = scores_of(query, self.states[:, :, pick], given["scale"], given["softcap"])
        if seen is None or self.copies is None:
            return scores
        return torch.where(seen, scores_of(query, self.copies[:, :, pick], given["scale"], given["softcap"]), scores)

    def mixed(
        self, weights: Float[Tensor, "batch head query key"], pick: Any, rows: Tensor
    ) -> Float[Tensor, "batch head query d"]:
        """Sum some of these values by their weights; grouped ones are not expanded."""
        pick, seen = self._here(pick), self.seen(rows, pick)
        if seen is None or self.copies is None:
            return _mixed(weights, self.states[:, :, pick])
        return _mixed(weights * seen, self.copies[:, :, pick]) + _mixed(weights * ~seen, self.states[:, :, pick])

    def _here(self, pick: Any) -> Any:
        return pick.to(self.states.device) if isinstance(pick, Tensor) else pick


def _mixed(weights: Tensor, values: Tensor) -> Tensor:
    b, h, n, keys = weights.shape
    grouped = weights.view(b, values.shape[1], -1, keys) @ values.to(weights.dtype)
    return grouped.view(b, h, n, -1)
