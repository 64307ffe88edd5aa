"""How each edit will be run on a text: decided once, before anything runs; everything after it follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sinkscope.edit import NOTHING, Edit
from sinkscope.models import Adapter

#: `whole`: one pass over the text. `streamed`: a piece at a time, with what its caches still hold; no bound on the length.
#: `rerun`: the model anew on a window, for every token.
How = Literal["whole", "streamed", "rerun"]


@dataclass(frozen=True)
class Route:
    """One edit on texts of one length; `name` is what it is called where it was asked for."""

    name: str
    edit: Edit
    how: How

    def settled(self, edit: Edit) -> Route:
        """Go the same way with what the edit turned out to be on one text."""
        return Route(self.name, edit, self.how)


@dataclass(frozen=True)
class Routes:
    """All edits on texts of one length; `clean` is the unedited run, where the context holds it."""

    clean: Route | None
    edited: tuple[Route, ...]

    @property
    def unbounded(self) -> bool:
        """Whether every edit can run a text that the context does not hold."""
        return all(route.how == "streamed" for route in self.edited)

    @property
    def turns(self) -> bool:
        """Whether positions are moved into a cache."""
        return any(route.how == "streamed" for route in self.edited)


def routes(adapter: Adapter, edits: Sequence[tuple[str, Edit]], length: int, clean: str) -> Routes:
    """Decide how named edits are run on a text of some tokens; `clean` names the run without an edit."""
    fits = adapter.n_ctx is None or length <= adapter.n_ctx
    ways = tuple(Route(name, edit, way(adapter, edit, length)) for name, edit in edits)
    return Routes(Route(clean, NOTHING, "whole") if fits else None, ways)


def way(adapter: Adapter, edit: Edit, length: int) -> How:
    """Tell how an edit is run on a text of some tokens.

    A streaming window in every layer is streamed; so is a plain window, on a text past the context of a rotary model, where
    it is a streaming window without sinks. Both only beside edits of attention.
    """
    size = edit.rerun()
    if size is not None and size < length:
        return "rerun"
    if any(part.touches not in ({"scores"}, {"pattern"}) for part in edit.parts()):
        return "whole"
    if all(edit.cache(layer) is not None for layer in adapter.layers):
        return "streamed"
    beyond = adapter.n_ctx is not None and length > adapter.n_ctx
    return "streamed" if beyond and edit.evicts() is not None and bool(adapter.rotations) else "whole"
