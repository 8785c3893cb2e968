"""The content shared by all reports on a round: analysis, table rows, next command."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tuner.methods.variants.initialisations import starts_with_zero_b
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reading import Reading
from tuner.playbook.results import Finding, RoundResults
from tuner.playbook.selection import best_evaluation, ranked, settled_steps
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
"""Number of columns of words at the end of a row; those after the first and before them are numbers."""


def best_first(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """Sort one round's trials: complete ones by the objective, then the others by number."""
    order = [trial for trial, _ in ranked(trials)]
    placed = {trial.number for trial in order}
    rest = (trial for trial in trials if trial.number not in placed)
    return (*order, *sorted(rest, key=lambda trial: trial.number))


def metric_of(trials: Iterable[Trial]) -> str | None:
    """Return the metric that chose best steps; None if the loss did."""
    chosen = (e.objective for trial in trials for e in trial.evaluations[:1])
    return next((objective.metric for objective in chosen if objective is not None), None)


def have_answered(trials: Iterable[Trial]) -> bool:
    """Return whether a table of these trials needs a column for answers."""
    return any(trial.answer_score is not None for trial in trials)


def trial_headers(names: Sequence[str], *, answers: bool, metric: str | None = None) -> tuple[str, ...]:
    """Return the headers of `trial_rows`."""
    more = (*((format.ANSWERS_HEADER,) if answers else ()), *((metric,) if metric else ()))
    return ("trial", *names, *more, "best loss", "best step", "settled", "state", "remarks")


def trial_rows(
    trials: Sequence[Trial], names: Sequence[str], *, answers: bool, metric: str | None = None
) -> list[tuple[str, ...]]:
    """Return a row for each trial: its number, hyperparameters, result and remarks.

    `answers` adds the answer score, `metric` the value of the metric that chose the best step.
    """
    settled = settled_steps([trial.evaluations for trial in trials])
    return [
        _cells(trial, step, names, answers=answers, metric=metric)
        for trial, step in zip(trials, settled, strict=True)
    ]


def _cells(
    trial: Trial, settled: int | None, names: Sequence[str], *, answers: bool, metric: str | None
) -> tuple[str, ...]:
    best = best_evaluation(trial.evaluations)
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
"""Findings that repeat the evidence; overfitting has separate advice."""


@dataclass(frozen=True)
class RoundReport:
    """A round, the playbook's analysis of it, and what to do next.

    What many parts of a report ask of the trials is found out once, with the first of them.
    """

    study: str
    goal: str
    """The user's goal; may be empty."""
    record: RoundRecord
    results: RoundResults
    reading: Reading
    adapters: Mapping[int, str]
    """Path of the best adapter, for each trial that has one."""
    next_command: str
    """The next command."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Versions and hardware by name, as the report shows them."""
    scored: tuple[Trial, ...] = ()
    """The study's trials scored on `data.test`, in order of scoring."""
    ended_because: str | None = None
    """Why `study auto` runs no further round; None if it did not end the study."""
    branches_left: int = 0
    """Comparison runs that are still due."""
    importance: Mapping[str, float] = field(default_factory=dict)
    """Share of each searched hyperparameter in the differences between trials; empty for too few trials."""
    is_dry_run: bool = False
    """Whether the losses come from a formula and nothing was trained."""

    @property
    def name(self) -> str:
        """`STUDY/ROUND`."""
        return f"{self.study}/{self.record.name}"

    @property
    def max_train_steps(self) -> int:
        """The round's horizon."""
        return self.results.max_train_steps

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Complete trials by the objective, then the others by number."""
        return best_first(self.results.trials)

    @cached_property
    def ranked(self) -> tuple[tuple[Trial, Evaluation], ...]:
        """Complete trials with their best evaluations, best first."""
        return ranked(self.results.trials)

    @property
    def num_promised(self) -> int:
        """Trials needed to complete the round: fewer than wanted if the space has fewer points."""
        return int(min(self.num_wanted, num_points(self.results.space)))

    @property
    def num_wanted(self) -> int:
        """`search.trials` of the round file; the number of results if not recorded."""
        search = self.record.spec.get("search", {})
        return int(search.get("trials", len(self.results.results)))

    @property
    def is_finished(self) -> bool:
        """Whether every trial has a result and every comparison run has ended."""
        return len(self.results.results) >= self.num_promised and not self.branches_left

    @property
    def has_test(self) -> bool:
        """Whether the round file has `data.test`."""
        return bool(self.record.spec.get("data", {}).get("test"))

    @property
    def counts(self) -> dict[str, int]:
        """Number of trials in each state that has any."""
        by_state = {state: sum(t.state is state for t in self.results.trials) for state in TrialState}
        return {state.value: count for state, count in by_state.items() if count}

    @property
    def base_loss(self) -> float | None:
        """Loss of the base model, if measured and finite."""
        exact = sorted(self.trials, key=lambda trial: not starts_with_zero_b(trial.hyperparameters))
        first = (trial.evaluations[0] for trial in exact if trial.evaluations)
        losses = (evaluation.eval_loss for evaluation in first if evaluation.step == 0)
        return next((loss for loss in losses if math.isfinite(loss)), None)

    @property
    def executed_steps(self) -> int:
        """Total steps run by trials and comparison runs."""
        return sum(trial.executed_steps for trial in self.results.trials) + self.branch_steps

    @property
    def branch_steps(self) -> int:
        """Steps run by comparison runs."""
        return sum(branch.executed_steps for branch in self.record.branches)

    @property
    def inherited_steps(self) -> int:
        """Steps saved because trials continued from other trials."""
        return sum(trial.continues.step for trial in self.results.trials if trial.continues)

    @property
    def throughput_rows(self) -> list[tuple[str, str, str]]:
        """Rows under `format.THROUGHPUT_HEADERS`: of all workers, then of each node of a cluster."""
        record = self.record
        return format.throughput_rows(record.throughput, record.throughput_by_node, record.node_changes)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings beyond the evidence, most serious first."""
        order = ("problem", "warning", "info")
        more = [finding for finding in self.reading.findings if finding.rule not in SAID_BY_THE_EVIDENCE]
        return tuple(sorted(more, key=lambda finding: order.index(finding.severity)))

    @cached_property
    def shown_names(self) -> tuple[str, ...]:
        """Hyperparameters with a column: searched ones, and others that vary."""
        names = dict.fromkeys((*searched(self.results.space), *format.varying(self.results.trials)))
        return tuple(names)

    @property
    def kept(self) -> str:
        """As in `RoundRecord`."""
        return self.record.kept

    @property
    def fixed(self) -> dict[str, str]:
        """Values shared by every trial, as text: the conclusions hold for these only."""
        shown = self.shown_names
        return {
            name: describe(dimension)
            for name, dimension in self.results.space.items()
            if isinstance(dimension, (Fixed, TimesSqrtRank)) and name not in shown
        }


def describe(dimension: Dimension) -> str:
    """Describe a hyperparameter's search space: `1e-5 to 0.003, logarithmic`."""
    match dimension:
        case Fixed(value=value):
            return format.value(value)
        case Choices(values=values):
            return ", ".join(format.value(value) for value in values)
        case Range(low=low, high=high, log=log):
            return f"{format.number(low)} to {format.number(high)}{', logarithmic' if log else ''}"
        case TimesSqrtRank(factor=factor):
            return f"{format.number(factor)} x sqrt(lora_r)"
