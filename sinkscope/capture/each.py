"""Each: several edits at once, one for each text of a batch; so one forward pass runs what would take several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sinkscope.edit import Edit

#: What edits may touch that share a batch: what a text is told from the others in.
TOUCHES = frozenset({"scores", "pattern", "values", "output", "residual"})


@dataclass(frozen=True)
class Each(Edit):
    """As many edits as there are texts in a batch; not all can be among them, see `fits`."""

    of: tuple[Edit, ...] = ()

    @staticmethod
    def fits(edit: Edit) -> bool:
        """Tell whether an edit may be one of several: it reaches every key, and touches no input, cache or neuron."""
        return not edit.is_window and edit.touches <= TOUCHES

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
        found = self._asked(layer, lambda edit: edit.hides(layer, queries, keys, heads, length))
        return _stacked(found, (heads, len(queries), keys.shape[1]), torch.bool, keys.device)

    def biases(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Give biases for each text."""
        found = self._asked(layer, lambda edit: edit.biases(layer, keys, heads, length))
        return _stacked(found, (heads, 1, len(keys)), torch.float32, keys.device)

    def zeroes(self, layer: int, keys: Tensor, heads: int, length: int) -> Tensor | None:
        """Give a mask for each text."""
        found = self._asked(layer, lambda edit: edit.zeroes(layer, keys, heads, length))
        return _stacked(found, (heads, 1, len(keys)), torch.bool, keys.device)

    def values(self, layer: int, values: Tensor, keys: Tensor, heads: int, length: int) -> Tensor:
        """Edit each text's; where one needs values for every head that queries, all have them."""
        return self._split(layer, values, lambda edit, part: edit.values(layer, part, keys, heads, length))

    def outputs(self, layer: int, outputs: Tensor, queries: Tensor) -> Tensor:
        """Edit each text's."""
        return self._split(layer, outputs, lambda edit, part: edit.outputs(layer, part, queries))

    def residual(self, layer: int, residual: Tensor, positions: Tensor) -> Tensor:
        """Edit each text's."""
        return self._split(layer, residual, lambda edit, part: edit.residual(layer, part, positions))

    def _asked(self, layer: int, ask: Callable[[Edit], Tensor | None]) -> list[Tensor | None]:
        return [ask(edit) if edit.edits(layer) else None for edit in self.of]

    def _split(self, layer: int, whole: Tensor, change: Callable[[Edit, Tensor], Tensor]) -> Tensor:
        parts = zip(self.of, torch.split(whole, 1), strict=True)
        changed = [change(edit, part) if edit.edits(layer) else part for edit, part in parts]
        wide = max(part.shape[1] for part in changed)  # heads: one for each that queries, where an edit needs them
        if any(part.shape[1] < wide for part in changed):
            changed = [part.repeat_interleave(wide // part.shape[1], 1) for part in changed]
        return torch.cat(changed)


def _stacked(
    found: Sequence[Tensor | None], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Stack what each answers, zeros where one answers nothing."""
    if all(part is None for part in found):
        return None
    nothing = torch.zeros(1, 1, 1, dtype=dtype, device=device)
    return torch.stack([(nothing if part is None else part.to(device, dtype)).expand(shape) for part in found])
