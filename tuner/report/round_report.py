"""What every kind of report says of a round: its reading, the tables' rows, what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tuner.methods.variants.initialisations import starts_with_zero_b
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reading import Reading
from tuner.playbook.results import Finding, RoundResults
from tuner.playbook.selection import best_evaluation, ranked, settled_step
from tuner.records import (
    Choices,
    Dimension,
    Evaluation,
    Fixed,
    Range,
    RoundRecord,
    TimesSqrtRank,
    Trial,
    TrialState,
    num_points,
    searched,
)
from tuner.report import format

NUM_WORDS = 2
"""The last columns of a row are words, those between them and the first are numbers."""


def best_first(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Complete trials by the objective, then the others by number; `trials` are those of one round."""
    order = [trial for trial, _ in ranked(trials)]
    placed = {trial.number for trial in order}
    rest = (trial for trial in trials if trial.number not in placed)
    return (*order, *sorted(rest, key=lambda trial: trial.number))


def metric_of(trials: Iterable[Trial]) -> str | None:
    """The metric beside the loss by which best steps were chosen; None where the loss chose all."""
    chosen = (e.objective for trial in trials for e in trial.evaluations[:1])
    return next((objective.metric for objective in chosen if objective is not None), None)


def have_answered(trials: Iterable[Trial]) -> bool:
    """Whether a table of these trials needs a column for their answers."""
    return any(trial.answer_score is not None for trial in trials)


def trial_headers(names: Sequence[str], *, answers: bool, metric: str | None = None) -> tuple[str, ...]:
    """The heads of the columns of `trial_cells`."""
    more = (*((format.ANSWERS_HEADER,) if answers else ()), *((metric,) if metric else ()))
    return ("trial", *names, *more, "best loss", "best step", "settled", "state", "remarks")


def trial_cells(
    trial: Trial, names: Sequence[str], *, answers: bool, metric: str | None = None
) -> tuple[str, ...]:
    """A trial's number, some hyperparameters, what came of it and why.

    `answers` adds their score, `metric` the value of one by which the best step was chosen.
    """
    best, settled = best_evaluation(trial.evaluations), settled_step(trial.evaluations)
    continues = f"continues {trial.continues}" if trial.continues else None
    return (
        str(trial.number),
        *(format.value(trial.hyperparameters.get(name)) for name in names),
        *((format.answer_score(trial.answer_score),) if answers else ()),
        *((format.loss(best.value if best and best.objective else None),) if metric else ()),
        format.loss(best.eval_loss if best else None),
        str(best.step) if best else format.NOTHING,
        format.NOTHING if settled is None else str(settled),
        trial.state.value,
        "; ".join(remark for remark in (continues, trial.reason) if remark),
    )


SAID_BY_THE_EVIDENCE = frozenset(Diagnosis) - {Diagnosis.OVERFITTING}
"""Findings that repeat the evidence; overfitting has advice of its own."""


@dataclass(frozen=True, slots=True)
class RoundReport:
    """A round, what the playbook reads in it, and what the user can do with it."""

    study: str
    goal: str
    """What the user wanted to know; may be empty."""
    record: RoundRecord
    results: RoundResults
    reading: Reading
    adapters: Mapping[int, str]
    """Path of the best adapter, for each trial that has one."""
    next_command: str
    """What to type next, exactly."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and hardware by name, as the report shows them."""
    scored: tuple[Trial, ...] = ()
    """The study's trials that were scored on `data.test`, in the order in which they were."""
    ended_because: str | None = None
    """Why `study auto` runs no further round; None where it did not end the study."""
    branches_left: int = 0
    """Comparison runs that the round still owes."""

    @property
    def name(self) -> str:
        """`STUDY/ROUND`."""
        return f"{self.study}/{self.record.name}"

    @property
    def max_train_steps(self) -> int:
        """The round's horizon."""
        return self.results.max_train_steps

    @property
    def trials(self) -> tuple[Trial, ...]:
        """Complete trials by the objective, then the others by number."""
        return best_first(self.results.trials)

    @property
    def ranked(self) -> tuple[tuple[Trial, Evaluation], ...]:
        """Complete trials with their best evaluations, best first."""
        return ranked(self.results.trials)

    @property
    def num_promised(self) -> int:
        """Trials that the round is complete with: fewer than wanted where the space has fewer points."""
        return int(min(self.num_wanted, num_points(self.results.space)))

    @property
    def num_wanted(self) -> int:
        """`search.trials` of the round file; the number of results where the record does not say."""
        search = self.record.spec.get("search", {})
        return int(search.get("trials", len(self.results.results)))

    @property
    def is_finished(self) -> bool:
        """Whether every promised trial has a result, and every comparison run has ended."""
        return len(self.results.results) >= self.num_promised and not self.branches_left

    @property
    def has_test(self) -> bool:
        """Whether the round file has `data.test`."""
        return bool(self.record.spec.get("data", {}).get("test"))

    @property
    def counts(self) -> dict[str, int]:
        """Trials by state, those without any left out."""
        by_state = {state: sum(t.state is state for t in self.results.trials) for state in TrialState}
        return {state.value: count for state, count in by_state.items() if count}

    @property
    def untouched_loss(self) -> float | None:
        """The loss of the base without an adapter, where it was measured and is finite."""
        exact = sorted(self.trials, key=lambda trial: not starts_with_zero_b(trial.hyperparameters))
        first = (trial.evaluations[0] for trial in exact if trial.evaluations)
        losses = (evaluation.eval_loss for evaluation in first if evaluation.step == 0)
        return next((loss for loss in losses if math.isfinite(loss)), None)

    @property
    def executed_steps(self) -> int:
        """Steps that all trials together have run, and their comparison runs."""
        return sum(trial.executed_steps for trial in self.results.trials) + self.branch_steps

    @property
    def branch_steps(self) -> int:
        """Those that comparison runs have run."""
        return sum(branch.executed_steps for branch in self.record.branches)

    @property
    def inherited_steps(self) -> int:
        """Steps that need not be run again because trials went on from other ones."""
        return sum(trial.continues.step for trial in self.results.trials if trial.continues)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the checklist adds to the evidence, the most serious first."""
        order = ("problem", "warning", "info")
        more = [finding for finding in self.reading.findings if finding.rule not in SAID_BY_THE_EVIDENCE]
        return tuple(sorted(more, key=lambda finding: order.index(finding.severity)))

    @property
    def shown_names(self) -> tuple[str, ...]:
        """Hyperparameters worth a column: those that were searched, and those that vary nevertheless."""
        names = dict.fromkeys((*searched(self.results.space), *format.varying(self.results.trials)))
        return tuple(names)

    @property
    def fixed(self) -> dict[str, str]:
        """What every trial had in common, as text: the conclusions hold for these values."""
        return {
            name: describe(dimension)
            for name, dimension in self.results.space.items()
            if isinstance(dimension, (Fixed, TimesSqrtRank)) and name not in self.shown_names
        }


def describe(dimension: Dimension) -> str:
    """What a round file says of a hyperparameter, in words: `1e-5 to 0.003, logarithmic`."""
    match dimension:
        case Fixed(value=value):
            return format.value(value)
        case Choices(values=values):
            return ", ".join(format.value(value) for value in values)
        case Range(low=low, high=high, log=log):
            return f"{format.number(low)} to {format.number(high)}{', logarithmic' if log else ''}"
        case TimesSqrtRank(factor=factor):
            return f"{format.number(factor)} x sqrt(lora_r)"
