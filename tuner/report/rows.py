"""A trial as a row of a table, the same on terminal, page and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tuner.playbook.selection import best_evaluation, ranked, settled_step
from tuner.records import Trial
from tuner.report import answered, format

NUM_WORDS = 2
"""The last columns of a row are words, those between them and the first are numbers."""


def best_first(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Complete trials by the objective, then the others by number; `trials` are those of one round."""
    order = [trial for trial, _ in ranked(trials)]
    placed = {trial.number for trial in order}
    rest = (trial for trial in trials if trial.number not in placed)
    return (*order, *sorted(rest, key=lambda trial: trial.number))


def have_answered(trials: Iterable[Trial]) -> bool:
    """Whether a table of these trials needs a column for their answers."""
    return any(trial.answer_score is not None for trial in trials)


def trial_headers(names: Sequence[str], *, answers: bool) -> tuple[str, ...]:
    """The heads of the columns of `trial_cells`."""
    more = (answered.HEADER,) if answers else ()
    return ("trial", *names, *more, "best loss", "best step", "settled", "state", "remarks")


def trial_cells(trial: Trial, names: Sequence[str], *, answers: bool) -> tuple[str, ...]:
    """A trial's number, some hyperparameters, what came of it and why; `answers` adds their score."""
    best, settled = best_evaluation(trial.evaluations), settled_step(trial.evaluations)
    continues = f"continues {trial.continues}" if trial.continues else None
    return (
        str(trial.number),
        *(format.value(trial.hyperparameters.get(name)) for name in names),
        *((answered.number(trial.answer_score),) if answers else ()),
        format.loss(best.eval_loss if best else None),
        str(best.step) if best else format.NOTHING,
        format.NOTHING if settled is None else str(settled),
        trial.state.value,
        "; ".join(remark for remark in (continues, trial.reason) if remark),
    )
