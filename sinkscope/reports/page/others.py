"""The pages of the studies."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pandas import DataFrame

from sinkscope.reports.page.parts import environment, facts, picture


def render_study(
    name: str,
    question: str,
    verdict: str,
    said: str,
    table: DataFrame,
    pictures: Mapping[str, Callable[..., Any]],
    behind: Mapping[str, str],
    about: Mapping[str, Any],
) -> str:
    """One study as one HTML page.

    Args:
        name: the study.
        question: what it asks.
        verdict: what came out, in a few words.
        said: the same in a paragraph.
        table: words and numbers as they are shown.
        pictures: stem -> function that draws on `ax=`.
        behind: title -> address of the reports that it rests on, relative to the page.
        about: how it was made.
    """
    drawn = {stem: picture(draw) for stem, draw in pictures.items()}
    rows = [[str(cell) for cell in row] for row in table.to_numpy().tolist()]
    return (
        environment()
        .get_template("study.html.j2")
        .render(
            name=name,
            question=question,
            verdict=verdict,
            said=said,
            columns=[str(c) for c in table.columns],
            rows=rows,
            pictures=drawn,
            behind=behind,
            facts=facts(about),
        )
    )


def render_studies(model: str, studies: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes], not_run: Any) -> str:
    """Several studies on one page that links to each.

    Args:
        model: what they were run on.
        studies: what each `study.json` holds, in order.
        pictures: study -> its PNG.
        not_run: study -> why it could not be run.
    """
    shown = {name: base64.b64encode(png).decode("ascii") for name, png in pictures.items()}
    template = environment().get_template("studies.html.j2")
    return template.render(model=model, studies=studies, pictures=shown, not_run=not_run)
