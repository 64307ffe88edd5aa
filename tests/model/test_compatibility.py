"""The table of families, engines and edits in the docs is what is found when they are tried out."""

import importlib.util
from pathlib import Path

import pytest

from tests.model.compare import TL4

PATH = Path(__file__).parents[2] / "docs" / "compatibility.py"


@pytest.mark.slow
@pytest.mark.skipif(not TL4, reason="the page is of TransformerLens 4")
def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("compatibility", PATH)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.PAGE.read_text(encoding="utf-8").partition("\n## ")[0]
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert [line for line in made.families().splitlines() if line.startswith("|")] == rows
