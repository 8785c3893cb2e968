"""The errors a user can meet: each says the place, what was read, what is allowed and what to do.

The command line prints a TunerError's message alone and exits with its `exit_code`; any other
exception is a bug in tuner and keeps its traceback.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOT_THE_USERS = (importlib.__file__, "<frozen ")
"""Files whose lines in a traceback do not name a mistake."""


class TunerError(Exception):
    """A mistake or an accident that the message explains."""

    exit_code = 1
    """1: it ran and failed."""


class InputError(TunerError):
    """Something the user gave cannot be used; nothing was changed."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong in a round file."""

    line: int | None
    """1-based line of the file, where one can be named."""
    key: str
    """Dotted path, such as `hyperparameters.lora_rank`; empty for the file as a whole."""
    message: str
    """What is wrong, what is allowed, what to do."""


class RoundFileError(InputError):
    """A round file has mistakes; all of them are listed at once."""

    def __init__(self, path: Path | str, mistakes: Sequence[Mistake]) -> None:
        self.path = Path(path)
        self.mistakes = tuple(mistakes)
        super().__init__("\n".join(self._line(mistake) for mistake in self.mistakes))

    @property
    def brief(self) -> str:
        """The first mistake, and how many more there are."""
        more = len(self.mistakes) - 1
        others = f" (and {more} more: tuner study check {self.path.name})" if more else ""
        return f"{self._line(self.mistakes[0])}{others}"

    def _line(self, mistake: Mistake) -> str:
        place = self.path.name if mistake.line is None else f"{self.path.name}:{mistake.line}"
        return f"{place}: {mistake.key}: {mistake.message}" if mistake.key else f"{place}: {mistake.message}"


class DataError(InputError):
    """Data that cannot be read, is empty, lacks a column or overlaps; the message names file and row."""


class ModelError(InputError):
    """A model or tokenizer that cannot be loaded or trained."""


class TargetModulesError(ModelError):
    """Target modules that cannot be adapted; `fitting` are those of the model that can, as they are named."""

    def __init__(self, message: str, fitting: Sequence[str]) -> None:
        self.fitting = tuple(fitting)
        super().__init__(message)


class MetricError(InputError):
    """A user's metric, or function of `evaluation.answers.metric`, that is not there, raises, or returns no
    number."""


class StorageError(InputError):
    """A database or a directory that cannot be used, or that another process holds."""


class StorageAway(StorageError):
    """A database that cannot be reached or written now; another try may succeed."""


class StudyTaken(StorageError):
    """Another process holds the study, or has written to it since this one did."""


class CheckpointError(TunerError):
    """A checkpoint that is missing or not what was recorded."""


class WorkerError(TunerError):
    """A worker that could not be started or kept dying; the message ends with its log."""


class RoundStopped(TunerError):
    """A round stopped half-way for a reason outside of it, such as a full disk; the same command resumes."""


class Interrupted(TunerError):
    """The user stopped the run; all progress is saved."""

    exit_code = 130


def shown(raw: Any) -> str:
    """What the file says, short enough for a message: text in quotes, anything else as YAML writes it."""
    match raw:
        case None:
            return "no value"
        case bool():
            return str(raw).lower()
        case str():
            return repr(raw) if len(raw) <= 60 else repr(raw[:57] + "...")
        case Mapping():
            return _cut("{" + ", ".join(f"{key}: {_inner(value)}" for key, value in raw.items()) + "}")
        case list() | tuple():
            return _cut("[" + ", ".join(_inner(item) for item in raw) + "]")
        case _:
            return str(raw)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}...{text[-1]}"


_LONGEST_SHOWN = 300
"""Characters of a list or a mapping in a message."""


def last_words(error: BaseException, *but: str) -> str:
    """Return an exception's message and the line of the user's code that raised it.

    `but` are files and directories whose lines are not the user's.
    """
    others = (*but, *_NOT_THE_USERS)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(others)]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}{where}" if said else f"{type(error).__name__}{where}"


def exit_words(code: int) -> str:
    """Return how a process ended, by `Popen.returncode`."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def one_of(names: Sequence[Any]) -> str:
    """`a, b or c`."""
    *most, last = [str(name) for name in names]
    return f"{', '.join(most)} or {last}" if most else last


def refusal(expected: str, raw: Any, hint: str = "") -> str:
    """`expects a number above 0, got the text '1e-5'; ...`, for one value that is not what is allowed."""
    if raw is None:
        return f"expects {expected}, but it has no value"
    if isinstance(raw, str) and "number" in expected and is_number(raw):
        hint = f"that is text, write {raw} without quotes"
    if isinstance(raw, float) and raw.is_integer() and "whole number" in expected:
        hint = f"write {int(raw)}"
    return f"expects {expected}, got {shown(raw)}" + (f"; {hint}" if hint else "")


def is_number(text: str) -> bool:
    """Return whether text is a finite number as YAML or Python writes it."""
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _inner(raw: Any) -> str:
    return raw if isinstance(raw, str) and raw else shown(raw)
