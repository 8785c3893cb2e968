"""Answers on disk, one JSON object a line: each is saved when generated, and none is generated twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tuner.errors import InputError, StorageError
from tuner.whole import written_whole

_BEGINNING = b'{"row": '
"""The first characters of every line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a row."""

    row: int
    """As `Prompt.row`."""
    prompt: str
    """The prompt as the model received it."""
    answer: str | None = None
    """With the adapter; None if it was not requested."""
    base: str | None = None
    """Without it; None if it was not requested."""
    made_from: str = ""
    """Hash of all that determines the answer: prompt, trial, options."""

    def line(self) -> str:
        """Return the answer as a line of a file."""
        said = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(said, ensure_ascii=False) + "\n"


class AnswerFile:
    """The answer file of an interrupted run, or a new one.

    A line that was cut off by a crash counts as not written. The file is unchanged until `open`.
    """

    def __init__(self, path: Path, expected: Mapping[int, str]) -> None:
        """`expected` has `made_from` by row.

        Raises InputError if the file contains anything else, so that it is not overwritten.
        """
        self._path = path
        self._expected = expected
        self._stream: IO[bytes] | None = None
        if not path.parent.is_dir():
            raise InputError(f"{path}: directory {path.parent} does not exist")
        self._lines, self._whole_bytes, self._read_bytes = self._read()

    @property
    def rows(self) -> frozenset[int]:
        """Return the rows that have an answer."""
        return frozenset(self._lines)

    def open(self) -> None:
        """Remove a half-written line and prepare to append.

        Raises StorageError, also if another process has written since the file was read.
        """
        try:
            self._stream = self._path.open("ab")
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked, found = os.fstat(self._stream.fileno()), self._path.stat()
        except BlockingIOError as error:
            raise StorageError(f"{self._path}: another process is writing to it") from error
        except OSError as error:
            raise StorageError(f"{self._path}: cannot be written: {error.strerror}") from error
        if found.st_ino != locked.st_ino or found.st_size != self._read_bytes:
            self._stream.close()
            raise StorageError(
                f"{self._path}: another process has written to it in the meantime; run the same command "
                "again to continue"
            )
        self._stream.truncate(self._whole_bytes)

    def __enter__(self) -> AnswerFile:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, answers: Sequence[Answer]) -> None:
        """Write answers and sync them to the disk."""
        assert self._stream is not None
        lines = {answer.row: answer.line().encode() for answer in answers}
        self._stream.write(b"".join(lines.values()))
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._lines |= lines

    def close(self) -> None:
        """Sort the answers by row once every row has one."""
        if self._stream is None:
            return
        if list(self._lines) != sorted(self._lines) and self._lines.keys() >= self._expected.keys():
            with written_whole(self._path) as ordered:
                ordered.write_bytes(b"".join(line for _, line in sorted(self._lines.items())))
        self._stream.close()

    def _read(self) -> tuple[dict[int, bytes], int, int]:
        """Return the lines by row, and the file's bytes without and with a half-written last line."""
        try:
            text = self._path.read_bytes()
        except FileNotFoundError:
            return {}, 0, 0
        except OSError as error:
            raise InputError(f"{self._path}: cannot be read: {error.strerror}") from error
        *lines, rest = text.split(b"\n")
        if not (rest.startswith(_BEGINNING) or _BEGINNING.startswith(rest)):
            raise self._foreign(len(lines) + 1, "this line is not an answer")
        found = {}
        for number, line in enumerate(lines, start=1):
            row, made_from = self._parsed(line, number)
            if self._expected.get(row) != made_from:
                raise self._foreign(number, "this line was made from another prompt, trial or options")
            found[row] = line + b"\n"
        return found, len(text) - len(rest), len(text)

    def _parsed(self, line: bytes, number: int) -> tuple[int, str]:
        try:
            value: Any = json.loads(line)
            return int(value["row"]), str(value["made_from"])
        except (ValueError, TypeError, KeyError) as error:
            raise self._foreign(number, "this line is not an answer") from error

    def _foreign(self, number: int, what: str) -> InputError:
        return InputError(
            f"{self._path}:{number}: {what}, so the file cannot be continued; "
            "delete it, or pass another --output"
        )
