"""Every study on one model, one after the other: what is finished is not run again, and one page links them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import sinkscope
from sinkscope.errors import SinkscopeError
from sinkscope.models import adapt
from sinkscope.reports.files import check_writable, write
from sinkscope.reports.page import render_studies
from sinkscope.runs.progress import bar
from sinkscope.studies import STUDIES, find
from sinkscope.studies.report import SEAL
from sinkscope.tokens import Tokens

#: In a study's own folder: what it was run on, so that another model's results are never taken for this one's.
RUN = "run.txt"


def run_all(
    model: Any, text: Any = None, out: str | Path = "studies", *, only: Iterable[str] | None = None, progress: bool = False
) -> Path:
    """Run the studies, each into its own folder of `out`; a study that is finished there is kept.

    Args:
        model: as for the studies.
        text: one long text, as for the studies; None takes what each study takes by itself.
        out: the directory.
        only: names of studies; None for all.
        progress: show a progress bar on stderr.

    Returns:
        The page that links them, `out/index.html`. A study that this model can't take, or that fails, is listed there with
        the reason.

    Raises:
        SinkscopeError: no such study; the directory can't be written.
    """
    names = list(STUDIES) if only is None else list(only)
    runs = {name: find(name) for name in names}
    path, adapter = check_writable(out), adapt(model)
    run = json.dumps([sinkscope.__version__, adapter.describe(), adapter.state(), _digest(text)], sort_keys=True)
    not_run: dict[str, str] = {}
    with bar(progress, len(names), "studies", "study") as tick:
        for name, study in runs.items():
            folder = path / name
            known = folder / RUN
            if not ((folder / SEAL).is_file() and known.is_file() and known.read_text(encoding="utf-8") == run):
                known.unlink(missing_ok=True)  # first: a kill must not leave another run's mark beside this one's results
                try:
                    study(model, text).save(folder)
                    write(known, partial(Path.write_text, data=run, encoding="utf-8"))
                except Exception as error:  # the others are run all the same
                    said = isinstance(error, SinkscopeError)
                    not_run[name] = str(error) if said else f"it failed, a bug: {type(error).__name__}: {error}"
            tick(1)
    done = [json.loads((path / name / SEAL).read_text(encoding="utf-8")) for name in names if name not in not_run]
    pictures = {s["name"]: (path / s["name"] / f"{s['pictures'][0]}.png").read_bytes() for s in done if s["pictures"]}
    page = render_studies(adapter.name, done, pictures, not_run)
    write(path / "index.html", partial(Path.write_text, data=page, encoding="utf-8"))
    return path / "index.html"


def _digest(text: Any) -> str:
    """Tell texts apart."""
    if isinstance(text, Path):
        return hashlib.sha256(text.read_bytes()).hexdigest()
    if isinstance(text, Tokens):
        text = [s.ids.tolist() for s in text.sequences]
    return hashlib.sha256(repr(text.tolist() if hasattr(text, "tolist") else text).encode()).hexdigest()
