"""`study sweep`: run the rounds of a sweep and write the result into the round file."""

from __future__ import annotations

import math
from collections.abc import Callable

from tuner.api.run import Prepare, Tell, has_begun
from tuner.config import RoundFile, edit_round, read_round
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
from tuner.study.check import mean
from tuner.study.disk import taken_back
from tuner.study.folder import is_rehearsal
from tuner.study.plan import RoundPlan
from tuner.study.promotion import write_round_file
from tuner.study.sweep import first_sweep, next_sweep, with_first_horizon

MOST_EPOCHS = 1_000_000


def sweep_round(
    file: RoundFile, *, epochs: float | None, run: Callable[[RoundFile], None], prepare: Prepare, tell: Tell
) -> FirstHorizon | ComputeBound:
    """Start or resume a sweep and write its result into the round file.

    `epochs` sets `run.production_steps`, which is written with the result. `run` starts or resumes a round;
    `tell` receives what was found and written. Raises TunerError if the sweep gives no result, and what
    running raises.
    """
    if epochs is not None:
        file = _with_epochs(file, epochs, prepare, tell)
    answer: SweepDecision | None = _answer_at_once(file, prepare)
    while answer is None:
        found = next_sweep(file)
        if isinstance(found, RoundFile):
            _run(found, run)
        else:
            answer = found
    if isinstance(answer, SweepProblem):
        raise TunerError(answer.message)
    assert isinstance(answer, (FirstHorizon, ComputeBound))
    _say_and_write(file, answer, tell)
    return answer


def refuse_epochs(epochs: float | None, *, is_rehearsal: bool) -> None:
    """Raise InputError for an impossible number of epochs."""
    if epochs is not None and not 0 < epochs <= MOST_EPOCHS:
        raise InputError(f"--epochs {epochs:g}: expects a number above 0, and at most {MOST_EPOCHS:,}")
    if epochs is not None and is_rehearsal:
        raise InputError(
            "--epochs: a dry run does not open the data to count its rows; set run.production_steps instead"
        )


def _with_epochs(file: RoundFile, epochs: float, prepare: Prepare, tell: Tell) -> RoundFile:
    """Return the file with `run.production_steps` set to this number of epochs, reported but not written.

    Raises InputError if that is less than `max_train_steps`.
    """
    planned = RoundPlan(file)
    with taken_back(planned.cache):
        rows = len(prepare(planned.absolute, planned.cache).train)
        batch_size = round(mean(planned.space["batch_size"]))
        steps = math.ceil(epochs * rows / batch_size)
        tell(
            f"--epochs {epochs:g}: of {rows} rows, {batch_size} a step: {steps} steps, the longest of a sweep"
        )
        comments = {"run.production_steps": f"{epochs:g} x {rows} rows"}
        return read_round(edit_round(file.text, {"run.production_steps": steps}, comments), file.path)


def _run(found: RoundFile, run: Callable[[RoundFile], None]) -> None:
    try:
        run(found)
    except InputError:
        if not has_begun(found):
            found.path.unlink(missing_ok=True)
        raise


def _answer_at_once(file: RoundFile, prepare: Prepare) -> ComputeBound | None:
    """Return the estimate from the number of training rows; none in a dry run, which opens no data."""
    planned = RoundPlan(read_round(first_sweep(file), file.path))
    if is_rehearsal(file):
        return None
    spec = planned.absolute
    with taken_back(planned.cache):
        data = prepare(spec, planned.cache)
    return answer_without_a_sweep(
        production_steps=spec.run.production_steps,
        batch_size=round(mean(planned.space["batch_size"])),
        train_rows=len(data.train),
    )


def _say_and_write(file: RoundFile, answer: FirstHorizon | ComputeBound, tell: Tell) -> None:
    match answer:
        case FirstHorizon(max_train_steps=steps, learning_rate=rate):
            tell(
                f"The training set is fitted in {steps} steps, fastest at a constant learning rate of "
                f"{rate:.3g}: the mean loss of a sample of training rows reaches {PERFECT_LOSS} or less, or "
                f"{PERFECT_ACCURACY:.0%} of its target tokens are predicted correctly."
            )
        case ComputeBound(message=message):
            tell(message)
    before = file.spec.max_train_steps
    if has_begun(file):
        tell(f"{file.spec.round} has started, so {file.path.name} keeps {before} steps: start another round")
        return
    found = with_first_horizon(file, answer)
    write_round_file(file.path, found.text, force=True, advice="")
    tell(f"wrote {file.path}: max_train_steps {before} -> {found.spec.max_train_steps}")
