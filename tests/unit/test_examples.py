"""Every example and every Python block of the README runs as a reader would run it."""

import re
import runpy
from pathlib import Path

import matplotlib as mpl
import pytest

ROOT = Path(__file__).parents[2]
README = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def quietly(monkeypatch, tmp_path):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("plot_*.py")), ids=lambda p: p.stem)
@pytest.mark.model
def test_an_example_runs_and_prints(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", README, ids=lambda b: b.splitlines()[-1][:30])
@pytest.mark.model
def test_a_block_of_the_readme_runs(block, capsys, tmp_path):
    exec(compile(block, "README.md", "exec"), {})
    assert ("sink_mass" if "measure" in block or "evaluate" in block else "tensor") in capsys.readouterr().out
    assert ("results" not in block) or (tmp_path / "results" / "report.html").is_file()


def test_the_readme_has_its_blocks():
    assert len(README) == 4
