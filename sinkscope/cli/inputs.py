"""What the command line hands over: texts, keys and chunks as Python has them; errors as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from sinkscope.cli.shown import plain

#: A number that some position may have; Python reads none of over 4,300 digits.
NUMBER = r"-?[0-9]{1,18}"


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Turn an error that the user can mend into one line and exit code 1."""
    from sinkscope.errors import SinkscopeError

    try:
        yield
    except SinkscopeError as error:
        if debug:
            raise
        typer.echo(f"sinkscope: error: {plain(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("sinkscope: interrupted", err=True)
        raise typer.Exit(130) from None


def texts(texts: list[str], files: list[Path]) -> dict[str, str] | Path:
    """Read what `--text` and `--file` give: label -> text, or the path of a corpus.

    Raises:
        SinkscopeError: nothing, something empty or unreadable, something twice, a corpus beside something else.
    """
    from sinkscope.errors import SinkscopeError
    from sinkscope.tokens import as_stream, read_text
    from sinkscope.tokens.items import label_of

    if not texts and not files:
        raise SinkscopeError("no text: give --text 'some words' or --file PATH (each may be repeated)")
    for path in files:
        if as_stream(path) is not None:
            if texts or len(files) > 1:
                raise SinkscopeError(f"{str(path)!r} is a whole corpus, which is read as a stream: give it alone")
            if path.is_dir() and not any(path.glob("*.txt")):
                raise SinkscopeError(f"the directory {str(path)!r} holds no .txt file")
            return path
    found = {f"text {i}": text for i, text in enumerate(texts)}
    for path in files:
        label = label_of(path.name if path.name not in found else path)
        if label in found:
            raise SinkscopeError(f"the file {label!r} is given twice")
        found[label] = read_text(path)
    for index, (label, text) in enumerate(found.items()):
        if not text.strip():
            raise SinkscopeError(f"text {index} ({label!r}) is empty: give it at least two tokens of text, or leave it out")
    return found


def media(texts: list[str], files: list[Path]) -> dict[str, Path]:
    """Take `--file` as images or sounds, where their names say so: label -> path; none where none is one.

    Raises:
        SinkscopeError: there is text beside them, or one is given twice or is not there.
    """
    from sinkscope.errors import SinkscopeError
    from sinkscope.models.media import kind_of
    from sinkscope.tokens.items import label_of

    kinds = {kind_of(path) for path in files}
    if not kinds - {None}:
        return {}
    found: dict[str, Path] = {}
    for path in files:
        label = label_of(path.name if path.name not in found else path)
        if path in found.values():
            raise SinkscopeError(f"the file {label!r} is given twice")
        if texts or len(kinds) > 1:
            named = sorted({f"{kind}s" for kind in kinds if kind} | ({"text"} if texts or None in kinds else set()))
            raise SinkscopeError(f"{' and '.join(named)} are given: give one kind alone")
        if not path.is_file():
            raise SinkscopeError(f"no such file: {str(path)!r}")
        found[label] = path
    return found


def paired(texts: dict[str, Any] | Path, targets: list[str]) -> dict[str, Any] | Path:
    """Put targets beside their sources.

    Raises:
        SinkscopeError: there are more or fewer of them.
    """
    from sinkscope.errors import SinkscopeError

    if not targets:
        return texts
    if isinstance(texts, Path) or len(texts) != len(targets):
        raise SinkscopeError(
            f"{len(targets)} --target and {'a corpus' if isinstance(texts, Path) else f'{len(texts)} text(s)'}: give one for "
            "each --text, in their order; of a corpus, a .jsonl file whose lines have 'source' and 'target'"
        )
    return {label: (text, target) for (label, text), target in zip(texts.items(), targets, strict=True)}


def key_of(text: str) -> int | str:
    """Read a sink position: a number, or a token."""
    return int(text) if re.fullmatch(NUMBER, text) else text


def chunk_of(text: str) -> int | str | None:
    """Read `--chunk`: a number, none or auto."""
    return None if text == "none" else key_of(text)
