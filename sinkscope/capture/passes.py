"""Passes: tells when a forward pass of a model begins and ends that others run, and where its tokens stand."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.capture.place import wrapped
from sinkscope.models import Adapter
from sinkscope.runs.owner import mine
from sinkscope.runs.undo import Undo, uninterrupted

#: Called when a pass begins, with its keywords, and what counts the columns in its cache; and when it has ended.
Begin = Callable[[dict[str, Any], Callable[[], int]], None]
End = Callable[[], None]


class Passes:
    """Hooks on the whole model and on all but its head, one of which is always called.

    Passes that this library runs are left out: they are not the user's.
    """

    def __init__(self, adapter: Adapter, begin: Begin, end: End) -> None:
        self.adapter, self.begin, self.end = adapter, begin, end
        self._whole = [adapter.model] if adapter.kind == "hooked_transformer" else adapter.trunks
        self._names = {id(m): list(inspect.signature(type(m).forward).parameters)[1:] for m in self._whole}
        self._here = threading.local()

    def __deepcopy__(self, memo: Any) -> Passes:
        """Stay one, where a model is copied: the copy's passes are not looked at."""
        return self

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Stand by every pass until exit."""
        with Undo() as undo:
            with uninterrupted():
                if self.adapter.kind == "hooked_transformer":  # which calls its own forward past the hooks of torch
                    undo.enter_context(wrapped(self.adapter.model, self._hooked, self._after))
                    first = self.adapter.blocks[0]  # is given the mask and the cache
                    undo.callback(first.register_forward_pre_hook(self._first_block, with_kwargs=True).remove)
                else:
                    for module in self._whole:
                        undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                        undo.callback(module.register_forward_hook(self._after).remove)
            yield

    def _before(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if id(module) not in self._names or torch.compiler.is_compiling() or mine(self.adapter.network):
            return
        inside = getattr(self._here, "inside", None)
        if inside is not None and inside is not module and not self._here.deeper:
            self._here.deeper = True  # the same pass, seen from the whole model and from all but its head
            return
        self._here.inside, self._here.deeper = module, False
        named = given | dict(zip(self._names[id(module)], args, strict=False))
        self.begin(named, lambda: self.adapter.cached(named))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if getattr(self._here, "inside", None) is module:
            self._here.inside = None
            self.end()

    def _hooked(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if not mine(self.adapter.network):
            self._here.inside = module
            self._here.ids = next((x for x in (*args, given.get("input")) if isinstance(x, Tensor)), None)

    def _first_block(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if getattr(self._here, "inside", None) is None:
            return
        entry, ids, stream = given.get("past_kv_cache_entry"), self._here.ids, args[0]
        known = ids is not None and not ids.is_floating_point() and ids.reshape(-1, ids.shape[-1]).shape == stream.shape[:2]
        named = {"input_ids": ids.reshape(stream.shape[:2])} if known else {"inputs_embeds": stream}
        named |= {"attention_mask": given.get("attention_mask")}
        self.begin(named, lambda: 0 if entry is None else int(entry.past_keys.shape[1]))
