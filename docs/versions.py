"""The versions that people have, tried out: runs the tests of the model classes in environments of other versions.

`make matrix` makes the environments and calls this, `python docs/versions.py NAME ...` runs some of them anew; the table goes
into `compatibility.md`, where `compatibility.py` keeps it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).parent
PAGE = HERE / "compatibility.md"
#: The environments: `.venv-NAME`, of `requirements/NAME.txt`.
CORNERS = {"oldest": "oldest of everything", "tl218": "the last TransformerLens 2", "newest": "newest of everything"}
PACKAGES = ("transformer-lens", "transformers", "torch", "pandas", "numpy")
PLAIN = "--strict-markers --import-mode=importlib -ra"
MARK = "## Versions"
HEAD = f"""{MARK}

Served: Python 3.11 to 3.13, transformer-lens 2.16 to 4.x, transformers 4.51 to 5.x, torch from 2.6, pandas from 2.0, numpy
from 1.26. TransformerLens has `HookedTransformer` and `HookedEncoder` up to 3.9, `TransformerBridge` from 3.0 on; a plain
Hugging Face model needs transformers 4.53. `make test` runs TransformerLens 4.3 and 3.9; `make matrix` the tests of the model
classes at these corners (`python docs/versions.py` writes the table). A skipped test names what the versions do not have. Of
`make test`'s own versions they were also run on Python 3.12: 855 passed, none failed (27 November 2026).

Wrong in TransformerLens itself, without this library: with transformers 5.24 the bridge of 4.3 leaves its KV cache empty, so
that it generates other tokens than Hugging Face's model (with `use_cache=False` the same); `HookedTransformer.generate` of
2.16 attends otherwise than its forward pass on GPT-2 and OPT; the T5 decoder of 2.x is not Hugging Face's, and is refused.

"""
TABLE = ("corner", "Python", *PACKAGES, "passed", "failed", "skipped")


class Row(NamedTuple):
    """One line of the table: what was installed, and how many tests did what."""

    corner: str
    versions: list[str]
    counts: list[int]

    def __str__(self) -> str:
        """Write it."""
        return f"| {' | '.join([self.corner, *self.versions, *map(str, self.counts)])} |"


def run(name: str) -> Row:
    """Run the tests in one environment; their output goes on as it comes."""
    python = HERE.parent / f".venv-{name}" / "bin" / "python"
    ask = f"import importlib.metadata as m, platform as p; print(p.python_version(), *map(m.version, {PACKAGES!r}))"
    versions = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.split()
    with tempfile.TemporaryDirectory() as directory:
        told = Path(directory) / "junit.xml"
        how = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "-m", "classes", "-q", "-o", f"addopts={PLAIN}"]
        subprocess.run([python, "-m", "pytest", *how, f"--junitxml={told}", "tests"], cwd=HERE.parent, check=False)
        suite = next(ElementTree.parse(told).iter("testsuite"))
    total, errors, failures, skipped = (int(suite.get(what, 0)) for what in ("tests", "errors", "failures", "skipped"))
    return Row(CORNERS[name], versions, [total - errors - failures - skipped, errors + failures, skipped])


def section(page: str) -> str:
    """Give the section as a page has it."""
    _, found, after = page.partition(MARK)
    return f"{MARK}{after.partition(chr(10) + '## ')[0].rstrip()}\n" if found else HEAD


def known(page: str) -> dict[str, str]:
    """Give the rows that a page has, by corner."""
    rows = [line for line in section(page).splitlines() if line.startswith("| ")]
    return {line.split("|")[1].strip(): line for line in rows[2:]}


def main(names: Sequence[str]) -> int:
    """Run some corners or all, write the table, and say how many tests failed."""
    page = PAGE.read_text(encoding="utf-8")
    found = [run(name) for name in names or CORNERS]
    rows = known(page) | {row.corner: str(row) for row in found}
    lines = [f"| {' | '.join(TABLE)} |", "|" + " --- |" * len(TABLE), *(rows[c] for c in CORNERS.values() if c in rows)]
    table = "\n".join(lines)
    PAGE.write_text(page.partition(f"\n{MARK}")[0].rstrip() + f"\n\n{HEAD}{table}\n", encoding="utf-8")
    print(table)
    return sum(row.counts[1] for row in found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) != 0)
