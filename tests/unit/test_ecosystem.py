"""What researchers have around: xarray, datasets, an ActivationCache, a notebook, a shell, a package of their own."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.testing import tiny_model
from tests.conftest import attempt

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[1, 5, 9, 4, 8, 7], [1, 7, 7, 2, 3, 9]])
TEXTS = ["so it goes", "and on it goes", "until the end"]


# --- xarray and datasets ---------------------------------------------------------------------------------------------


def test_xarray_holds_the_frame(llama):
    pytest.importorskip("xarray")
    report = ss.measure(llama, TEXTS)
    for column in ("value", "null", "std_error"):
        made = report.to_xarray(column)
        assert set(made.data_vars) == set(report.metrics)
        for row in report.frame.sample(80, random_state=0).to_dict("records"):
            at = {a: row[a] for a in ("text", "layer", "head", "key") if a in made[row["metric"]].dims}
            np.testing.assert_equal(float(made[row["metric"]].sel(at)), row[column])
    assert made.attrs["model"] == "tiny-llama"
    assert "did you mean 'null'" in str(attempt(lambda: report.to_xarray("nul")))


def test_datasets_are_streams(llama):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 2]})
    expected = ss.measure(llama, TEXTS, ["sink_mass"])
    for given in (rows, rows.to_iterable_dataset(), rows["text"], rows.rename_column("text", "sentence")):
        report = ss.measure(llama, given, ["sink_mass"])
        np.testing.assert_array_equal(report.frame["value"], expected.frame["value"])
    assert ss.evaluate(llama, rows, "window(size=4)").frame.equals(ss.evaluate(llama, TEXTS, "window(size=4)").frame)


# --- an ActivationCache ----------------------------------------------------------------------------------------------


@pytest.mark.classes
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_oss"])
def test_a_cache_is_measured_without_running_anything(family, monkeypatch):
    model = tiny_model(family)
    _, cache = model.run_with_cache(IDS)
    expected = ss.measure(model, IDS)
    monkeypatch.setattr(type(model.original_model), "forward", None)
    report = ss.measure(cache, IDS, batch_size=1)
    assert report.about["engine"] == "cache"
    np.testing.assert_allclose(report.frame["value"], expected.frame["value"], atol=1e-5, rtol=1e-5)
    others = ss.measure(cache, IDS, ["key_norm", "massive_activation"], key=2)
    assert others.frame["value"].notna().all()


@pytest.mark.classes
def test_a_cache_with_pads(llama):
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = ss.measure(llama, IDS, ["sink_mass", "row_entropy"], attention_mask=mask)
    _, cache = llama.run_with_cache(IDS, attention_mask=mask)
    report = ss.measure(cache, IDS, ["sink_mass", "row_entropy"], attention_mask=mask)
    np.testing.assert_allclose(report.frame["value"], expected.frame["value"], atol=1e-5)


def test_what_a_cache_has_not(llama):
    _, cache = llama.run_with_cache(IDS)
    assert "holds 2 texts of up to 6 tokens, and 1" in str(attempt(lambda: ss.measure(cache, IDS[:1])))
    _, some = llama.run_with_cache(IDS, names_filter="blocks.0.attn.hook_pattern")
    assert "has no 'blocks.1.attn.hook_pattern'" in str(attempt(lambda: ss.measure(some, IDS)))
    cache.cache_dict["blocks.1.attn.hook_pattern"] = torch.full_like(cache["blocks.1.attn.hook_pattern"], float("nan"))
    assert "NaN or infinity in layer 1" in str(attempt(lambda: ss.measure(cache, IDS)))


# --- a package of one's own ------------------------------------------------------------------------------------------


def test_the_template_of_a_metric_package(tmp_path):
    """Installed as anybody would, found through its entry point by a new process, its own tests passed."""
    template = ROOT / "examples" / "metric_package"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--target", tmp_path / "site", template], check=True, capture_output=True)
    where = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}"}
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, template / "tests"]
    done = subprocess.run(tests, capture_output=True, text=True, env=where, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout
    listed = [sys.executable, "-m", "sinkscope", "metrics"]
    assert (
        "Share of a query's attention" in subprocess.run(listed, capture_output=True, text=True, env=where, check=True).stdout
    )


# --- a notebook ------------------------------------------------------------------------------------------------------

CELLS = [
    "import sinkscope as ss\nmodel = ss.testing.tiny_model('llama')\ntexts = ['so it goes'] * 3",
    "from sinkscope.runs import progress\nprogress.NOTEBOOK_DELAY = 0",
    "report = ss.measure(model, texts, progress=True)\nreport",
    "report.heatmap();",
    "ss.evaluate(model, texts, 'window(size=4)')",
    "with ss.MaskKeys(0).on(model):\n    model.to_tokens('so')",
]


def test_a_notebook_shows_reports_and_progress(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    made = nbclient.NotebookClient(
        notebook, timeout=200, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    outputs = [cell.outputs for cell in made.cells]
    shown = [" ".join(str(o.get("data", {}).get("text/html", "")) for o in cell) for cell in outputs]
    assert "Attention sinks in tiny-llama" in shown[2]
    assert "attachShadow" in shown[2]
    assert "<table" in shown[2]
    assert "measure" in " ".join(o.get("text", "") for o in outputs[2])  # the progress bar, on stderr
    assert any("image/png" in o.get("data", {}) for o in outputs[3])
    assert "tiny-llama under interventions" in shown[4]


# --- a shell ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("sinkscope me", {"measure", "metrics"}),
        ("sinkscope measure smol", {"smollm2-135m"}),
        ("sinkscope measure x --metric sink_m", {"sink_mass", "sink_mass_excess"}),
        ("sinkscope evaluate x --intervention strea", {"streaming_window"}),
        ("sinkscope study emer", {"emergence"}),
    ],
)
def test_tab_completes(line, offered):
    where = {"_SINKSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    code = "from sinkscope.cli import app; app(prog_name='sinkscope')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | where | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert set(done.stdout.split()) == offered, done.stderr


# --- the documents ---------------------------------------------------------------------------------------------------


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize(
    "page", [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if p.name != "changelog.md"], ids=str
)
def test_no_link_inside_the_project_is_dead(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        if name.startswith("tutorials/"):  # made from examples/
            stem = name.removeprefix("tutorials/").removesuffix(".rst")
            assert stem == "index" or (ROOT / "examples" / f"{stem}.py").is_file(), target
            continue
        path = (page.parent / name) if name else page
        path = path if path.exists() else path.with_name(f"{path.name}.md")
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page.name}: {target}"


def test_the_locks_pin_everything():
    for lock in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in lock.read_text().splitlines() if line and not line.startswith("#")]
        assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+", line) for line in lines), lock
    assert importlib.metadata.version("sinkscope") == ss.__version__
