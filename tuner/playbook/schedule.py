"""The learning rate over a run, and how it changes with the length of the run.

A step is one optimizer update; every schedule starts with `warmup_steps` of linear warmup. What follows is
described in `tuner.methods.schedules`.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence

from tuner.methods.registry import is_built_in
from tuner.methods.schedules import Schedule, decay_names, known_schedule, schedule, warmup_length
from tuner.methods.table import HYPERPARAMETERS, counting
from tuner.records import (
    CheckpointKind,
    Choices,
    Evaluation,
    Fixed,
    Hyperparameters,
    Space,
    Trial,
)

TINY_RATE = 0.1
"""Below this share of the peak rate a step counts as spent at a tiny rate."""


def multiplier(updates_done: int, hyperparameters: Hyperparameters, max_train_steps: int) -> float:
    """Return the learning rate of the next update as a share of the peak, in [0, 1].

    `updates_done` is the argument that `torch.optim.lr_scheduler.LambdaLR` passes: 0 for the first update,
    which therefore has rate 0 if there is a warmup. Rule: Deep Learning Tuning Playbook, "Which learning rate
    decay schedule is the best to use as a default?" (linear or cosine); constant-then-linear is this
    project's decision, so that runs can be continued.
    """
    warmup = warmup_length(hyperparameters)
    if updates_done < warmup:
        return updates_done / warmup
    return schedule_of(hyperparameters).multiplier(updates_done, hyperparameters, max_train_steps)


def schedule_of(hyperparameters: Hyperparameters) -> Schedule:
    """Return the schedule of a trial, imported if it is a plug-in's. Rule: this project's decision."""
    return schedule(_name(hyperparameters))


def known_schedule_of(hyperparameters: Hyperparameters) -> Schedule:
    """Return what is known of a trial's schedule without importing a plug-in that its round recorded.

    Rule: this project's decision: a report imports nothing.
    """
    return known_schedule(_name(hyperparameters))


def has_built_in_schedule(hyperparameters: Hyperparameters) -> bool:
    """Return whether the schedule is tuner's own, not a plug-in's. Rule: as for `known_schedule_of`."""
    return is_built_in("schedule", _name(hyperparameters))


def _name(hyperparameters: Hyperparameters) -> str:
    return str(HYPERPARAMETERS["schedule"].value(hyperparameters))


def evaluation_steps(max_train_steps: int, every_steps: int) -> tuple[int, ...]:
    """Return the steps at which a trial is evaluated: 0, every `every` steps, and always the last one.

    Rule: Deep Learning Tuning Playbook, "Setting up periodic evaluations": at regular step intervals. That
    step 0 and the horizon are always among them is this project's decision.
    """
    return (*range(0, max_train_steps, every_steps), max_train_steps)


def trunk_end(hyperparameters: Hyperparameters, max_train_steps: int) -> int | None:
    """Return the last step of the stable phase, which does not depend on the horizon; None if there is none.

    T - D with a decay of D steps, T without one (also where no schedule is named), None for `cosine`. Rule:
    this project's decision, "Trunk".
    """
    decay = known_schedule_of(hyperparameters).decay_length(hyperparameters)
    return None if decay is None else max_train_steps - decay


def step_at_rate_share(hyperparameters: Hyperparameters, max_train_steps: int, share: float) -> float:
    """Return the step by which this share, in (0, 1], of the run's summed learning rate was spent.

    Fractional, since rounding up would leave 16% of a short cosine where a quarter is asked for. At a
    constant rate it is the same share of the steps, at a falling one it comes sooner: three quarters of a
    cosine are spent after 0.44 of its steps. Rule: this project's decision, "right".
    """
    rates = _multipliers(hyperparameters, range(max_train_steps), max_train_steps)
    return _where_spent(list(enumerate(itertools.accumulate(rates), start=1)), share)


def step_at_recorded_share(evaluations: Sequence[Evaluation], share: float) -> float:
    """Return the same step by the learning rates that were recorded at the evaluations.

    Between two evaluations the rate is taken for their mean. It needs no multiplier, so that a report imports
    no plug-in, and agrees with promotion. Rule: this project's decision, "right".
    """
    rates = {0: 0.0} | {e.step: e.learning_rate for e in evaluations if e.learning_rate is not None}
    pairs = itertools.pairwise(sorted(rates.items()))
    spent = [((after - before) * (rate + later) / 2, after) for (before, rate), (after, later) in pairs]
    summed = itertools.accumulate(amount for amount, _ in spent)
    return _where_spent([(step, total) for (_, step), total in zip(spent, summed, strict=True)], share)


def _where_spent(spent: Sequence[tuple[int, float]], share: float) -> float:
    """Return the step at this share of the last of the sums, each given with its step."""
    if not spent:
        return 0.0
    wanted = share * spent[-1][1]
    at = bisect.bisect_left([total for _, total in spent], wanted)
    (before, spent_before), (step, total) = spent[at - 1] if at else (0, 0.0), spent[at]
    in_interval = total - spent_before
    return (
        before + (step - before) * (wanted - spent_before) / in_interval if in_interval > 0 else float(step)
    )


def decay_length(hyperparameters: Hyperparameters) -> int:
    """Return the steps of decay after a stable phase; 0 if there is no decay or no stable phase.

    Rule: this project's decision: the schedules of `multiplier`.
    """
    return known_schedule_of(hyperparameters).decay_length(hyperparameters) or 0


def schedules_of(space: Space) -> tuple[Schedule, ...]:
    """Return the schedules that trials of the space may have; none where the space does not name one.

    Rule: this project's decision: the schedule is a hyperparameter.
    """
    match space.get("schedule"):
        case Fixed(value=value):
            return (known_schedule(str(value)),)
        case Choices(values=values):
            return tuple(known_schedule(str(value)) for value in values)
        case _:
            return ()


def decay_lengths(space: Space) -> tuple[str, ...]:
    """Return the names of the space that are the length of a decay, with one of its schedules.

    Rule: this project's decision: promotion rescales them.
    """
    rows = (row for each in schedules_of(space) for row in each.decay_lengths)
    return tuple(dict.fromkeys(row.name for row in rows if row.name in space))


def tiny_rate_share(
    hyperparameters: Hyperparameters, *, old: Hyperparameters, old_horizon: int, new_horizon: int
) -> float:
    """Return the share of the steps added by a longer horizon that run below 10% of the peak rate.

    0 if none are added. Steps added to a stable phase run at the peak, so with one only steps added to the
    decay count, at the end of the run; without one, as for cosine, it is the steps beyond the old horizon.
    `old` holds the hyperparameters at the old horizon. Rule: Deep Learning Tuning Playbook, "Round 1: Many
    short training runs": a common mistake is to spend all the extra steps at too small a rate.
    """
    num_gained = new_horizon - old_horizon
    if num_gained <= 0:
        return 0.0
    end, old_end = trunk_end(hyperparameters, new_horizon), trunk_end(old, old_horizon)
    if end is None or old_end is None:
        gained = [*range(old_horizon, new_horizon)]
    else:
        decay_gains = (new_horizon - end) - (old_horizon - old_end)
        added_to_decay = min(max(0, decay_gains), num_gained)
        gained = [*range(max(0, old_end), end), *range(new_horizon - added_to_decay, new_horizon)]
    return sum(rate < TINY_RATE for rate in _multipliers(hyperparameters, gained, new_horizon)) / num_gained


def _multipliers(
    hyperparameters: Hyperparameters, updates_done: Iterable[int], max_train_steps: int
) -> Iterator[float]:
    """Return the learning rates as shares of the peak, as for `multiplier`."""
    return (multiplier(done, hyperparameters, max_train_steps) for done in updates_done)


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
    old, new = counting(old), counting(new)
    if old_horizon == new_horizon and old == new:
        return None
    of_decay = {*decay_names(old), *decay_names(new)}
    differing = sorted(n for n in {*old, *new} - of_decay if old.get(n) != new.get(n))
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
    if old_horizon == new_horizon and counting(trial.hyperparameters) == counting(new):
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
