"""Pages: one self-contained HTML file each, no network, no server, no library."""

from sinkscope.reports.page.others import render_effects, render_studies, render_study
from sinkscope.reports.page.report import render

__all__ = ["render", "render_effects", "render_studies", "render_study"]
