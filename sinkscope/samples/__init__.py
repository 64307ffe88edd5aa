"""Five texts of rising complexity, written for this project, on which the demo runs."""

from __future__ import annotations

from importlib.resources import files


def samples() -> dict[str, str]:
    """Give the sample texts by label, shortest first; the last has over 1,000 tokens.

    >>> list(samples())[0]
    '1_pangram'
    """
    found = sorted((f for f in files(__package__).iterdir() if f.name.endswith(".txt")), key=lambda f: f.name)
    return {f.name.removesuffix(".txt"): f.read_text(encoding="utf-8").strip() for f in found}
