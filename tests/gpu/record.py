"""What a run on a GPU found: one JSON and one table, written anew after every step, so that a kill loses one step at most."""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any


class Record:
    """`gpu.json` in a directory, and `gpu.md` beside it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = {"about": {}, "tests": {}, "numbers": {}, "timings": [], "skipped": [], "errors": []}
        with suppress(FileNotFoundError):
            self.found = json.loads((self.folder / "gpu.json").read_text())

    def write(self) -> None:
        """Write both, each whole or not at all."""
        for name, text in (("gpu.json", json.dumps(self.found, indent=1)), ("gpu.md", table(self.found))):
            half = self.folder / f".{name}"
            half.write_text(text)
            os.replace(half, self.folder / name)  # noqa: PTH105


def table(found: dict[str, Any]) -> str:
    """Everything that a person wants to see, in Markdown."""
    parts = [f"# On {found['about'].get('device', 'a device')}", _about(found["about"]), _tests(found["tests"])]
    for dtype in dict.fromkeys(t["dtype"] for t in found["timings"]):
        parts += [f"## {dtype}", _timings([t for t in found["timings"] if t["dtype"] == dtype])]
    if found["numbers"]:
        parts += ["## Numbers", _rows(("what", "largest difference", "where"), _numbers(found["numbers"]))]
    if found["skipped"]:
        parts += ["## Not run", "\n".join(f"- {line}" for line in found["skipped"])]
    if found["errors"]:
        parts += ["## Went wrong", "\n".join(f"- {line}" for line in found["errors"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(about: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in about.items())


def _tests(tests: dict[str, Any]) -> str:
    if not tests:
        return ""
    outcomes = [t["outcome"] for t in tests.values()]
    lines = ["## Tests", ", ".join(f"{outcomes.count(o)} {o}" for o in ("passed", "failed", "skipped") if o in outcomes)]
    lines += [f"- failed: {name}: {t['why']}" for name, t in tests.items() if t["outcome"] == "failed"]
    reasons = [re.sub(r".*?Skipped: ", "", t["why"]) for t in tests.values() if t["outcome"] == "skipped"]
    lines += [f"- {reasons.count(why)} skipped: {why}" for why in dict.fromkeys(reasons)]
    errors: dict[str, float] = {}
    for t in tests.values():
        for name, value in t["properties"].items():
            errors[name] = max(errors.get(name, 0.0), value)
    if errors:
        lines += ["", _rows(("largest error in tests", ""), [(name, f"{e:.1e}") for name, e in sorted(errors.items())])]
    return "\n".join(lines)


def _timings(timings: list[dict[str, Any]]) -> str:
    """One row for each way, one column for each length: median time, its ratio to the first way, peak memory."""
    lengths = sorted({t["tokens"] for t in timings})
    at = {(t["way"], t["tokens"]): t for t in timings}
    first = timings[0]["way"]

    def cell(way: str, n: int) -> str:
        t, limit = at.get((way, n)), at.get((first, n))
        if t is None or not t["seconds"]:
            return "-"
        median = statistics.median(t["seconds"])
        ratio = f", {median / statistics.median(limit['seconds']):.2f}x" if limit and limit["seconds"] else ""
        memory = "" if t["peak_mb"] is None else f", {t['peak_mb']:.0f} MB"
        rounds = "" if len(t["seconds"]) >= t["rounds"] else f" (of {len(t['seconds'])})"
        return f"{median * 1e3:.1f} ms{ratio}{memory}{rounds}"

    ways = {t["way"]: t["what"] for t in timings}
    rows = [(what, *(cell(way, n) for n in lengths)) for way, what in ways.items()]
    return _rows(("medians; ratio to the first row; peak above the model", *(f"{n:,}" for n in lengths)), rows)


def _numbers(numbers: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (what, f"{max(errors.values()):.1e}", ", ".join(f"{name} {e:.1e}" for name, e in errors.items()))
        for what, errors in numbers.items()
    ]


def _rows(head: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines)


def main() -> None:
    """Print the table; fail if anything went wrong, or did not run."""
    record = Record(sys.argv[1])
    found, code = record.found, int(sys.argv[2])
    if code not in (0, 1):
        found["errors"].append(f"the tests ended early: exit status {code}")
    if not any(t["outcome"] == "passed" for t in found["tests"].values()):
        found["errors"].append("no test passed")
    if "seconds left" not in found["about"]:
        found["errors"].append("the benchmark did not come to its end")
    record.write()
    print((record.folder / "gpu.md").read_text())
    sys.exit(bool(found["errors"]) or any(t["outcome"] == "failed" for t in found["tests"].values()))


if __name__ == "__main__":
    main()
