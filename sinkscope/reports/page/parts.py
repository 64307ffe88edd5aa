"""What every page is made with: the templates' environment, facts in words, pictures inside the page.

Token texts and labels come from anywhere: jinja escapes them, the script writes them as `textContent` only,
and a page's content security policy lets no other script run and nothing be loaded.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sinkscope.reports.drawing import visible

TITLES = {"bos": "first token (BOS)", "causal": "causal attention", "dtype": "number type"}
TITLES |= {"engine_why": "why this engine", "n_layers": "number of layers", "n_heads": "heads per layer"}
TITLES["heads"] = "heads by layer"


def environment() -> Environment:
    """Set the templates up: everything escaped, nothing undefined, no invisible characters."""
    made = Environment(
        loader=PackageLoader("sinkscope.reports.page", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda out: visible(out) if isinstance(out, str) and not isinstance(out, Markup) else out,
    )
    made.filters["number"] = number
    made.filters["sha256"] = _sha256
    made.filters["folded"] = lambda rows: [(kind, list(of)) for kind, of in groupby(rows, key=lambda row: row["kind"])]
    made.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return made


def number(value: float | None) -> str:
    """Write a number with three digits, a dash for what is not known."""
    return "\N{EN DASH}" if value is None or math.isnan(value) else f"{value:.3g}"


def _sha256(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def facts(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All of meta that has no place of its own, in words."""
    found = {TITLES.get(key, key.replace("_", " ")): value for key, value in meta.items()}
    found |= {f"argument: {key}": value for key, value in found.pop("arguments", {}).items()}
    found = {key: value for key, value in found.items() if key not in ("texts", "sentences", "placebos", "notes")}
    return [(name, _words(value)) for name, value in found.items()]


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    known = {"true": "yes", "false": "no", "null": "none", "{}": "none"}
    return value if isinstance(value, str) else known.get(text := json.dumps(value, ensure_ascii=False), text)


def picture(draw: Callable[..., Any]) -> str:
    """Draw a PNG, in base64."""
    from matplotlib.figure import Figure

    figure, picture = Figure(figsize=(7, 4), layout="constrained"), io.BytesIO()
    draw(ax=figure.add_subplot())
    figure.savefig(picture, format="png", dpi=160)
    return base64.b64encode(picture.getvalue()).decode("ascii")
