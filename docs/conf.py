"""Sphinx: `make docs` builds docs/build/html, warnings as errors, with every tutorial run."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import sinkscope

sys.path.insert(0, str(Path(__file__).parent))  # sphinx-gallery looks `conf.in_order` up by its name
project, author, release = "sinkscope", "The sinkscope developers", sinkscope.__version__
copyright = f"2026, {author}"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",  # links to the source
    "sphinx_gallery.gen_gallery",
]
myst_enable_extensions = ["deflist"]
html_static_path, html_css_files = ["static"], ["wide.css"]
viewcode_line_numbers = True
exclude_patterns = ["build", "tutorials/*.ipynb", "tutorials/*.py"]
html_theme, html_title = "furo", "sinkscope"
html_logo = html_favicon = "static/mark.svg"
maximum_signature_line_length = 100
html_show_sourcelink = False
default_role = "code"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
suppress_warnings = ["config.cache"]
TUTORIALS = (
    "plot_first_look",
    "plot_custom_metric",
    "plot_without_sinks",
    "plot_four_edits",
    "plot_layer_by_layer",
    "plot_which_heads",
    "plot_sliding_window",
    "plot_long_inputs",
    "plot_encoder",
    "plot_training",
    "plot_watch_training",
    "plot_watch_generation",
    "plot_own_model",
)
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "within_subsection_order": "conf.in_order",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "min_reported_time": 1,
    "show_memory": False,
    "capture_repr": ("_repr_html_",),  # what says itself in a notebook; no `Out: <Axes: ...>`
    "write_computation_times": False,
    "reset_modules": ("matplotlib",),
}


class in_order:
    """Sort the tutorials as they are best read."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, name: str) -> int:
        """Give the place of a file."""
        return TUTORIALS.index(name.removesuffix(".py"))

    def __repr__(self) -> str:
        """Tell sphinx that it is the same in every build."""
        return "in_order"


TEXTS = {
    "fox": "The quick brown fox jumps over the lazy dog, and the dog, who has seen many foxes, does not get up.",
    "night": "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals.",
}


def live_report(app: Any, error: Exception | None) -> None:
    """Put a report of the small model beside the home page, which shows it."""
    if error is None and app.builder.format == "html":
        model = sinkscope.load_model("smollm2-135m")
        report = sinkscope.measure(model, TEXTS)
        report = replace(report, patterns=sinkscope.attention_patterns(model, TEXTS["fox"]))
        (Path(app.outdir) / "live.html").write_text(report.page(), encoding="utf-8")


def setup(app: Any) -> None:
    """Have the live report made when all else is."""
    app.connect("build-finished", live_report)
