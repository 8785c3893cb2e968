"""Which decay branches a round owes, and what those that have run say of shorter horizons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tuner.playbook.results import BranchResult
from tuner.playbook.schedule import DecayBranch, decay_branches
from tuner.playbook.selection import leading_trials, num_leading
from tuner.records import Branch, CheckpointKind, Hyperparameters, Trial


def expected_branches(
    num_trials: int, hyperparameters: Hyperparameters, max_train_steps: int, *, most: int | None = None
) -> tuple[DecayBranch, ...]:
    """The branches of a round of so many trials with such hyperparameters, if all of them end complete.

    `most` is how many trials keep their trunks, None for all. Rule: this project's decision, "Decay
    branches".
    """
    leading = num_leading(num_trials) if most is None else min(num_leading(num_trials), most)
    return leading * decay_branches(hyperparameters, max_train_steps)


def owed_branches(trials: Sequence[Trial], max_train_steps: int) -> tuple[Branch, ...]:
    """The branches of the leading trials that kept the trunk's checkpoint they begin at, best trial first.

    A trial that went on from a later step of an earlier round has no such checkpoint in this one. Rule: this
    project's decision, "Decay branches".
    """
    return tuple(
        Branch(lead.trial.number, planned.max_train_steps, planned.from_step)
        for lead in leading_trials(trials, max_train_steps)
        for planned in decay_branches(lead.trial.hyperparameters, max_train_steps)
        if lead.trial.checkpoint(CheckpointKind.TRUNK, planned.from_step) is not None
    )


def branches_left(
    trials: Sequence[Trial], max_train_steps: int, begun: Iterable[Branch]
) -> tuple[Branch, ...]:
    """The branches owed that have not ended, each as it stands.

    Rule: this project's decision, "Decay branches": a round is complete after them.
    """
    known = {(branch.trial, branch.max_train_steps): branch for branch in begun}
    owed = (known.get((b.trial, b.max_train_steps), b) for b in owed_branches(trials, max_train_steps))
    return tuple(branch for branch in owed if branch.state == "open")


def branch_results(trials: Iterable[Trial], begun: Iterable[Branch]) -> tuple[BranchResult, ...]:
    """What the complete branches measured: the trunk's evaluations up to where each left it, and its end.

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
