"""`edit.on(model)`: any code of the user's under an edit, generation with a KV cache included."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.capture.attend import attend
from sinkscope.capture.call import Calls
from sinkscope.capture.edited import InsideCapture
from sinkscope.capture.masks import STATIC, Masks
from sinkscope.capture.neurons import editing_neurons, neurons_of
from sinkscope.capture.place import Place
from sinkscope.capture.plans import plan
from sinkscope.capture.points import ATTENTION, editing_points
from sinkscope.capture.residuals import editing_residuals
from sinkscope.capture.stream import Rotation
from sinkscope.capture.swap import swapped
from sinkscope.capture.there import check_there
from sinkscope.edit import FROM_THE_END, NOTHING, WHOLE_TEXT, Edit
from sinkscope.errors import SinkscopeError
from sinkscope.models import Adapter, adapt_side
from sinkscope.models.adapting import EDITED, WATCHED
from sinkscope.runs.owner import alone
from sinkscope.runs.undo import Undo, uninterrupted
from sinkscope.tokens import Tokens

#: Stands for the length of a text whose end is not known.
ENDLESS = 1 << 40


@contextmanager
def on(model: Any, edit: Edit, side: str | None = None) -> Iterator[Any]:
    """Edit every forward pass of a model until exit, on one side of an encoder-decoder; yields the model."""
    adapter = adapt_side(model, side, whole=True)
    adapter.check_run_once("edits")
    check_there(adapter, [edit])
    for part in edit.parts():
        why = part.why_not_live()
        if why is not None and not _comes_whole(adapter, part, why):
            raise SinkscopeError(f"{part}: {why}")
    edit.check_model(adapter.heads)
    mark, listeners = id(adapter.network), list[Any]()
    if WATCHED[mark] and edit.touches & ATTENTION:
        raise SinkscopeError(
            "this model is inside `with ss.watch(model)`, which would not see what is edited now: enter the edit first, "
            "with edit.on(model), ss.watch(model) as seen: ..."
        )
    few = adapter.few()
    attention, neurons = _attention(adapter, few, edit, listeners), neurons_of(adapter.beside(few.sequences[0]), [edit])
    adapter = adapter.within(few.sequences[0])
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


def _comes_whole(adapter: Adapter, part: Edit, why: str) -> bool:
    """Tell an edit of a source, which is known to its end: of its keys, and in the encoder of its queries."""
    if adapter.side == "encoder":
        return why in (FROM_THE_END, WHOLE_TEXT) and part.touches <= ATTENTION
    return adapter.side == "cross" and why in (FROM_THE_END, WHOLE_TEXT) and not (part.at_queries or "output" in part.touches)


def _attention(
    adapter: Adapter, few: Tokens, edit: Edit, listeners: list[Any]
) -> Callable[[Place], AbstractContextManager[Any]] | None:
    """Plan edits of attention: inside the attention op, whose weights listeners are shown, or at hook points; or None."""
    if not edit.touches & ATTENTION:
        return None
    capture = plan(adapter, few, [edit])
    if not isinstance(capture, InsideCapture):
        return lambda place: editing_points(adapter, edit.touches, lambda: edit, lambda: ENDLESS, where=place)
    rotation = None if capture.frequencies is None else Rotation(capture.frequencies)

    def edited(place: Place) -> AbstractContextManager[Any]:
        op = _Op(edit, place, adapter.side, rotation, listeners)
        return swapped(adapter, Calls(adapter, op, op.plainly, live=True), Masks.of(adapter, live=True), lean=False)

    return edited


@dataclass
class _Op:
    """The edited attention of a model that others run: `place` tells where a cache stands."""

    edit: Edit
    place: Place
    side: str | None
    rotation: Rotation | None
    listeners: list[Callable[[int, Tensor, Tensor, Tensor], None]]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        at, length, look = self._at(query, key, given), ENDLESS, partial(self._show, layer)
        if self.side in ("encoder", "cross"):
            length = self._checked(key.shape[2], given)
        crossing = self.place(query.shape[2]) if self.side == "cross" else None
        return attend(self.edit, layer, query, key, value, at, length, given, self.rotation, look, crossing)[0]

    def plainly(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        """Attend on another side than the edited one, so that gradients flow; the decoder's own may have a cache."""
        at, crossing = self._at(query, key, given), None if given["causal"] else torch.arange(query.shape[2])
        return attend(NOTHING, layer, query, key, value, at, ENDLESS, given, crossing=crossing)[0]

    def _at(self, query: Tensor, key: Tensor, given: dict[str, Any]) -> Tensor:
        """Give the positions of the keys: a source's are all there, a cache holds the latest."""
        held = key.shape[2]
        stop = self.place.start + query.shape[2] if given["causal"] else held
        if stop < held:
            raise SinkscopeError(STATIC)
        return torch.arange(stop - held, stop)

    def _checked(self, length: int, given: dict[str, Any]) -> int:
        """Give the length of a source, once it is known to have what is edited."""
        for part in self.edit.parts():
            if part.why_not_live() is not None and given["key_mask"] is not None:
                raise SinkscopeError(f"{part} needs a source's end, and there are pads behind some: give them one by one")
            if self.side == "encoder" or not part.at_queries:
                part.check(length)
        return length

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
