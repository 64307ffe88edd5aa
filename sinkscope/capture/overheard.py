"""Overheard: the attention rows of a model that others run, found beside what runs, which is not touched.

Hugging Face's modules look their attention function up; while somebody listens, what they find calls that very function
with the very same arguments, and then looks at the queries and keys. So outputs, gradients and caches keep their bits. What
a function makes of queries and keys is not taken for granted: on each layer's first pass its last row is computed once more,
and compared with what it gave. A bridge that attends by itself shows its pattern at a hook; an edit shows its weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sinkscope.capture.attended import Attended, Pattern, Rows
from sinkscope.capture.call import Calls
from sinkscope.capture.hooks import hooked
from sinkscope.capture.layout import Layout
from sinkscope.capture.proof import tolerance
from sinkscope.errors import InertHookError, MetricError, SinkscopeError
from sinkscope.models import Adapter
from sinkscope.models.adapting import EDITED, WATCHED
from sinkscope.models.identity import text_model
from sinkscope.models.versions import check_lookup, looks_up
from sinkscope.runs.undo import Undo, uninterrupted

#: What is raised where a pass can't be read: it is told, and the user's code goes on.
UNREADABLE = (SinkscopeError, TypeError, ValueError, RuntimeError, AttributeError, LookupError)
#: Takes (layer, index of the first query in this pass, how many there are, the rows).
Take = Callable[[int, int, int, Rows], None]
#: Told why a layer can't be read.
Refuse = Callable[[str], None]


class Overheard:
    """Listens to one model: hands the rows of every layer over, piece by piece, while a pass is looked at."""

    def __init__(self, adapter: Adapter, whole: bool, take: Take, refuse: Refuse) -> None:
        """Get ready.

        Args:
            adapter: the model.
            whole: whether whole rows are needed.
            take: takes rows.
            refuse: takes why a layer's rows can't be told.

        Raises:
            InertHookError: nothing would be heard; says what to do.
            VersionError: a plain model's transformers is too old.
        """
        self.adapter, self.whole, self.take, self.refuse = adapter, whole, take, refuse
        self.inside = {id(module) for module in text_model(adapter.network).modules()}
        self.proved: set[int] = set()
        self._here = threading.local()
        adapter.check_run_once("watch and edits")
        edited = EDITED.get(id(adapter.network))
        if adapter.kind == "hugging_face" and edited is None:
            check_lookup()
        settable = getattr(type(adapter.network), "_can_set_attn_implementation", lambda: True)
        if adapter.kind == "hooked_encoder" or (adapter.kind == "hugging_face" and edited is None and not settable()):
            raise InertHookError(
                f"the attention of {adapter.name} can't be watched: a {type(adapter.model).__name__} computes it by "
                "itself. Watch it inside a TransformerBridge (ss.load_model(name))"
            )

    def __deepcopy__(self, memo: Any) -> Overheard:
        """Stay one, where a model is copied: the copy's attention is not listened to."""
        return self

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Listen until exit."""
        mark = id(self.adapter.network)
        with Undo() as undo:
            with uninterrupted():
                undo.callback(WATCHED.subtract, [mark])
                WATCHED[mark] += 1
                if mark in EDITED:
                    undo.callback(EDITED[mark].remove, self._edited)
                    EDITED[mark].append(self._edited)
                undo.callback(_listen, self, False)
                _listen(self, True)
                if self.adapter.shows_patterns:
                    make = partial(partial, self._shown)
                    undo.enter_context(hooked(self.adapter, {"pattern": "attn.hook_pattern"}, lambda layer, _: make(layer)))
            yield

    def begin(self, layout: Layout | None) -> None:
        """Look at the pass that begins, or at none until the next."""
        self._here.layout, self._here.calls, self._here.layers = layout, 0, set[int]()

    def _look(self, look: Callable[[Layout], None]) -> None:
        """Look at something of the pass that runs, if it is looked at; what can't be read is told, not raised."""
        layout = getattr(self._here, "layout", None)
        if layout is None:
            return
        try:
            with torch.no_grad():
                look(layout)
        except MetricError:
            raise
        except UNREADABLE as error:
            self._here.layout = None
            kind = "" if isinstance(error, SinkscopeError) else f"{type(error).__name__}: "
            self.refuse(f"{kind}{str(error)[:200]}")

    def heard(self, name: str, module: nn.Module, given: tuple[Any, ...], more: dict[str, Any], output: Any) -> None:
        """Look at a call of the attention function, after it."""
        if id(module) in self.inside:
            self._look(partial(self._heard, name, module, given, more, output))

    def _heard(self, name: str, module: nn.Module, given: Any, more: dict[str, Any], output: Any, layout: Layout) -> None:
        layers = self.adapter.layers
        says = getattr(module, "layer_idx", None)
        layer = layers[self._here.calls % len(layers)] if says is None else int(says)
        self._here.calls += 1
        if self._first(layer):
            call = Attended.of(name, module, given, more, layout.total)
            if torch.is_autocast_enabled(call.q.device.type):
                with torch.autocast(call.q.device.type, enabled=False):  # it would lower the products of any statistic
                    self._read(layer, call, more, output)
            else:
                self._read(layer, call, more, output)

    def _first(self, layer: int) -> bool:
        """Tell whether a layer comes for the first time in this pass."""
        first = layer in self.adapter.layers and layer not in self._here.layers
        self._here.layers.add(layer)
        return first

    def _read(self, layer: int, call: Attended, more: dict[str, Any], output: Any) -> None:
        if layer not in self.proved and not more.get("dropout"):
            gap = call.misses(output[0].detach())
            if not gap < tolerance(self.adapter):
                raise SinkscopeError(f"layer {layer} attends otherwise than by its scores: its output differs by {gap:.2g}")
            self.proved.add(layer)
        for start, count, rows in call.rows(self.whole):
            self.take(layer, start, count, rows)

    def _shown(self, layer: int, value: Tensor, hook: Any) -> None:
        """Look at the pattern that a bridge shows."""
        self._look(partial(self._pattern, layer, value.detach()))

    def _pattern(self, layer: int, value: Tensor, layout: Layout) -> None:
        chosen = self.adapter.chosen
        if chosen is not None and value.shape[3] > chosen:
            raise SinkscopeError(f"a bridge does not show which {chosen} keys an indexer chooses for each query")
        if self._first(layer):
            self.take(layer, 0, value.shape[2], Pattern(value, max(0, layout.total - value.shape[3])))

    def _edited(self, layer: int, rows: Tensor, reach: Tensor, weights: Tensor) -> None:
        """Look at the weights that an edit has made, of keys in reach."""
        self._look(partial(self._block, layer, rows, reach, weights))

    def _block(self, layer: int, rows: Tensor, reach: Tensor, weights: Tensor, layout: Layout) -> None:
        whole = weights.new_zeros(*weights.shape[:3], int(rows[-1]) + 1)
        whole.index_copy_(3, reach.to(weights.device), weights)
        self.take(layer, int(rows[0]) - layout.cached, len(rows), Pattern(whole))


#: Who listens. Held for a moment alone, to change it.
_LISTENERS: list[Overheard] = []
_CHANGE = threading.Lock()


def _listen(who: Overheard, begin: bool) -> None:
    """Begin or end to listen: while anybody does, a lookup of an attention function finds it with listeners beside."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    with _CHANGE:
        if begin:
            _LISTENERS.append(who)
            if looks_up():
                vars(FUNCTIONS)["get_interface"] = partial(_looked_up, type(FUNCTIONS).get_interface, FUNCTIONS)
        elif who in _LISTENERS:
            _LISTENERS.remove(who)
            if not _LISTENERS:
                vars(FUNCTIONS).pop("get_interface", None)


def _looked_up(look_up: Callable[..., Any], functions: Any, name: str, default: Any) -> Any:
    function = look_up(functions, name, default)
    return function if isinstance(function, Calls) or torch.compiler.is_compiling() else partial(_beside, name, function)


def _beside(name: str, function: Any, module: nn.Module, *given: Any, **more: Any) -> Any:
    output = function(module, *given, **more)
    for who in list(_LISTENERS):
        who.heard(name, module, given, more, output)
    return output
