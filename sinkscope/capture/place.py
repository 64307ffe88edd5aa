"""Where in the text the forward pass of a model stands that others run: past its cache, behind no pads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.errors import InertHookError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.runs.undo import Undo, uninterrupted

#: How batches are refused whose texts do not begin in column 0.
LEFT = "texts padded on the left can't be edited: pad on the right, or run one by one"
ELSEWHERE = (
    "tokens whose position_ids are not their columns (packed texts, or generation after padded ones) can't be edited: give "
    "each text a row of its own, and generate from texts of one length"
)


class Place:
    """Tells where in the text a forward pass stands, refuses texts that begin elsewhere, and swaps tokens on their way in."""

    def __init__(self, adapter: Adapter, swaps: tuple[tuple[int, int], ...]) -> None:
        self.adapter, self.swaps, self.start, self.swapped = adapter, swaps, 0, 0
        self.inside: nn.Module | None = None  # which of the modules that are stood by runs

    def __call__(self, n: int) -> Tensor:
        """Give the positions of the `n` tokens of this pass."""
        return torch.arange(self.start, self.start + n)

    def __enter__(self) -> Place:
        """Stand by every forward pass."""
        with Undo() as undo:
            with uninterrupted():
                if self.adapter.kind == "hooked_transformer":  # which calls its own forward past the hooks of torch
                    undo.enter_context(wrapped(self.adapter.model, self._before))
                    first = self.adapter.blocks[0]  # is given the mask that is made of padded strings
                    undo.callback(first.register_forward_pre_hook(_refuse_left, with_kwargs=True).remove)
                else:
                    for module in self.adapter.trunks:
                        undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                if self.swaps:
                    undo.callback(self.adapter.embedding.register_forward_pre_hook(self._swap).remove)
            if self.swaps:
                self._prove()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *how: Any) -> None:
        """Stand by no more."""
        self._undo.close()

    def _prove(self) -> None:
        """See to it that tokens are swapped: a model that was compiled before may pass hooks by.

        (What it runs for one shape of ids says nothing of another: each was compiled at its time.)

        Raises:
            InertHookError: they are not.
        """
        inert = InertHookError(
            f"replace_token would do nothing on {self.adapter.name}: its compiled forward passes hooks by. Change the "
            "ids that you give the model, or edit the model that was not compiled (._orig_mod)"
        )
        if any(_compiled(m) and self.adapter.embedding in m.modules() for m in self.adapter.network.modules()):
            raise inert
        ids = torch.ones(1, 4, dtype=torch.long, device=self.adapter.device)
        runs: list[Callable[[Tensor], Any]] = [*self.adapter.trunks]
        if self.adapter.kind == "hooked_transformer":
            runs = [self.adapter.model]
        elif self.adapter.side is not None:
            runs = [lambda ids: self.adapter.body(ids, torch.ones_like(ids, dtype=torch.bool))]
        for run in runs:
            self.swapped = 0
            with torch.no_grad():
                run(ids)
            if not self.swapped:
                raise inert

    def _before(self, module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        self.start, self.inside = self.adapter.cached(given), module
        _refuse_elsewhere(given, self.start)
        _refuse_elsewhere({"attention_mask": given.get("encoder_attention_mask")}, 0)
        floating = bool(args) and isinstance(args[0], Tensor) and args[0].is_floating_point()
        if self.swaps and self._swaps_here and (floating or given.get("inputs_embeds") is not None):
            raise SinkscopeError(
                "replace_token needs token ids, and was given embeddings (as HookedTransformer.generate does): change the "
                "ids that you give the model"
            )

    @property
    def _swaps_here(self) -> bool:
        """Whether the module that runs is the one whose ids are swapped, of the two stacks of an encoder-decoder."""
        return self.adapter.side is None or self.inside is self.adapter.trunk

    def _swap(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not self._swaps_here:
            return args
        self.swapped += 1
        ids = args[0].clone()
        for position, token in self.swaps:
            if self.start <= position < self.start + ids.shape[1]:
                ids[:, position - self.start] = token
        return (ids, *args[1:])


def _compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `module.compile()` or by a forward that was."""
    return vars(module).get("_compiled_call_impl") is not None or hasattr(module.forward, "_torchdynamo_orig_callable")


def _refuse_left(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
    _refuse_elsewhere({"attention_mask": given.get("attention_mask")}, 0)


def check_begins(mask: Tensor) -> None:
    """Refuse texts that do not begin in column 0 of a mask `[batch, position]`.

    Raises:
        SinkscopeError: some do not.
    """
    if bool((mask.int().diff(dim=-1) > 0).any()):
        raise SinkscopeError(LEFT)


def _refuse_elsewhere(given: dict[str, Any], start: int) -> None:
    """Refuse rows whose text does not begin in column 0: positions would be counted from a pad, or from another text."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if real is not None:
        check_begins(real)
    if isinstance(positions, Tensor) and positions.ndim == 2:
        n = positions.shape[1]
        moved = positions != torch.arange(start, start + n, device=positions.device)
        if bool((moved if real is None else moved & real[:, -n:].to(moved.device)).any()):
            raise SinkscopeError(ELSEWHERE)


@contextmanager
def wrapped(model: nn.Module, before: Callable[..., None], after: Callable[..., None] = lambda *_: None) -> Iterator[None]:
    """Have functions called before and after every forward pass, however it is called."""
    forward, kept = model.forward, vars(model).get("forward")

    def told(*args: Any, **given: Any) -> Any:
        before(model, args, given)
        output = forward(*args, **given)
        after(model, args, output)
        return output

    with Undo() as undo:
        if kept is None:
            undo.callback(vars(model).pop, "forward", None)
        else:
            undo.callback(vars(model).__setitem__, "forward", kept)
        vars(model)["forward"] = told
        yield
