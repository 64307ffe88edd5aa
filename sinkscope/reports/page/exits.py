"""The exits of a page's data: a page of its own, a fragment for notebooks, JSON, Markdown."""

from __future__ import annotations

import hashlib
import json
import re
from functools import cache
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from sinkscope.reports.page.parts import environment, number

#: What starts the script: in the document, or in the shadow root of the first of a fragment's places that has none yet.
IN_PAGE = 'start(document, JSON.parse(document.getElementById("data").textContent));'
IN_PLACE = """const host = [...document.querySelectorAll('[data-report="NAME"]')].find(place => !place.shadowRoot);
const root = host.attachShadow({mode: "open"});
root.append(host.querySelector("template").content.cloneNode(true));
start(root, JSON.parse(host.querySelector("script").textContent));"""
#: The script's parts, in the order in which they rest on each other.
PARTS = (
    "tools",
    "keys",
    "grid",
    "chart",
    "numbers",
    "heads",
    "patterns",
    "explorer",
    "patches",
    "strip",
    "edits",
    "sweep",
    "compare",
    "main",
)
TITLES = {"measure": "Attention sinks in {model}", "evaluate": "{model} under interventions", "compare": "Reports compared"}
TITLES["sweep"] = "{edit} at the {over} of {model}"


def render(data: dict[str, Any]) -> str:
    """Give a page of its own: one file that needs no network, no server and no library."""
    return _fill("page.html.j2", data, IN_PAGE, main="main", banner="header", region=_region)


def snippet(data: dict[str, Any]) -> str:
    """Give a fragment for somebody else's page, such as a notebook; in a shadow root, so that neither disturbs the other."""
    name = hashlib.sha256(as_json(data).encode()).hexdigest()[:16]
    # A page has landmarks of its own: a fragment adds none.
    plain = {"main": "div", "banner": "div", "region": lambda heading: ""}
    return _fill("snippet.html.j2", data, IN_PLACE.replace("NAME", name), name=name, **plain)


def as_json(data: dict[str, Any]) -> str:
    """Give the data themselves; `docs/report_schema.md` says what every key means."""
    return json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def markdown(data: dict[str, Any]) -> str:
    """Give the numbers as Markdown, for an issue or an appendix."""
    lines = [f"## {_plain(title(data))}", "", *(f"- {_plain(said)}" for said in data.get("sentences", []))]
    lines += [*(f"- Note: {_plain(note)}" for note in data.get("notes", [])), ""]
    lines += {"measure": _numbers, "evaluate": _edits, "sweep": _places, "compare": _compared}[data["kind"]](data)
    shown = [f"- {_plain(name)}: {_plain(value)}" for name, value in data.get("facts", [])]
    return "\n".join([*lines, "", *shown]).strip() + "\n"


def title(data: dict[str, Any]) -> str:
    """Say what the page is of."""
    return TITLES[data["kind"]].format(**{name: data.get(name, "") for name in ("model", "edit", "over")})


@cache
def script() -> str:
    """Give all parts of the script as one, modules no more: its imports are names of the same scope."""
    whole = "\n".join(read(f"{part}.js") for part in PARTS)
    whole = re.sub(r"^import [^;]*;\n", "", whole, flags=re.MULTILINE)
    return re.sub(r"^export ", "", whole, flags=re.MULTILINE)


def read(name: str) -> str:
    """Read a file that lies beside this one."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _fill(template: str, data: dict[str, Any], starting: str, **more: Any) -> str:
    whole = Markup(f'"use strict";\n(() => {{\n{script()}\n{starting}\n}})();\n')
    given = {"data": data, "title": title(data), "script": whole, "style": Markup(read("page.css"))}
    return environment().get_template(template).render(**given, **more)


def _region(heading: str) -> Markup:
    return Markup(f' aria-labelledby="{heading}"')


def _plain(text: object) -> str:
    """Write text so that Markdown takes none of it for markup, nor for a cell's end."""
    return re.sub(r"([\\`*_|<>\[\]#&$~])", r"\\\1", " ".join(str(text).split()))


def _interval(row: dict[str, Any]) -> str:
    return "" if row["low"] is None else f"{number(row['low'])} to {number(row['high'])}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]]


def _numbers(data: dict[str, Any]) -> list[str]:
    rows = [[_plain(r["name"]), number(r["value"]), _interval(r), number(r["null"])] for r in data["numbers"]]
    return _table(["number", "value", "95% interval", "chance"], rows)


def _edits(data: dict[str, Any]) -> list[str]:
    rows = [
        [_plain(r["shown"]), number(r["loss"]), number(r["delta"]), _interval(r), number(r["kl"]), number(r["sink_mass"])]
        for r in data["edits"]
    ]
    header = ["intervention", "loss (nats)", "difference", "95% interval", "KL", "on token 0"]
    if any(r.get("placebos") for r in data["edits"]):
        header += ["placebo", "p"]
        for row, r in zip(rows, data["edits"], strict=True):
            beside = r["placebos"] or dict.fromkeys(("delta", "std", "p"))
            spread = "" if beside["std"] is None else f" ± {number(beside['std'])}"
            row += [f"{number(beside['delta'])}{spread}", number(beside["p"])]
    return _table(header, rows)


def _places(data: dict[str, Any]) -> list[str]:
    axes = {"heads": ("layer", "head"), "layers": ("layer",), "positions": ("position",)}[data["over"]]
    rows = [
        [*(str(r[side]) for side in ("row", "column")[: len(axes)]), number(r["delta"]), _interval(r)]
        + [number(r[name]) for name in ("kl", "placebo_delta")]
        for r in data["top"]
    ]
    return _table([*axes, "difference (nats)", "95% interval", "KL", "placebo's difference"], rows)


def _compared(data: dict[str, Any]) -> list[str]:
    of = "value" if data["of"] == "measure" else "delta"
    rows = [[_plain(r["of"]), *(number(c and c[of]) for c in r["in"])] for r in data["rows"]]
    return _table(["number" if of == "value" else "difference of", *map(_plain, data["names"])], rows)
