"""Pages: self-contained HTML, no network, no server, no library. One dictionary of data each, and several exits of it."""

from sinkscope.reports.page.compared import compared
from sinkscope.reports.page.data import SCHEMA_VERSION, measured
from sinkscope.reports.page.edits import evaluated
from sinkscope.reports.page.exits import as_json, markdown, render, snippet
from sinkscope.reports.page.others import render_studies, render_study
from sinkscope.reports.page.sweep import swept

__all__ = [
    "SCHEMA_VERSION",
    "as_json",
    "compared",
    "evaluated",
    "markdown",
    "measured",
    "render",
    "render_studies",
    "render_study",
    "snippet",
    "swept",
]
