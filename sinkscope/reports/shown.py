"""A report inside a notebook's cell."""

from __future__ import annotations

import html
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Shown:
    """A page that a notebook displays inside its cell, in a frame that can reach nothing around it."""

    page: str = field(repr=False)
    height: int = 720

    def _repr_html_(self) -> str:
        style = f"width: 100%; height: {int(self.height)}px; border: 0"
        return f'<iframe srcdoc="{html.escape(self.page)}" style="{style}" sandbox="allow-scripts"></iframe>'
