"""How every verb prints: the two streams, JSON documents, and a line while something is prepared."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from tuner.config import ModelSpec, RoundSpec
    from tuner.data import PreparedData
    from tuner.study.folder import StudyFolder

WIDEST = 1000
"""Characters: more than the widest table has."""
PROSE = 120
"""Characters of a line that is still read with ease."""

acting_in: Path | None = None
"""What `-C` said: the commands that are named next are typed from where this one was."""

typed = "tuner"
"""The command that is being run, as it can be given again."""

_speakers: list[Callable[[str], None]] = []
"""What has the terminal, the last one now."""


def next_command(command: str, *, directory: Path | None = None) -> str:
    """A command as it has to be typed to act in a folder; None is the one that this command acts in."""
    path = acting_in if directory is None else (acting_in or Path()) / directory
    if path is None or path == Path():
        return command
    return command.replace("tuner ", f"tuner -C {shlex.quote(str(path))} ", 1)


def open_here() -> StudyFolder:
    """The study of the current folder; says on standard error when it is a rehearsal."""
    from tuner.study.folder import REHEARSAL_BANNER, open_folder

    folder = open_folder(Path())
    if folder.is_rehearsal:
        typer.echo(REHEARSAL_BANNER, err=True)
    return folder


def warn_of_code(model: ModelSpec) -> None:
    """Say on standard error what a model may do that brings Python code along."""
    if model.trust_remote_code:
        typer.echo(f"warning: {model.warning_of_code}", err=True)


def output(*, piped_width: int = WIDEST) -> Console:
    """Standard output. `COLUMNS` sets another width, as in most programs."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    return _console(width=None if has_width else piped_width)


def error_output() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    """A console that prints every text as it is: a folder may be named `x[/y]`, a file `:smile:`."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def spoken_by(speaker: Callable[[str], None]) -> Iterator[None]:
    """Let `say` go through what draws on the terminal, which would wipe out what is printed beside it."""
    _speakers.append(speaker)
    try:
        yield
    finally:
        _speakers.remove(speaker)


def say(text: str) -> None:
    """A sentence on standard error, where it is seen while a live view is drawn there too."""
    if _speakers:
        _speakers[-1](text)
    else:
        typer.echo(text, err=True)


def prepared(
    spec: RoundSpec, cache: Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreparedData:
    """As `prepare`, with the model's own tokenizer unless it is at hand already."""
    from tuner.data import load_tokenizer, prepare

    with progress_shown(error_output()) as say:
        return prepare(spec, tokenizer or load_tokenizer(spec.model), cache, say)


@contextmanager
def progress_shown(
    console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Gives a function that says how far a long work is.

    On a terminal in one line, which is gone at the end; elsewhere in a line every half a minute.
    """
    from rich.text import Text

    from tuner.report.live import PREPARING_EVERY_SECONDS

    if console.is_interactive:
        with console.status("") as status:
            yield lambda doing: status.update(Text(doing))
        return
    said_at = clock()

    def say(doing: str) -> None:
        nonlocal said_at
        if (now := clock()) - said_at >= PREPARING_EVERY_SECONDS:
            said_at = now
            console.print(doing, markup=False, emoji=False, highlight=False, soft_wrap=True)

    yield say
