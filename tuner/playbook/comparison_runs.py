"""The comparison runs that a round needs, and the losses that finished ones measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from tuner.playbook.gain import wants_comparison
from tuner.playbook.horizon import Diagnosis, diagnose, signs
from tuner.playbook.results import BranchResult, RoundResults
from tuner.playbook.schedule import (
    ComparisonRule,
    ComparisonRun,
    comparison_runs,
    decay_length,
    half_from_scratch,
    shorter_decay,
)
from tuner.playbook.selection import LeadingTrial, leading_trials, num_leading
from tuner.records import Branch, CheckpointKind, Hyperparameters, Trial

_SETTLED = frozenset({Diagnosis.NO_LEARNING, Diagnosis.TOO_LONG, Diagnosis.OVERFITTING})
"""Diagnoses that hold whatever the gain of the last doubling."""


def expected_runs(
    num_trials: int,
    hyperparameters: Hyperparameters,
    max_train_steps: int,
    *,
    rule: ComparisonRule,
    num_kept: int | None = None,
) -> tuple[ComparisonRun, ...]:
    """Return the largest number of comparison runs that a round of `num_trials` trials makes.

    `num_kept` trials still have their stable checkpoints at the end of the round; None means all. Rule: this
    project's decision, "Comparison runs".
    """
    runs = comparison_runs(hyperparameters, max_train_steps, rule=rule)
    leading = num_leading(num_trials) if rule is True else min(num_trials, 1)
    kept = leading if num_kept is None else min(leading, num_kept)
    half = half_from_scratch(hyperparameters, max_train_steps)
    return kept * runs + (leading - kept) * ((half,) if runs and half else ())


def owed_branches(
    results: RoundResults, earlier: Sequence[RoundResults] = (), *, rule: ComparisonRule
) -> tuple[Branch, ...]:
    """Return the comparison runs that a round makes after its last trial, best trial first.

    With `auto`, those of the best trial, if the gain of the last doubling decides and nothing else measures
    it well; with `True`, those of all leading trials. If the stable checkpoint is missing (it was deleted, or
    the trial continues from a later step of an earlier round), the run to T/2 starts from scratch and the one
    to T/sqrt(2) is left out. Rule: this project's decision, "Comparison runs".
    """
    if rule is False or results.is_sweep:
        return ()
    leading = leading_trials(results.trials, results.max_train_steps)
    if rule == "auto":
        leading = leading[:1] if _needs_comparison(results, leading, earlier) else ()
    return tuple(
        branch for lead in leading for branch in _branches_of(lead.trial, results.max_train_steps, rule=rule)
    )


def _needs_comparison(
    results: RoundResults, leading: Sequence[LeadingTrial], earlier: Sequence[RoundResults]
) -> bool:
    if not wants_comparison(results, leading, earlier):
        return False
    # Runs that have ended must not change which runs are needed.
    return diagnose(signs(replace(results, branches=()), earlier)) not in _SETTLED


def _branches_of(trial: Trial, max_train_steps: int, *, rule: ComparisonRule) -> Iterator[Branch]:
    half = half_from_scratch(trial.hyperparameters, max_train_steps)
    for planned in comparison_runs(trial.hyperparameters, max_train_steps, rule=rule):
        has_start = (
            planned.from_step == 0 or trial.checkpoint(CheckpointKind.TRUNK, planned.from_step) is not None
        )
        if has_start:
            yield Branch(trial.number, planned.max_train_steps, planned.from_step)
        elif half is not None and planned.max_train_steps == half.max_train_steps:
            yield Branch(trial.number, half.max_train_steps, 0)


def branches_left(
    results: RoundResults,
    earlier: Sequence[RoundResults] = (),
    *,
    rule: ComparisonRule,
    begun: Iterable[Branch],
) -> tuple[Branch, ...]:
    """Return the comparison runs that have not ended, each in its current state.

    Rule: this project's decision, "Comparison runs": a round is complete after them.
    """
    known = {(branch.trial, branch.max_train_steps): branch for branch in begun}
    owed = owed_branches(results, earlier, rule=rule)
    standing = (known.get((branch.trial, branch.max_train_steps), branch) for branch in owed)
    return tuple(branch for branch in standing if branch.state == "open")


def branch_hyperparameters(
    branch: Branch, hyperparameters: Hyperparameters, max_train_steps: int
) -> Hyperparameters:
    """Return the trial's hyperparameters with the decay cut to the comparison run's horizon.

    `max_train_steps` is the trial's. The decay keeps its share of the run, in whole steps. Rule: this
    project's decision, "Comparison runs".
    """
    if not decay_length(hyperparameters):
        return hyperparameters
    decay = shorter_decay(hyperparameters, max_train_steps, branch.max_train_steps)
    return {**hyperparameters, "decay_steps": decay}


def branch_results(trials: Iterable[Trial], begun: Iterable[Branch]) -> tuple[BranchResult, ...]:
    """Return the results of the complete comparison runs, with the evaluations before each one's start.

    Rule: this project's decision, "gain": each horizon with its own decay of the same share.
    """
    by_number = {trial.number: trial for trial in trials}
    return tuple(
        BranchResult(
            branch.trial,
            branch.max_train_steps,
            (
                *(e for e in by_number[branch.trial].evaluations if e.step <= branch.from_step),
                branch.evaluation,
            ),
        )
        for branch in begun
        if branch.state == "complete" and branch.evaluation is not None
    )
