"""`intervention.on(model)`: any code of the user's under an edit, generation with a KV cache included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sinkscope.capture.attend import NONE, Rotation, attend
from sinkscope.capture.edited import GROUPS, EditedCapture, plan
from sinkscope.capture.flash import FlashCapture, Masks, swapped
from sinkscope.capture.points import POINTS, editing_points
from sinkscope.capture.residuals import editing_residuals
from sinkscope.errors import SinkscopeError
from sinkscope.interventions import Intervention, MeanValue, ReplaceToken
from sinkscope.models import Adapter, adapt
from sinkscope.models.adapter import EDITED
from sinkscope.runs.undo import Undo, surely, uninterrupted
from sinkscope.tokens import TextTokens, Tokens

#: Stands for the length of a text whose end is not known.
ENDLESS = 1 << 40


@contextmanager
def on(model: Any, edit: Intervention) -> Iterator[Any]:
    """Edit every forward pass of a model until exit; yields the model."""
    adapter = adapt(model)
    _check(adapter, edit)
    with _Where(adapter, [part for part in edit.parts() if isinstance(part, ReplaceToken)]) as where, ExitStack() as stack:
        if edit.touches & POINTS.keys():
            stack.enter_context(_attention(adapter, edit, where))
        if "residual" in edit.touches:

            def after(layer: int, residual: Tensor) -> Tensor:
                return edit.residual(layer, residual, where(residual.shape[1])) if edit.edits(layer) else residual

            stack.enter_context(editing_residuals(adapter, after))
        yield model


def _check(adapter: Adapter, edit: Intervention) -> None:
    """Refuse what can't be done without knowing the text."""
    for part in edit.parts():
        if part.touches == {"input"} and not isinstance(part, ReplaceToken):
            raise SinkscopeError(f"{part} makes another input, and scores of its own: change the ids that you give the model")
        if any(k < 0 for name in ("keys", "positions", "position") for k in _all(getattr(part, name, None))):
            raise SinkscopeError(f"{part}: positions from the end are not known before the text is")
        if isinstance(part, MeanValue):
            raise SinkscopeError(f"{part}: the mean over a text is not known before the text is")
        if part.touches == {"residual"} and getattr(part, "dims", None) is None:
            raise SinkscopeError(f"{part} is not located: take edit.located(model, text)")
    edit.check_model(adapter.layers, adapter.n_heads)


def _all(given: Any) -> tuple[int, ...]:
    return () if given is None else (given,) if isinstance(given, int) else given


@contextmanager
def _attention(adapter: Adapter, edit: Intervention, where: _Where) -> Iterator[None]:
    """Edit inside the attention op, or at hook points."""
    ids = torch.arange(1, 9)
    capture = plan(adapter, Tokens((TextTokens("proof", ids, ("",) * len(ids)),), ""), [edit])
    mark = id(adapter.network)
    edited: AbstractContextManager[Any]
    if isinstance(capture, EditedCapture):
        rotation = None if capture.frequencies is None else Rotation(capture.frequencies)
        edited = surely(LiveCapture(adapter, GROUPS, None, "live", edit=edit, rotation=rotation))
    else:
        edited = editing_points(adapter, edit.touches, lambda: edit, lambda: ENDLESS, where=where)
    with edited, Undo() as undo:
        undo.callback(EDITED.discard, mark)
        EDITED.add(mark)
        yield


class _Where:
    """Tells where in the text a forward pass stands, and swaps tokens on their way in."""

    def __init__(self, adapter: Adapter, swaps: Sequence[ReplaceToken]) -> None:
        self.adapter, self.swaps, self.start = adapter, swaps, 0

    def __call__(self, n: int) -> Tensor:
        """Give the positions of the `n` tokens of this pass."""
        return torch.arange(self.start, self.start + n)

    def __enter__(self) -> _Where:
        with Undo() as undo:
            with uninterrupted():
                if self.adapter.kind == "hooked_transformer":  # which calls its own forward past the hooks of torch
                    undo.enter_context(_wrapped(self.adapter.model, self._before))
                else:
                    for module in self.adapter.trunks:
                        undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                if self.swaps:
                    undo.callback(self.adapter.embedding.register_forward_pre_hook(self._swap).remove)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        self._undo.close()

    def _before(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        self.start = self.adapter.cached(given)
        embedded = given.get("inputs_embeds") is not None
        if self.swaps and (embedded or (args and isinstance(args[0], Tensor) and args[0].is_floating_point())):
            raise SinkscopeError(
                "replace_token needs token ids, and was given embeddings (as HookedTransformer.generate does): change the "
                "ids that you give the model"
            )

    def _swap(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = args[0].clone()
        for swap in self.swaps:
            if self.start <= swap.position < self.start + ids.shape[1]:
                ids[:, swap.position - self.start] = swap.token
        return (ids, *args[1:])


@contextmanager
def _wrapped(model: nn.Module, before: Callable[..., None]) -> Iterator[None]:
    """Have a function called before every forward pass, however it is called."""
    forward, kept = model.forward, vars(model).get("forward")

    def told(*args: Any, **given: Any) -> Any:
        before(model, args, given)
        return forward(*args, **given)

    with Undo() as undo:
        if kept is None:
            undo.callback(vars(model).pop, "forward", None)
        else:
            undo.callback(vars(model).__setitem__, "forward", kept)
        vars(model)["forward"] = told
        yield


@dataclass
class LiveCapture(FlashCapture):
    """The engine for a model that others run: layers tell who they are, masks tell where a cache stands."""

    cached: ClassVar[bool] = True
    edit: Intervention = NONE
    rotation: Rotation | None = None
    #: (keys before the first, keys) of layers without a window, and with one, in the pass that runs.
    _held: dict[bool, tuple[int, int]] = field(default_factory=dict, repr=False)

    def __enter__(self) -> LiveCapture:
        """Swap attention; gradients, modes and everything else are the user's."""
        self._undo.enter_context(swapped(self.adapter, self._attend, Masks(self.adapter.causal, self._told)))
        return self

    def _told(self, first: int, held: int, window: int | None) -> None:
        self._held[window is not None] = (first, held)

    def _layer(self, module: nn.Module) -> int:
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise SinkscopeError(f"{type(module).__name__} does not say which layer it is")
        return int(layer)

    def _compute(self, layer: int, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        kinds = [self._held[k] for k in (given["window"] is not None, False, True) if k in self._held]
        first, held = kinds[0] if kinds else (0, -1)  # a model with one kind of layer makes one kind of mask
        if held != key.shape[2]:
            raise SinkscopeError(
                f"layer {layer} has {key.shape[2]} keys, not those of its mask: use a dynamic cache, and a 2-D attention_mask"
            )
        at = torch.arange(first, first + held)
        return attend(self.edit, layer, query, key, value, at, ENDLESS, given, self.rotation)[0]
