"""Every example and every Python block of the README and the documentation runs as a reader would run it."""

import re
import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

import sinkscope as ss

ROOT = Path(__file__).parents[2]


def blocks(page):
    """Python blocks of a page; a study takes minutes, and has tests of its own."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return ["".join(line for line in block.splitlines(True) if "ss.studies." not in line) for block in found]


README = blocks("README.md")
DOCS = [block for page in sorted((ROOT / "docs").glob("*.md")) for block in blocks(page)]


@pytest.fixture(autouse=True)
def quietly(monkeypatch, tmp_path):
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    yield
    plt.close("all")


#: Half a minute or more each, of long texts, sweeps and training; `make docs` runs them too.
SLOW = (
    "plot_watch_training",
    "plot_which_heads",
    "plot_without_sinks",
    "plot_watch_generation",
    "plot_long_inputs",
    "plot_sliding_window",
    "plot_training",
    "plot_four_edits",
    "plot_layer_by_layer",
    "plot_watch_training",
)


@pytest.fixture
def loaded(monkeypatch, smollm2):
    """Load SmolLM2 once for all that ask for it: it takes ten seconds, and is left as it was."""
    load = ss.load_model
    monkeypatch.setattr(
        ss, "load_model", lambda name, **how: smollm2 if name == "smollm2-135m" and not how else load(name, **how)
    )


EXAMPLES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem in SLOW else ())
    for path in sorted((ROOT / "examples").glob("plot_*.py"))
]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("path", EXAMPLES)
@pytest.mark.model
def test_an_example_runs_and_prints(path, capsys):
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("block", README + DOCS, ids=lambda b: b.splitlines()[-1][:30])
@pytest.mark.model
def test_a_block_of_the_readme_runs(block, capsys, tmp_path):
    exec(compile(block, "README.md", "exec"), {})
    says = {
        "ss.sweep": "Correlation",
        "measure": "sink_mass",
        "evaluate": "EffectReport",
        "of_pattern": "sink_mass",
        "check_cache": "nothing is evicted",
        "watch": "sink_mass",
        "SinkCallback": "step",
    }
    assert next((words for call, words in says.items() if call in block), "tensor") in capsys.readouterr().out
    assert ("results" not in block) or (tmp_path / "results" / "report.html").is_file()


def test_the_readme_has_its_blocks():
    assert (len(README), len(DOCS)) == (4, 20)


def test_the_worked_pull_requests_work(monkeypatch):
    """The metric and the edit of CONTRIBUTING.md, where the names that their files import are there."""
    import dataclasses
    import typing

    from sinkscope.interventions import Intervention
    from sinkscope.metrics.base import metric

    monkeypatch.setattr(Intervention, "registry", dict(Intervention.registry))
    there = {"metric": metric, "Block": ss.Block, "Tensor": object, "Intervention": Intervention}
    there |= {"dataclass": dataclasses.dataclass, "ClassVar": typing.ClassVar, "__name__": __name__}
    added, edit, *_ = blocks("CONTRIBUTING.md")
    exec(compile(added, "CONTRIBUTING.md", "exec"), there)
    exec(compile(edit, "CONTRIBUTING.md", "exec"), there)
    ss.testing.check_metric(there["half_keys"])
    effect = ss.evaluate(ss.testing.tiny_model("llama"), "the quick brown fox jumps", "strided(size=4, stride=8)")
    assert effect.summary()["kl"].iloc[1] > 0.01


def test_every_example_is_a_tutorial_of_the_documentation():
    conf = (ROOT / "docs" / "conf.py").read_text(encoding="utf-8")
    assert set(re.findall(r'"(plot_\w+)"', conf)) == {path.stem for path in (ROOT / "examples").glob("plot_*.py")}


def test_the_readme_links_to_what_is_there():
    """It is the page on PyPI as well, which resolves no relative link."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    ours = [link for link in links if "sinkscope/sinkscope/" in link]
    assert len(ours) > 20
    for link in ours:
        assert (ROOT / link.partition("/main/")[2].partition("#")[0]).exists(), link
