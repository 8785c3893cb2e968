"""What `study auto` is wired to: rounds and promotions as by hand, until the playbook has had enough."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import typer

from tuner.cli.looking import find_trial
from tuner.cli.promoting import promote_round, promotion_text
from tuner.cli.running import Where, has_begun, interruptible, run_here
from tuner.cli.scoring import score_at_the_end
from tuner.errors import InputError, Interrupted
from tuner.playbook.enough import MAX_GROWTH, Enough, next_horizon
from tuner.playbook.sweep import is_sweep
from tuner.spec import RoundFile, load_round
from tuner.store import hold_study
from tuner.study.folder import open_folder
from tuner.study.pages import next_name
from tuner.study.promotion import go_on_in_passes, promoted_from
from tuner.study.results import earlier_results, reading_of


@dataclass(frozen=True)
class Ended:
    """How far the rounds came."""

    command: str
    """The one that goes on."""
    last: Path | None = None
    """File of the latest round that has begun; None when none has."""
    reason: str | None = None
    """Why there is no further round; None when the time was over first."""
    taught_nothing: bool = False
    """Whether the last round suggests no horizon at all."""
    remark: str | None = None
    """What there is to say of `data.test`, beside its score."""


def run_rounds(path: Path, *, duration: str | None, passes: int = 1, where: Where) -> Ended:
    """Run the latest round that came of a file, promote it and run the next one, until it is enough.

    With more passes than one, the first horizon is then come back to, and so on.

    Facts and files hold all that this knows, so that the same command goes on. Raises Interrupted, naming
    it, when a signal asked to stop, and InputError for a round of a sweep.
    """
    if is_sweep(name := load_round(path).spec.round):
        raise InputError(
            f"{path}: {name} is a round of a sweep, which is never promoted; give the round file that the "
            "sweep was made from"
        )
    limit = "" if duration is None else f" --for {shlex.quote(duration)}"
    again = "" if passes == 1 else f" --passes {passes}"
    ended = Ended(f"tuner study auto {shlex.quote(str(path))}{limit}{again}{where.options}")
    with interruptible(ended.command, duration=duration) as stopping:
        first = where.file(path)
        while ended.reason is None:
            file = _latest(first)
            try:
                run_here(file, where, stopping=stopping, passes=passes)
            finally:
                if has_begun(file):
                    ended = replace(ended, last=file.path)
            follows = _next_horizon(file, has_deadline=duration is not None)
            reason = follows.reason if isinstance(follows, Enough) else None
            if passes > 1:
                reason = _go_on_in_passes(file, first, passes, stopping)
            elif not isinstance(follows, Enough):
                _promote(file, follows, stopping)
            if reason is not None:
                reason = f"enough after {file.spec.round}: {reason}"
                taught_nothing = isinstance(follows, Enough) and follows.taught_nothing
                ended = replace(ended, reason=reason, taught_nothing=taught_nothing)
    if ended.reason is not None and ended.last is not None and not ended.taught_nothing:
        ended = replace(ended, remark=_score_the_best(ended.last.parent))
    return ended


def _score_the_best(directory: Path) -> str | None:
    """The study has come to its end: its best trial is scored on `data.test`; what to say beside that."""
    folder = open_folder(directory)
    trial, _ = find_trial(folder, "best")
    return score_at_the_end(folder, trial)


def _latest(file: RoundFile) -> RoundFile:
    """The end of the line of promotions that begins with a round."""
    folder = open_folder(file.directory)
    store = folder.open()
    try:
        while (name := promoted_from(folder, store, file.spec.round)) is not None:
            file = folder.plan(name).file
        return file
    finally:
        store.close()


def _next_horizon(file: RoundFile, *, has_deadline: bool) -> int | Enough:
    """The horizon of the round after a finished one, or why that is the last."""
    folder = open_folder(file.directory)
    store = folder.open()
    try:
        record = next(record for record in store.rounds() if record.name == file.spec.round)
        results, reading = reading_of(store, record)
        return next_horizon(results, reading, earlier_results(store, record), has_deadline=has_deadline)
    finally:
        store.close()


def _go_on_in_passes(
    file: RoundFile, first: RoundFile, passes: int, stopping: Callable[[], bool]
) -> str | None:
    """Write what comes next and return None, or why nothing does."""
    name = file.spec.round
    folder = open_folder(file.directory)
    with hold_study(folder.directory, folder.storage, folder.name):
        store = folder.open()
        try:
            written = go_on_in_passes(
                folder,
                store,
                first=first.spec.round,
                last=name,
                to=next_name(name),
                passes=passes,
                clock=time.time,
            )
        finally:
            store.close()
    if isinstance(written, str):
        return written
    typer.echo(promotion_text(written.document))
    if stopping():
        raise Interrupted(f"{name} is complete and {written.path.name} is written")
    return None


def _promote(file: RoundFile, max_train_steps: int, stopping: Callable[[], bool]) -> None:
    name = file.spec.round
    written = promote_round(
        open_folder(file.directory),
        to=next_name(name),
        from_round=name,
        max_train_steps=max_train_steps,
        reason=f"at most {MAX_GROWTH} times the first horizon",
        force=False,
        as_json=False,
    )
    if stopping():
        raise Interrupted(f"{name} is complete and {written.name} is written")
