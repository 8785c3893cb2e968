"""When a run to one horizon can continue from a run to another."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from tuner.methods.schedules import warmup_length
from tuner.playbook.schedule import trunk_end
from tuner.records import CheckpointKind, Evaluation, Hyperparameters, Trial


def can_continue(
    old: Hyperparameters,
    old_horizon: int,
    new: Hyperparameters,
    new_horizon: int,
    step: int,
    *,
    same_workload: bool = True,
) -> str | None:
    """Return why a run cannot continue from another's checkpoint at a step; None if it can.

    It can if both are still in the stable phase and only horizon and decay differ: warmup <= step <= T1 - D1
    and step <= T2 - D2. A run that is the same to the end can continue from any step. `same_workload` means
    that model, data and evaluation set are equal. Rule: this project's decision, "Trunk".
    """
    if not same_workload:
        return "model, data or evaluation set are not the same"
    if not 0 <= step <= old_horizon:
        return f"step {step} is not one of the {old_horizon} steps of the earlier run"
    if old_horizon == new_horizon and dict(old) == dict(new):
        return None
    differing = sorted(n for n in {*old, *new} - {"decay_steps"} if old.get(n) != new.get(n))
    if differing:
        return f"{', '.join(differing)} {'differs' if len(differing) == 1 else 'differ'}"
    old_end, new_end = trunk_end(old, old_horizon), trunk_end(new, new_horizon)
    if old_end is None or new_end is None:
        return f"a {new.get('schedule')} schedule depends on the horizon from its first step"
    if step < warmup_length(new):
        return f"step {step} lies within the warmup of {warmup_length(new)} steps"
    if step > old_end:
        return f"the earlier run decays from step {old_end}, before step {step}"
    if step > new_end:
        return f"the new run decays from step {new_end}, before step {step}"
    return None


def continuation_step(
    trial: Trial,
    old_horizon: int,
    new: Hyperparameters,
    new_horizon: int,
    *,
    same_workload: bool = True,
) -> tuple[int | None, str | None]:
    """Return the latest step that a new run can continue from, or None and the reason.

    A complete trial that does not change continues from its end, so nothing is left to run; all others need
    one of their stable checkpoints. Rule: this project's decision, "Trunk".
    """
    kept = [c.step for c in trial.checkpoints if c.kind == CheckpointKind.TRUNK]
    if old_horizon == new_horizon and dict(trial.hyperparameters) == dict(new):
        kept.append(old_horizon)
    reason: str | None = "no trunk checkpoint was kept"
    for step in sorted(kept, reverse=True):
        reason = can_continue(
            trial.hyperparameters, old_horizon, new, new_horizon, step, same_workload=same_workload
        )
        if reason is None:
            return step, None
    return None, reason


def inherited_evaluations(
    evaluations: Iterable[Evaluation], step: int, evaluation_steps: Collection[int]
) -> tuple[Evaluation, ...]:
    """Return the evaluations that a continuing run inherits: up to that step, on the new grid.

    Rule: this project's decision, "Trunk".
    """
    return tuple(e for e in evaluations if e.step <= step and e.step in evaluation_steps)
