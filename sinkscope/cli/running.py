"""What commands do around a run: check, load the model, run, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from sinkscope.cli.shown import plain

if TYPE_CHECKING:
    from sinkscope.runs.share import Share


@runtime_checkable
class Saved(Protocol):
    """What a run finds, and can write."""

    def save(self, directory: Path, /) -> Any:
        """Write it to a directory."""
        ...


Found = TypeVar("Found", bound=Saved)


def carried_out(
    name: str, out: Path | None, run: Callable[[Any, Share], Found], *, quiet: bool = False, **load: Any
) -> Found | None:
    """Load a model, run, and write; the directory is looked at before, and held meanwhile.

    Of several processes that `torchrun` started, the first gives what was found.
    """
    from sinkscope.models import load_model
    from sinkscope.reports.files import check_writable
    from sinkscope.runs.progress import saying
    from sinkscope.runs.resume import claimed
    from sinkscope.runs.share import joined

    if out is not None:
        check_writable(out)
    with joined() as share, claimed(out if share.rank == 0 else None):
        with saying(share.rank == 0 and not quiet, f"loading {plain(name)} ..."):
            model = load_model(name, **load)
        found = run(model, share)
        if share.rank > 0:
            return None
        if out is not None:
            found.save(out)
    return found
