"""Print for all verbs: the two streams, JSON documents, and progress while something is prepared."""

from __future__ import annotations

import errno
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from tuner.api.run import Stopping
    from tuner.config import ModelSpec, RoundSpec
    from tuner.data import PreparedData
    from tuner.study.folder import StudyFolder

WIDEST = 1000
"""In characters: wider than any table."""
PROSE = 120
"""In characters: the longest line that is comfortable to read."""

acting_in: Path | None = None
"""The value of `-C`: suggested commands are relative to the folder this command was typed in."""

typed = "tuner"
"""The current command line, ready to be run again."""

verbose = ExitStack()
"""What `--verbose` has begun, for as long as the current command runs."""

_speakers: list[Callable[[str], None]] = []
"""Stack of live displays; the last one owns the terminal."""


def next_command(command: str, *, directory: Path | None = None) -> str:
    """Return a command as it must be typed to act in a folder; None is this command's own folder."""
    path = acting_in if directory is None else (acting_in or Path()) / directory
    if path is None or path == Path():
        return command
    return command.replace("tuner ", f"tuner -C {shlex.quote(str(path))} ", 1)


def open_here() -> StudyFolder:
    """Open the study of the current folder; note on standard error if it is a dry run."""
    from tuner.study.folder import dry_run_banner, open_folder

    folder = open_folder(Path())
    if folder.is_dry_run:
        typer.echo(dry_run_banner(folder.directory), err=True)
    return folder


def warn_of_code(model: ModelSpec) -> None:
    """Warn on standard error about a model that runs its own Python code."""
    if model.trust_remote_code:
        typer.echo(f"warning: {model.warning_of_code}", err=True)


def output(*, piped_width: int = WIDEST) -> Console:
    """Return a console for standard output. `COLUMNS` overrides its width, as in most programs."""
    has_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    file = None if sys.stdout.isatty() else _Trimmed(sys.stdout)
    return _console(width=None if has_width else piped_width, file=file)


class _Trimmed:
    """A stream without the blanks that tables put at the ends of lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write whole lines."""
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outliving(stream: TextIO | None) -> Outliving:
    """Return a stream that outlives its terminal; None is one that was closed before, as by `>&-`."""
    return Outliving(Path(os.devnull).open("w") if stream is None else stream)


class Outliving:
    """A stream of this process to a terminal that may hang up: what is written then goes nowhere.

    The write that meets it fails before the signal that tells of it is handled.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        self._outlive(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Write what has been kept."""
        self._outlive(self._stream.flush)

    def _outlive(self, act: Callable[..., object], *arguments: str) -> None:
        try:
            act(*arguments)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            from tuner.api.run import let_go_of_terminal

            let_go_of_terminal()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def error_output() -> Console:
    """Return a console for standard error."""
    return _console(stderr=True)


def _console(**options: Any) -> Console:
    """Create a console that prints text verbatim: a folder may be named `x[/y]`, a file `:smile:`."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, **options)


@contextmanager
def spoken_by(speaker: Callable[[str], None]) -> Iterator[None]:
    """Send `say` through the live display, which would overwrite anything printed directly."""
    _speakers.append(speaker)
    try:
        yield
    finally:
        _speakers.remove(speaker)


def say(text: str) -> None:
    """Print a line on standard error; it stays visible while a live view is drawn there."""
    if _speakers:
        _speakers[-1](text)
    else:
        typer.echo(text, err=True)


def prepared(
    spec: RoundSpec, cache: Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> PreparedData:
    """Call `prepare`, loading the model's tokenizer unless one is given."""
    from tuner.data import load_tokenizer, prepare

    with progress_shown(error_output()) as say:
        return prepare(spec, tokenizer or load_tokenizer(spec.model), cache, say)


@contextmanager
def progress_shown(
    console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], None]]:
    """Yield a function that reports the progress of a long task.

    On a terminal, shows one line that is cleared at the end; elsewhere, prints a line every half minute.
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


def stop_signals(answer: str, seconds: float | None = None) -> AbstractContextManager[Stopping]:
    """Stop gracefully on the first Ctrl-C, SIGTERM or SIGHUP and print `answer`; the second ends everything.

    SIGHUP says that the terminal is gone; where it is ignored, as under nohup, it stays so.
    """
    from tuner.api.run import end_now, interruptible
    from tuner.report.live import show_keys

    def reply() -> None:
        say(answer)
        show_keys()  # the second signal may end the process as it stands

    signals = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return interruptible(seconds, signals=signals, answer=reply, second=end_now)
