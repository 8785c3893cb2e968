"""The comparison runs that a round needs, and the losses that finished ones measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from tuner.methods.schedules import WARMUP_STEPS, warmup_length
from tuner.playbook.gain import wants_comparison
from tuner.playbook.horizon import Diagnosis, diagnose, signs
from tuner.playbook.results import BranchResult, RoundResults
from tuner.playbook.schedule import decay_length, known_schedule_of, trunk_end
from tuner.playbook.selection import num_leading
from tuner.records import Branch, CheckpointKind, Hyperparameters, Trial

ComparisonRule: TypeAlias = Literal["auto"] | bool
"""`run.decay_branches`: one comparison run if a round needs it, those of all leading trials, or none."""

_SETTLED = frozenset({Diagnosis.NO_LEARNING, Diagnosis.TOO_LONG, Diagnosis.OVERFITTING})
"""Diagnoses that hold whatever the gain of the last doubling."""


@dataclass(frozen=True, slots=True)
class ComparisonRun:
    """A run to a shorter horizon on the same schedule, which measures the loss at that horizon."""

    from_step: int
    """The stable checkpoint from which a decay branch starts; 0 from scratch."""
    max_train_steps: int
    """Its own horizon."""

    @property
    def num_steps(self) -> int:
        """Return the number of steps that it runs."""
        return self.max_train_steps - self.from_step


def decay_branches(hyperparameters: Hyperparameters, max_train_steps: int) -> tuple[ComparisonRun, ...]:
    """Return the comparison runs that can start from a stable checkpoint, by horizon.

    They end at T/2 and T/sqrt(2) and keep the decay's share of the run. Runs that would start before the
    warmup ends are left out; without a linear decay there are none. Rule: this project's decision,
    "Comparison runs".
    """
    if not 0 < decay_length(hyperparameters) <= max_train_steps:
        return ()
    branches = []
    for horizon in sorted({round(max_train_steps / 2), round(max_train_steps / math.sqrt(2))}):
        start = horizon - decay_length(_rescaled(hyperparameters, max_train_steps, horizon))
        if start >= max(1, warmup_length(hyperparameters)):
            branches.append(ComparisonRun(start, horizon))
    return tuple(branches)


def half_from_scratch(hyperparameters: Hyperparameters, max_train_steps: int) -> ComparisonRun | None:
    """Return the comparison run to T/2 that starts at step 0.

    None if warmup takes all of it, or if the rate is constant to the end, where the trial's own evaluations
    show the same. Rule: this project's decision, "Comparison runs".
    """
    half = round(max_train_steps / 2)
    is_constant = trunk_end(hyperparameters, max_train_steps) == max_train_steps
    return None if is_constant or half <= warmup_length(hyperparameters) else ComparisonRun(0, half)


def comparison_runs(
    hyperparameters: Hyperparameters, max_train_steps: int, *, rule: ComparisonRule
) -> tuple[ComparisonRun, ...]:
    """Return the comparison runs of one trial by `run.decay_branches`, by horizon.

    Decay branches if the stable phase contains their start, otherwise a run to T/2 from scratch, unless
    warmup takes all of it. Rule: this project's decision, "Comparison runs".
    """
    half = half_from_scratch(hyperparameters, max_train_steps)
    if rule is False or half is None:
        return ()
    runs = {run.max_train_steps: run for run in (half, *decay_branches(hyperparameters, max_train_steps))}
    if rule == "auto":
        return (runs[half.max_train_steps],)
    return tuple(runs[horizon] for horizon in sorted(runs))


def trunk_steps(
    hyperparameters: Hyperparameters, max_train_steps: int, *, branches: ComparisonRule
) -> tuple[int, ...]:
    """Return the steps at which a stable checkpoint is kept: the end of the stable phase and the branch
    points.

    Empty if the schedule has no stable phase, or if the warmup outlasts it. Rule: this project's decision,
    "Trunk".
    """
    end = trunk_end(hyperparameters, max_train_steps)
    if end is None or end < max(1, warmup_length(hyperparameters)):
        return ()
    planned = comparison_runs(hyperparameters, max_train_steps, rule=branches)
    return tuple(sorted({end, *(run.from_step for run in planned if run.from_step)}))


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
    possible = _possible_branches(results, rule=rule)
    return possible if rule != "auto" or _needs_comparison(results, earlier) else ()


def _possible_branches(results: RoundResults, *, rule: ComparisonRule) -> tuple[Branch, ...]:
    if rule is False or results.is_sweep:
        return ()
    leading = results.leading[:1] if rule == "auto" else results.leading
    return tuple(
        branch for lead in leading for branch in _branches_of(lead.trial, results.max_train_steps, rule=rule)
    )


def _needs_comparison(results: RoundResults, earlier: Sequence[RoundResults]) -> bool:
    if not wants_comparison(results, results.leading, earlier):
        return False
    # Runs that have ended must not change which runs are needed.
    without = replace(results, branches=()) if results.branches else results
    return diagnose(signs(without, earlier)) not in _SETTLED


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
    possible = _possible_branches(results, rule=rule)
    standing = (known.get((branch.trial, branch.max_train_steps), branch) for branch in possible)
    still_open = tuple(branch for branch in standing if branch.state == "open")
    # What is needed takes long to find out, and does not matter once all have ended.
    return still_open if still_open and owed_branches(results, earlier, rule=rule) else ()


def branch_hyperparameters(
    branch: Branch, hyperparameters: Hyperparameters, max_train_steps: int
) -> Hyperparameters:
    """Return the trial's hyperparameters with the decay cut to the comparison run's horizon.

    `max_train_steps` is the trial's. The decay keeps its share of the run, in whole steps. Rule: this
    project's decision, "Comparison runs".
    """
    return _rescaled(hyperparameters, max_train_steps, branch.max_train_steps)


def _rescaled(hyperparameters: Hyperparameters, old_horizon: int, new_horizon: int) -> Hyperparameters:
    """Return the hyperparameters with the decay's share kept, even where the warmup leaves less room."""
    own = known_schedule_of(hyperparameters)
    unhindered = {**hyperparameters, WARMUP_STEPS.name: 0}
    return {**hyperparameters, **own.rescale(unhindered, old_horizon, new_horizon, "share")}


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
