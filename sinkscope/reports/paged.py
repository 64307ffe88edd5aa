"""What every report has: a page, a fragment, JSON and Markdown, all of one dictionary."""

from __future__ import annotations

from typing import Any


class Paged:
    """The exits of a report's data."""

    def data(self) -> dict[str, Any]:
        """Give all that the page shows as a dictionary, that of :meth:`json`."""
        raise NotImplementedError

    def page(self) -> str:
        """Give the self-contained HTML page."""
        from sinkscope.reports import page

        return page.render(self.data())

    def snippet(self) -> str:
        """Give the page as a fragment for another page: what a notebook shows."""
        from sinkscope.reports import page

        return page.snippet(self.data())

    def json(self) -> str:
        """Give all that the page shows as JSON; the documentation says what every key means."""
        from sinkscope.reports import page

        return page.as_json(self.data())

    def markdown(self) -> str:
        """Give the numbers and how they were made as Markdown, for an issue or an appendix."""
        from sinkscope.reports import page

        return page.markdown(self.data())

    def _repr_html_(self) -> str:
        return self.snippet()
