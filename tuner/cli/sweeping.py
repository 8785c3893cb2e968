"""What `study sweep` is wired to: its rounds are run, and its answer is written into the round file."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import typer

from tuner.cli.running import Where, has_begun, interruptible, run_here
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
from tuner.spec import RoundFile, read_round
from tuner.study.checking import mean
from tuner.study.disk import taken_back
from tuner.study.folder import is_rehearsal
from tuner.study.plan import RoundPlan
from tuner.study.promotion import write_round_file
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon


def sweep_file(path: Path, *, duration: str | None, where: Where) -> tuple[str, Path | None]:
    """Sweep, or go on with it, and write what was found into the round file.

    Returns the command that comes next, and the round file that it is to run; None when the time was over
    first. Raises TunerError when the sweep gives no answer, and Interrupted, naming the command that goes
    on, when a signal asked to stop.
    """
    limit = "" if duration is None else f" --for {shlex.quote(duration)}"
    command = f"tuner study sweep {path}{limit}{where.options}"
    answer: SweepDecision | None = None
    with interruptible(command, duration=duration) as stopping:
        file = where.file(path)
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
    return f"tuner study run {path.name if is_rehearsal(file) else path}", file.path


def _run(found: RoundFile, where: Where, stopping: Callable[[], bool]) -> None:
    try:
        run_here(found, where, stopping=stopping)
    except InputError:
        if not has_begun(found):
            found.path.unlink(missing_ok=True)
        raise


def _answer_at_once(file: RoundFile) -> ComputeBound | None:
    """What the number of training rows says alone; nothing in a rehearsal, which opens no data."""
    planned = RoundPlan(read_round(first_sweep(file), file.path))
    if is_rehearsal(file):
        return None
    from tuner.data import load_tokenizer, prepare

    spec = planned.absolute
    with taken_back(planned.cache):
        data = prepare(spec, load_tokenizer(spec.model), planned.cache)
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
