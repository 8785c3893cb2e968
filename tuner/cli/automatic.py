"""`study auto`: its rounds shown live, its promotions printed, its end said."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer

from tuner.api.automatic import Automatic, refuse_sweep
from tuner.api.running import Where
from tuner.cli.promoting import promotion_text
from tuner.cli.running import interruptible, run_shown
from tuner.cli.scoring import score_at_the_end
from tuner.spec import load_round
from tuner.study.folder import open_folder
from tuner.study.looking import find_trial


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

    With more passes than one, the first horizon is then come back to, and so on. Raises Interrupted, naming
    the command that goes on, when a signal asked to stop, and InputError for a round of a sweep.
    """
    refuse_sweep(load_round(path))
    limit = "" if duration is None else f" --for {shlex.quote(duration)}"
    again = "" if passes == 1 else f" --passes {passes}"
    ended = Ended(f"tuner study auto {shlex.quote(str(path))}{limit}{again}{where.options}")
    rounds: Automatic | None = None
    with interruptible(ended.command, duration=duration) as stopping:
        rounds = Automatic(
            first=where.file(path),
            run=lambda file: run_shown(file, where, stopping=stopping, passes=passes),
            promoted=_say,
            stopping=stopping,
            passes=passes,
            has_deadline=duration is not None,
        )
        enough = rounds.run_until_enough()
        ended = replace(ended, reason=enough.reason, taught_nothing=enough.taught_nothing)
    if rounds is not None and rounds.last is not None:
        ended = replace(ended, last=rounds.last.path)
    if ended.reason is not None and ended.last is not None and not ended.taught_nothing:
        ended = replace(ended, remark=_score_the_best(ended.last.parent))
    return ended


def _say(document: Mapping[str, Any]) -> None:
    typer.echo(promotion_text(document))


def _score_the_best(directory: Path) -> str | None:
    """The study has come to its end: its best trial is scored on `data.test`; what to say beside that."""
    folder = open_folder(directory)
    trial, _ = find_trial(folder, "best")
    return score_at_the_end(folder, trial)
