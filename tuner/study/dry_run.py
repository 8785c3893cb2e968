"""Dry runs of a round, in a separate folder, so that no real round changes.

The folder `dry-run/` beside the round file is a study like any other, with its own files, database and
checkpoints; its files have `run.engine: simulated`, and every command works in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tuner.config import RoundFile, edit_round, load_round, read_round
from tuner.errors import InputError, RoundFileError
from tuner.study.folder import dry_run_folder, is_dry_run
from tuner.study.plan import RoundPlan
from tuner.study.run import refuse_changed_file

_DATABASE = "tuner.db"


def dry_run_file(file: RoundFile) -> RoundFile:
    """Return the round's copy under `dry-run/`, written if it differs; a file of a dry run is returned
    unchanged.

    Raises InputError if the copy cannot be written, or if the dry run started with another file.
    """
    if is_dry_run(file):
        return file
    path = dry_run_folder(file.directory) / file.path.name
    text = _text(file)
    copy = read_round(text, path)
    try:
        refuse_changed_file(RoundPlan(copy))
    except RoundFileError as error:
        raise InputError(
            f"{error}\nFor a dry run of the current {file.path.name}, delete {path.parent}"
        ) from error
    try:
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return copy


@contextmanager
def forgotten_if_refused(file: RoundFile) -> Iterator[None]:
    """Delete the copy of a dry run that has no database yet, and its folder, if the block refuses it.

    A copy that the user has changed stays.
    """
    try:
        yield
    except InputError:
        if is_dry_run(file) and not (file.directory / _DATABASE).exists() and _is_copy(file):
            file.path.unlink(missing_ok=True)
            if not any(file.directory.iterdir()):
                file.directory.rmdir()
        raise


def _is_copy(file: RoundFile) -> bool:
    """Return whether a file of a dry run is as `dry_run_file` would write it now."""
    try:
        return file.text == _text(load_round(file.directory.parent / file.path.name))
    except InputError:  # there is none, or it is another one by now
        return False


def _text(file: RoundFile) -> str:
    return edit_round(file.text, _changes(file), {"run.engine": "a dry run: nothing is trained"})


def _changes(file: RoundFile) -> dict[str, Any]:
    """Return the copy's changes: its own database and checkpoints, the same model and data."""
    written, absolute = file.spec, file.spec.absolute(file.directory)
    changes: dict[str, Any] = {
        "run.engine": "simulated",
        "storage": f"sqlite:///{_DATABASE}",
        "checkpoints.directory": "runs",
        "goal": f"Dry run with synthetic losses. {written.goal}".strip(),
    }
    if absolute.model.path != written.model.path:
        changes["model.path"] = absolute.model.path
    answers, moved_answers = written.evaluation.answers, absolute.evaluation.answers
    if answers is not None and moved_answers is not None and answers.metric != moved_answers.metric:
        changes["evaluation.answers.metric"] = moved_answers.metric
    for name in ("train", "eval", "test"):
        sources, moved = getattr(written.data, name), getattr(absolute.data, name)
        if sources != moved:
            changes[f"data.{name}"] = [
                {**source.model_dump(mode="json", exclude_defaults=True), "path": there.path}
                for source, there in zip(sources, moved, strict=True)
            ]
    return changes
