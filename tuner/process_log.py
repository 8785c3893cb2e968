"""One log a process: when, which round and trial, who, what, and no secret; where the trace of a bug goes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

_MOST_BYTES = 8 * 2**20
"""Of a log, before its older half is kept under another name until the next time."""

_LAST_LINES = 15
"""Of a log, in a message."""

_SECRETS = (
    (re.compile(r"(\w://[^\s:/@'\"<>]*):[^\s<>]+@"), r"\1:***@"),
    (
        re.compile(
            r"(?i)([?&;](?:[\w.-]|%2d)*(?:sig|token|credential|secret|passw|key|policy|accessid|auth)[\w.-]*=)"
            r"(?!\*\*\*)[^&\s'\"<>;)]+"
        ),
        r"\1***",
    ),
    (
        re.compile(
            r"(?i)((?:passw(?:or)?d|passphrase|secret|api[_-]?key|(?:access|auth|hf|session|security|refresh)"
            r"[_-]?token)[\w-]*['\"]?\s?[=:]\s?|\btoken['\"]?\s?[=:]\s?(?=['\"]))"
            r"(?:'[^'\n]*'|\"[^\"\n]*\"|(?!\*\*\*)[^\s'\",;)&]+)"
        ),
        r"\1***",
    ),
    (re.compile(r"(?i)\b(bearer|basic) [\w.~+/=-]{8,}"), r"\1 ***"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_***"),
)
"""Accounts and signatures in URLs, options of databases, headers, and tokens of the Hub."""

_trial: ContextVar[int | None] = ContextVar("trial", default=None)
_file: Path | None = None
_running: str | None = None
"""The log and the name of the round that this process runs."""


def harmless(text: str) -> str:
    """Return a text that may be kept or shown: without passwords, tokens and signatures of URLs."""
    for secret, shown in _SECRETS:
        text = secret.sub(shown, text)
    return text


def halved(log: Path) -> None:
    """Move what a log has to its older half, NAME.1, once it is long; whoever appends to it goes on."""
    with suppress(OSError):  # a full disk costs a log, not the round
        if log.stat().st_size > _MOST_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def last_lines(log: Path) -> str:
    """Return the end of another process's log, or why it cannot be read, to show to the user."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError as error:
        return f"its log, {log}, cannot be read: {error.strerror}"
    tail = "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])
    return f"its log, {log}, ends with:\n{tail}"


class _Lines(logging.Formatter):
    """`2026-11-28 17:00:00 round1 trial 3 tuner.study.loop: ...`"""

    def __init__(self, round_name: str | None = None) -> None:
        super().__init__()
        self._round = round_name

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, and the lines of a trace after it."""
        trial = _trial.get()
        name = self._round or _running or "-"
        about = name if trial is None else f"{name} trial {trial}"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        said = f"{when} {about} {record.name}: {record.getMessage()}"
        return harmless(f"{said}\n{self.formatException(record.exc_info)}" if record.exc_info else said)


class _Quiet(RotatingFileHandler):
    """A log that ignores write errors: a full disk costs lines of the log, not the round."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Do nothing."""


class _Harmless:
    """A text stream that keeps secrets out of what is printed, such as traces and warnings of libraries."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without its secrets."""
        self._stream.write(harmless(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines without their secrets."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Said(logging.Handler):
    """Hands lines to a function."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """Hand over a line."""
        self._say(self.format(record))


def begin_worker(round_name: str) -> None:
    """Let everything that this worker process logs go to standard error, which its parent keeps as a file."""
    sys.stderr = _Harmless(sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(round_name))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@contextmanager
def about(trial: int) -> Iterator[None]:
    """Name a trial in the lines of the block."""
    before = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(before)


@contextmanager
def kept_in(path: Path, round_name: str) -> Iterator[None]:
    """Keep what tuner logs in this process in a file too, as lines about a round."""
    global _file, _running
    handler = _Quiet(path, maxBytes=_MOST_BYTES, backupCount=1, encoding="utf-8", delay=True)
    before, _file = _file, path
    running, _running = _running, round_name
    try:
        with _shown_by(handler, round_name):
            yield
        _file = before  # after an error its trace may go there
    finally:
        _running = running
        handler.close()


@contextmanager
def said_by(say: Callable[[str], None]) -> Iterator[None]:
    """Hand what tuner logs in this process to a function, line by line."""
    with _shown_by(_Said(say), None):
        yield


@contextmanager
def _shown_by(handler: logging.Handler, round_name: str | None) -> Iterator[None]:
    logger = logging.getLogger("tuner")
    before = logger.level
    handler.setFormatter(_Lines(round_name))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def trace_of(error: BaseException) -> str:
    """Return the trace of an error without what may be a secret."""
    return harmless("".join(traceback.format_exception(error)))


def kept_trace(error: BaseException) -> Path | None:
    """Write the trace of an error to the round's log, or to a file of its own; return where it is."""
    trace = trace_of(error)
    with suppress(OSError):
        if _file is not None and _file.parent.is_dir():
            with _file.open("a", encoding="utf-8") as file:
                file.write(trace)
            return _file
        descriptor, name = tempfile.mkstemp(prefix="tuner-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(trace)
        return Path(name)
    return None
