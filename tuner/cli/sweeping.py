"""What `study sweep` is wired to: its rounds are run, and its answer is written into the round file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path

import typer

from tuner.api.running import Where, has_begun
from tuner.cli.running import interruptible, run_shown
from tuner.errors import InputError, TunerError
from tuner.playbook.sweep import (
    PERFECT_ACCURACY,
    PERFECT_LOSS,
    ComputeBound,
    FirstHorizon,
    SweepDecision,
    SweepProblem,
    answer_without_a_sweep,
)
from tuner.spec import RoundFile, edit_round, load_round, read_round
from tuner.study.checking import mean
from tuner.study.disk import taken_back
from tuner.study.folder import is_rehearsal
from tuner.study.plan import RoundPlan
from tuner.study.promotion import write_round_file
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon

MOST_EPOCHS = 1_000_000


def sweep_file(
    path: Path, *, duration: str | None, where: Where, epochs: float | None = None
) -> tuple[str, Path | None]:
    """Sweep, or go on with it, and write what was found into the round file.

    `epochs` are taken as its `run.production_steps`, which is written with the answer. Returns the command
    that comes next and the round file that it is to run, in whose folder it is to be typed; None when the
    time was over first. Raises TunerError when the sweep gives no answer, and Interrupted, naming the command
    that goes on, when a signal asked to stop.
    """
    length = "" if epochs is None else f" --epochs {epochs:g}"
    limit = "" if duration is None else f" --for {shlex.quote(duration)}"
    command = f"tuner study sweep {shlex.quote(str(path))}{length}{limit}{where.options}"
    if epochs is not None and not 0 < epochs <= MOST_EPOCHS:
        raise InputError(f"--epochs {epochs:g}: expects a number above 0, and at most {MOST_EPOCHS:,}")
    if epochs is not None and (where.engine or load_round(path).spec.run.engine) == "simulated":
        raise InputError("--epochs: a rehearsal opens no data to count rows of; write run.production_steps")
    answer: SweepDecision | None = None
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
        if epochs is not None:
            file = _with_epochs(file, epochs)
        answer = _answer_at_once(file)
        while answer is None:
            found = next_sweep(file)
            if isinstance(found, RoundFile):
                _run(found, where, stopping)
            else:
                answer = found
    if isinstance(answer, SweepProblem):
        raise TunerError(answer.message)
    if not isinstance(answer, (FirstHorizon, ComputeBound)):
        return command, None
    _say_and_write(file, answer)
    return f"tuner study run {shlex.quote(path.name)}", file.path


def _with_epochs(file: RoundFile, epochs: float) -> RoundFile:
    """The file with so many epochs of its training rows as `run.production_steps`, said and not yet written.

    Raises InputError where it is less than `max_train_steps`.
    """
    from tuner.cli.preparing import prepared

    planned = RoundPlan(file)
    with taken_back(planned.cache):
        rows = len(prepared(planned.absolute, planned.cache).train)
        batch_size = round(mean(planned.space["batch_size"]))
        steps = math.ceil(epochs * rows / batch_size)
        typer.echo(
            f"--epochs {epochs:g}: of {rows} rows, {batch_size} a step: {steps} steps, the longest of a sweep"
        )
        comments = {"run.production_steps": f"{epochs:g} x {rows} rows"}
        return read_round(edit_round(file.text, {"run.production_steps": steps}, comments), file.path)


def _run(found: RoundFile, where: Where, stopping: Callable[[], bool]) -> None:
    try:
        run_shown(found, where, stopping=stopping)
    except InputError:
        if not has_begun(found):
            found.path.unlink(missing_ok=True)
        raise


def _answer_at_once(file: RoundFile) -> ComputeBound | None:
    """What the number of training rows says alone; nothing in a rehearsal, which opens no data."""
    planned = RoundPlan(read_round(first_sweep(file), file.path))
    if is_rehearsal(file):
        return None
    from tuner.cli.preparing import prepared

    spec = planned.absolute
    with taken_back(planned.cache):
        data = prepared(spec, planned.cache)
    return answer_without_a_sweep(
        production_steps=spec.run.production_steps,
        batch_size=round(mean(planned.space["batch_size"])),
        train_rows=len(data.train),
    )


def _say_and_write(file: RoundFile, answer: FirstHorizon | ComputeBound) -> None:
    match answer:
        case FirstHorizon(max_train_steps=steps, learning_rate=rate):
            typer.echo(
                f"The training set is fitted in {steps} steps, fastest at a constant learning rate of "
                f"{rate:.3g}: there the mean loss of a sample of training rows is at most {PERFECT_LOSS}, or "
                f"{PERFECT_ACCURACY:.0%} of its target tokens are predicted first."
            )
        case ComputeBound(message=message):
            typer.echo(message)
    before = file.spec.max_train_steps
    if has_begun(file):
        typer.echo(
            f"{file.spec.round} has begun, so {file.path.name} keeps its {before} steps: begin another round"
        )
        return
    found = with_first_horizon(file, answer)
    write_round_file(file.path, found.text, force=True, advice="")
    typer.echo(f"wrote {file.path}: max_train_steps {before} -> {found.spec.max_train_steps}")
