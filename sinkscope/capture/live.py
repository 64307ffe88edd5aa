"""`edit.on(model)`: any code of the user's under an edit, generation with a KV cache included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.capture.attend import attend
from sinkscope.capture.call import Calls
from sinkscope.capture.edited import InsideCapture
from sinkscope.capture.masks import Masks
from sinkscope.capture.neurons import editing_neurons, neurons_of
from sinkscope.capture.place import Place
from sinkscope.capture.plans import plan
from sinkscope.capture.points import ATTENTION, editing_points
from sinkscope.capture.residuals import editing_residuals
from sinkscope.capture.stream import Rotation
from sinkscope.capture.swap import swapped
from sinkscope.edit import Edit
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter, adapt
from sinkscope.models.adapting import EDITED, WATCHED
from sinkscope.runs.owner import alone
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import TextTokens, Tokens

#: Stands for the length of a text whose end is not known.
ENDLESS = 1 << 40


@contextmanager
def on(model: Any, edit: Edit) -> Iterator[Any]:
    """Edit every forward pass of a model until exit; yields the model."""
    adapter = adapt(model)
    adapter.check_run_once("edits")
    for part in edit.parts():
        why = part.why_not_live()
        if why is not None:
            raise SinkscopeError(f"{part}: {why}")
    edit.check_model(adapter.heads)
    mark, listeners = id(adapter.network), list[Any]()
    if WATCHED[mark] and edit.touches & ATTENTION:
        raise SinkscopeError(
            "this model is inside `with ss.watch(model)`, which would not see what is edited now: enter the edit first, "
            "with edit.on(model), ss.watch(model) as seen: ..."
        )
    attention, neurons = _attention(adapter, edit, listeners), neurons_of(adapter, [edit])
    with Undo() as undo:
        with alone(adapter.network):
            place = undo.enter_context(Place(adapter, edit.swaps()))
            if attention is not None:
                undo.enter_context(attention(place))
                undo.callback(EDITED.pop, mark, None)
                EDITED[mark] = listeners
            if "residual" in edit.touches:

                def after(layer: int, residual: Tensor) -> Tensor:
                    return edit.residual(layer, residual, place(residual.shape[1])) if edit.edits(layer) else residual

                undo.enter_context(editing_residuals(adapter, after))
            if neurons:
                undo.enter_context(editing_neurons(adapter, neurons, lambda: edit))
            undo.enter_context(_not_copied(adapter))
            edited = undo.pop_all()
        try:
            yield model
        finally:
            with alone(adapter.network):
                edited.close()


def _attention(adapter: Adapter, edit: Edit, listeners: list[Any]) -> Callable[[Place], AbstractContextManager[Any]] | None:
    """Plan edits of attention: inside the attention op, whose weights listeners are shown, or at hook points; or None."""
    if not edit.touches & ATTENTION:
        return None
    ids = torch.arange(1, 9)
    capture = plan(adapter, Tokens((TextTokens("proof", ids, ("",) * len(ids)),), ""), [edit])
    if not isinstance(capture, InsideCapture):
        return lambda place: editing_points(adapter, edit.touches, lambda: edit, lambda: ENDLESS, where=place)
    op = _Op(edit, None if capture.frequencies is None else Rotation(capture.frequencies), listeners)
    return lambda place: swapped(adapter, Calls(adapter, op, live=True), Masks.of(adapter, op.told))


@dataclass
class _Op:
    """The edited attention of a model that others run: masks tell where a cache stands."""

    edit: Edit
    rotation: Rotation | None
    listeners: list[Callable[[int, Tensor, Tensor, Tensor], None]]
    #: (keys before the first, keys) of layers without a window, and with one, in the pass that runs.
    held: dict[bool, tuple[int, int]] = field(default_factory=dict)

    def told(self, first: int, held: int, window: int | None) -> None:
        self.held[window is not None] = (first, held)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        kinds = [self.held[k] for k in (given["window"] is not None, False, True) if k in self.held]
        first, held = kinds[0] if kinds else (0, -1)  # a model with one kind of layer makes one kind of mask
        if held != key.shape[2]:
            raise SinkscopeError(
                f"layer {layer} has {key.shape[2]} keys, not those of its mask: use a dynamic cache "
                "(transformers.DynamicCache(), not a static one), and a 2-D attention_mask"
            )
        at = torch.arange(first, first + held)
        look = partial(self._show, layer)
        return attend(self.edit, layer, query, key, value, at, ENDLESS, given, self.rotation, look)[0]

    def _show(self, layer: int, rows: Tensor, reach: Tensor, weights: Tensor) -> None:
        for listen in self.listeners:
            listen(layer, rows, reach, weights)


@contextmanager
def _not_copied(adapter: Adapter) -> Iterator[None]:
    """Refuse deep copies of an edited model: they would keep what is undone here."""

    def refuse(memo: Any) -> Any:
        raise SinkscopeError("this model is inside `with intervention.on(model)`: copy it before or after")

    inside: list[nn.Module] = [] if adapter.kind == "hooked_transformer" else adapter.trunks
    with Undo() as undo:
        with uninterrupted():
            for module in dict.fromkeys([adapter.model, *inside]):
                undo.callback(vars(module).pop, "__deepcopy__", None)
                vars(module)["__deepcopy__"] = refuse
        yield
