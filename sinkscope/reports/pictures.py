"""The pictures of a SinkReport: each gives matplotlib Axes, to be shown or saved by the caller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.errors import SinkscopeError, unknown
from sinkscope.results import ALL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Pictures:
    """What a report can be drawn as."""

    frame: pd.DataFrame
    about: dict[str, Any]
    attention: pd.DataFrame | None

    def heatmap(
        self,
        metric: str = "sink_mass",
        *,
        text: str = ALL,
        ax: Axes | None = None,
        vmin: float | None = None,
        vmax: float | None = None,
    ) -> Axes:
        """Draw a metric by layer and head; `vmin` and `vmax` give several pictures one scale."""
        from sinkscope.reports import plots

        return plots.heatmap(self.frame, metric, text=text, ax=ax, vmin=vmin, vmax=vmax)

    def progression(self, metric: str = "sink_mass", *, ax: Axes | None = None, label: str | None = None) -> Axes:
        """Draw a metric over layers, with its null and the band across texts; `label` is its name beside other curves."""
        from sinkscope.reports import plots

        return plots.progression(self.frame, metric, ax=ax, label=label)

    def positions(self, metric: str = "position_profile", *, text: str | None = None, ax: Axes | None = None) -> Axes:
        """Draw where attention lands over positions, position 0 marked, uniform attention beside it."""
        from sinkscope.reports import plots

        return plots.positions(self.frame, text=text, metric=metric, ax=ax)

    def distribution(self, metric: str = "sink_mass", *, text: str = ALL, ax: Axes | None = None) -> Axes:
        """Draw how a metric is distributed over heads."""
        from sinkscope.reports import plots

        return plots.distribution(self.frame, metric, text=text, ax=ax)

    def attention_heatmap(self, *, ax: Axes | None = None) -> Axes:
        """Draw who looks at whom in the one short text whose attention was kept.

        Raises:
            SinkscopeError: none was kept; says how to get one.
        """
        from sinkscope.reports import plots

        if self.attention is None:
            raise SinkscopeError(
                "this report keeps no attention map: plots.attention(ss.attention_map(model, text)) draws one; --out adds one"
            )
        return plots.attention(self.attention, ax=ax)

    def grid(
        self,
        metric: str = "received_profile",
        *,
        text: str | None = None,
        layer: int | None = None,
        image: Any = None,
        ax: Axes | None = None,
    ) -> Axes:
        """Draw what each patch of an image receives, where it lies; [CLS] and registers apart.

        Args:
            metric: one with a value per key position.
            text: an image's label; None takes the mean over images where all have the same patches, else the first.
            layer: one layer; None averages over all.
            image: the image, laid below, as `[height, width, 3]`, `[3, height, width]` or `[height, width]`.
            ax: where to draw; a new figure without it.

        Raises:
            SinkscopeError: positions that are no patches, or whose names were not kept; no such metric, text or layer.
        """
        from sinkscope.reports import plots

        text, names = self._places(text)
        if not names:
            raise SinkscopeError("this report keeps no names of positions: measure(..., per_text=True) keeps them")
        return plots.grid(self.frame, names, metric, text=text, layer=layer, image=image, ax=ax)

    def figures(self) -> dict[str, Figure]:
        """Draw everything that this report can be drawn as: file stem -> matplotlib Figure."""
        from sinkscope.reports import plots

        text, names = self._places(None)
        return plots.figures(self.frame, self.attention, patches=(text, names) if plots.is_grid(names) else None)

    def _places(self, text: str | None) -> tuple[str, list[str]]:
        """Give a text's label and its tokens; of all texts, those of the first."""
        named = {t["label"]: list(t.get("tokens", [])) for t in self.about["texts"]}
        first = next(iter(named), ALL)
        if text is None:
            text = ALL if len(set(map(tuple, named.values()))) == 1 else first
        if text != ALL and text not in named:
            raise unknown("text in this report", text, [ALL, *named])
        return text, named.get(first if text == ALL else text, [])
