"""Each: several edits at once, one for each text of a batch; so one forward pass runs what would take several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkscope.edit import Edit


@dataclass(frozen=True)
class Each(Edit):
    """As many edits as there are texts in a batch. Windows and edits of the input can't be among them: see `fits`."""

    of: tuple[Edit, ...] = ()

    @staticmethod
    def fits(edit: Edit) -> bool:
        """Tell whether an edit may be one of several: it reaches every key, and leaves the input as it is."""
        return not edit.is_window and "input" not in edit.touches

    @property
    def touches(self) -> frozenset[str]:  # type: ignore[override]
        """What any of them touches."""
        return frozenset().union(*(edit.touches for edit in self.of))

    def __str__(self) -> str:
        """Give all text forms."""
        return " | ".join(map(str, self.of))

    def edits(self, layer: int) -> bool:
        """Tell whether any of them edits the layer."""
        return any(edit.edits(layer) for edit in self.of)

    def hides(self, layer: int, queries: Tensor, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Give a mask for each text."""
        nothing = torch.zeros(1, 1, 1, dtype=torch.bool, device=keys.device)
        shape = (heads, len(queries), keys.shape[1])
        return self._masks(layer, lambda edit: edit.hides(layer, queries, keys, heads, length), nothing, shape)

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Give a mask for each text."""
        nothing = torch.zeros(1, 1, 1, dtype=torch.bool, device=keys.device)
        return self._masks(layer, lambda edit: edit.zeroes(layer, keys, heads, length), nothing, (heads, 1, len(keys)))

    def values(self, layer: int, values: Tensor, keys: Tensor, length: int) -> Tensor:
        """Edit each text's."""
        return self._split(layer, values, lambda edit, part: edit.values(layer, part, keys, length))

    def residual(self, layer: int, residual: Tensor, positions: Tensor) -> Tensor:
        """Edit each text's."""
        return self._split(layer, residual, lambda edit, part: edit.residual(layer, part, positions))

    def _masks(
        self, layer: int, ask: Callable[[Edit], Tensor | None], nothing: Tensor, shape: tuple[int, int, int]
    ) -> Tensor | None:
        """Stack what each answers; one that edits another layer hides nothing."""
        found = [ask(edit) if edit.edits(layer) else None for edit in self.of]
        if all(mask is None for mask in found):
            return None
        return torch.stack([(nothing if mask is None else mask).expand(shape) for mask in found])

    def _split(self, layer: int, whole: Tensor, change: Callable[[Edit, Tensor], Tensor]) -> Tensor:
        parts = zip(self.of, torch.split(whole, 1), strict=True)
        changed = [change(edit, part) if edit.edits(layer) else part for edit, part in parts]
        return torch.cat(changed)
