"""StudyReport: our figures beside the published ones, and a paragraph that says what was found."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from functools import partial
from importlib.resources import files as resources
from pathlib import Path

import pandas as pd

from sinkscope.effect import EffectReport
from sinkscope.files import check_writable, write


@dataclass(frozen=True, eq=False)
class StudyReport:
    """One study on one model.

    Attributes:
        name: the study.
        table: ours first (`evidence` is "measured"), then the published rows, each with its source and how it was read.
            `low` and `high` bound our difference of loss to the unedited run, in nats.
        said: what was found and what was not, in words.
        effect: everything behind it, with the loss curves.
    """

    name: str
    table: pd.DataFrame
    said: str
    effect: EffectReport = field(repr=False)

    def save(self, directory: str | Path) -> Path:
        """Write `study.csv`, `study.txt`, and all that the effects' own report writes."""
        path = check_writable(directory)
        write(path / "study.csv", partial(self.table.to_csv, index=False))
        write(path / "study.txt", lambda p: p.write_text(self.said + "\n", encoding="utf-8"))
        return self.effect.save(path)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.said)}</p>{self.table.to_html(index=False, na_rep='', escape=True)}"


def published(study: str) -> pd.DataFrame:
    """Give the published figures of a study, with their sources."""
    with (resources("sinkscope.studies") / "published.csv").open(encoding="utf-8") as file:
        rows = pd.read_csv(file)
    return rows[rows["study"] == study].drop(columns="study").reset_index(drop=True)
