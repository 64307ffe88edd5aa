"""A report inside a notebook's cell: its page in a frame, or a picture beside its table."""

from __future__ import annotations

import base64
import html
import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Shown:
    """A page that a notebook displays inside its cell, in a frame that can reach nothing around it."""

    page: str = field(repr=False)
    height: int = 720

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {int(self.height)}px; border: 0"
        return f'<iframe srcdoc="{html.escape(self.page)}" style="{style}" sandbox="allow-scripts"></iframe>'


def inline(figure: Figure | None) -> str:
    """Give a picture as an image that needs no file; nothing where there is none."""
    if figure is None:
        return ""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return f'<img src="data:image/png;base64,{base64.b64encode(png.getvalue()).decode("ascii")}" style="float: right">'
