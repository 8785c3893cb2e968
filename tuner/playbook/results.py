"""What a round left, as the rules read it, a finding, as they say it, and scores that choose no step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from statistics import fmean, stdev
from typing import TypeAlias

from tuner.methods.hyperparameters import Tier
from tuner.methods.table import tier_of
from tuner.playbook.noise import Scale, loss_error
from tuner.playbook.selection import (
    ByCurve,
    LeadingTrial,
    best_whether_or_not_they_learned,
    leading_trials,
    ranked_by_curve,
    scale_of,
)
from tuner.records import LOSS, AnswerScore, Evaluation, FinalScore, Objective, Space, Trial, TrialState

Sampler: TypeAlias = str
"""A name as in `search.sampler`."""


class Severity(StrEnum):
    """How much a finding matters."""

    INFO = "info"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule of the playbook reports about a round."""

    rule: str
    """The rule's name, the same in reports and documentation."""
    severity: Severity
    message: str
    """What was measured and what to do, in a sentence or two."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The numbers behind the finding; all finite."""


def counted(quantity: int, noun: str) -> str:
    """Format a number with its noun: 1 trial, 1,200 trials. Rule: this project's decision."""
    return f"{quantity:,} {noun}" if quantity == 1 else f"{quantity:,} {noun}s"


def percent(share: float) -> str:
    """Format a share for reading: 12%, 0.34%. Rule: this project's decision: two significant digits."""
    number = 100 * share
    return f"{number:.0f}%" if abs(number) >= 9.95 else f"{number:.2g}%"


@dataclass(frozen=True, slots=True)
class BranchResult:
    """A comparison run that has ended, with a trial's loss at a shorter horizon on the same schedule."""

    trial: int
    """Number of the trial that it is compared with."""
    max_train_steps: int
    """Its own horizon."""
    evaluations: tuple[Evaluation, ...]
    """By step, with or without those before its start; the last one is at `max_train_steps`."""


@dataclass(frozen=True)
class RoundResults:
    """A round, the input of every rule. The order of `trials` has no meaning.

    What many rules ask of the trials is found out once, with the first of them: it follows from the fields.
    """

    name: str
    max_train_steps: int
    evaluate_every: int
    """Steps between evaluations."""
    space: Space
    """Every hyperparameter, including fixed ones and defaults."""
    trials: tuple[Trial, ...]
    train_rows: int = 0
    """Rows of the training set; 0 if unknown."""
    production_steps: int | None = None
    """The longest run that the user can afford."""
    worthwhile_gain: float = 0.005
    """`run.worthwhile_gain`: the share of the loss by which doubling the steps must lower it, in [0, 1)."""
    evaluation_share: float = 0.0
    """Share of the round's compute that evaluation takes, in [0, 1]: of the time if it was measured."""
    max_examples: int | None = None
    """`evaluation.max_examples`: the most examples that are evaluated; None if unknown."""
    is_sweep: bool = False
    """Whether the round belongs to a sweep, whose trials are compared with no others."""
    workload: str = ""
    """Fingerprint of base model, data, evaluation set and length; empty if unknown."""
    branches: tuple[BranchResult, ...] = field(default=())
    """Comparison runs of the round's trials, decay branches among them."""
    seconds_per_step: float | None = None
    """Measured cost of one step of a trial, including its share of evaluations."""
    sampler: Sampler = "quasi-random"
    """`search.sampler`."""
    limits: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Lowest and highest value that a hyperparameter may have, by name; None if there is none."""
    objective: Objective = LOSS
    """What its trials were ranked by."""

    tiers: Mapping[str, Tier] = field(default_factory=dict)
    """Of hyperparameters that plug-ins bring, by name; tuner's own are in the table."""

    def __post_init__(self) -> None:
        if self.max_train_steps < 1 or self.evaluate_every < 1:
            raise ValueError("a round needs at least one step and one step between evaluations")

    def tier_of(self, name: str) -> Tier:
        """How likely the best value of a hyperparameter transfers to longer runs."""
        return self.tiers.get(name) or tier_of(name)

    @cached_property
    def by_curve(self) -> ByCurve:
        """Return the complete trials with their best evaluations, best first."""
        return ranked_by_curve(self.trials)

    @cached_property
    def leading(self) -> tuple[LeadingTrial, ...]:
        """Return the leading trials, best first."""
        return leading_trials(self.trials, self.max_train_steps, by_curve=self.by_curve)

    @cached_property
    def foremost(self) -> tuple[LeadingTrial, ...]:
        """Return the leading trials, or as many of the best if none beat the base model."""
        return self.leading or best_whether_or_not_they_learned(self.by_curve, self.max_train_steps)

    @property
    def scale(self) -> Scale | None:
        """Return what differences of the objective are relative to."""
        return scale_of(self.trials, by_curve=self.by_curve)

    @cached_property
    def complete(self) -> tuple[Trial, ...]:
        """Return the trials that ran to the horizon, by number."""
        done = [trial for trial in self.trials if trial.state == TrialState.COMPLETE]
        return tuple(sorted(done, key=lambda trial: trial.number))

    @cached_property
    def results(self) -> tuple[Trial, ...]:
        """Return the trials that count towards `search.trials`, by number."""
        return tuple(sorted((t for t in self.trials if t.state.is_result), key=lambda t: t.number))

    def trial(self, number: int) -> Trial | None:
        """Return the trial with that number."""
        return next((trial for trial in self.trials if trial.number == number), None)


def answer_score(scores: Sequence[float], *, step: int, metric: str, is_objective: bool) -> AnswerScore:
    """Return the mean of at least one answer's score, and its standard error.

    `step` is that of the adapter that answered. Rule: this project's decision, "The best step of a trial":
    the step is chosen by the loss, its answers are scored once.
    """
    count = len(scores)
    return AnswerScore(
        step=step,
        metric=metric,
        mean=fmean(scores),
        standard_error=stdev(scores) / math.sqrt(count) if count > 1 else None,
        num_examples=count,
        is_objective=is_objective,
    )


def final_score(
    example_nll: Sequence[float], example_tokens: Sequence[int], *, step: int, rows: str, scored_at: float
) -> FinalScore:
    """Return the score that per-example sums and target tokens add up to.

    `rows` is the examples' fingerprint, `step` the adapter's. Rule: this project's decision, "The best step
    of a trial": the minimum over many evaluations is optimistic, this number is not.
    """
    tokens = tuple(example_tokens)
    loss = math.fsum(example_nll) / sum(tokens)
    made = Evaluation(step, loss, example_nll=tuple(example_nll), example_tokens=tokens)
    return FinalScore(
        step=step,
        loss=loss,
        standard_error=loss_error(made),
        num_examples=len(tokens),
        num_tokens=sum(tokens),
        rows=rows,
        scored_at=scored_at,
    )


def scored_trials(trials: Iterable[Trial]) -> tuple[Trial, ...]:
    """Return the trials that have a score, in the order in which they were scored.

    Rule: this project's decision, "The best step of a trial".
    """
    found = [(trial.final_score.scored_at, trial) for trial in trials if trial.final_score is not None]
    return tuple(
        trial for _, trial in sorted(found, key=lambda pair: (pair[0], pair[1].round, pair[1].number))
    )


def scored_before(trial: Trial, scored: Sequence[Trial]) -> tuple[Trial, ...]:
    """Return the trials that were scored on the same rows before this one; after any, its score is selected.

    `scored` is as `scored_trials` orders it. Rule: this project's decision, "The best step of a trial": a
    repeated look may keep the better number.
    """
    score = trial.final_score
    if score is None:
        return ()
    names = [(other.round, other.number) for other in scored]
    before = scored[: names.index((trial.round, trial.number))]
    return tuple(o for o in before if o.final_score is not None and o.final_score.rows == score.rows)
