"""The learning rate over a run, and how it changes with the length of the run.

A step is one optimizer update; every schedule starts with `warmup_steps` of linear warmup. What follows is
described in `tuner.methods.schedules`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tuner.methods.schedules import DECAY_STEPS, Schedule, schedule, warmup_length
from tuner.records import Choices, Fixed, Hyperparameters, Space, Value

ComparisonRule: TypeAlias = Literal["auto"] | bool
"""`run.decay_branches`: one comparison run if a round needs it, those of all leading trials, or none."""

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
    """Return the schedule of a trial, by default `constant`. Rule: this project's decision."""
    return schedule(str(hyperparameters.get("schedule", "constant")))


def evaluation_steps(max_train_steps: int, every_steps: int) -> tuple[int, ...]:
    """Return the steps at which a trial is evaluated: 0, every `every` steps, and always the last one.

    Rule: Deep Learning Tuning Playbook, "Setting up periodic evaluations": at regular step intervals. That
    step 0 and the horizon are always among them is this project's decision.
    """
    return (*range(0, max_train_steps, every_steps), max_train_steps)


def trunk_end(hyperparameters: Hyperparameters, max_train_steps: int) -> int | None:
    """Return the last step of the stable phase, which does not depend on the horizon; None if there is none.

    T - D for `linear`, T for `constant` (and where no schedule is named), None for `cosine`. Rule: this
    project's decision, "Trunk".
    """
    decay = schedule_of(hyperparameters).decay_length(hyperparameters)
    return None if decay is None else max_train_steps - decay


def step_at_rate_share(hyperparameters: Hyperparameters, max_train_steps: int, share: float) -> float:
    """Return the step by which this share, in (0, 1], of the run's summed learning rate was spent.

    Fractional, since rounding up would leave 16% of a short cosine where a quarter is asked for. At a
    constant rate it is the same share of the steps, at a falling one it comes sooner: three quarters of a
    cosine are spent after 0.44 of its steps. Rule: this project's decision, "right".
    """
    spent = list(itertools.accumulate(_multipliers(hyperparameters, range(max_train_steps), max_train_steps)))
    wanted = share * spent[-1]
    step = bisect.bisect_left(spent, wanted)
    before = spent[step - 1] if step else 0.0
    in_step = spent[step] - before
    return step + (wanted - before) / in_step if in_step > 0 else step + 1.0


def decay_length(hyperparameters: Hyperparameters) -> int:
    """Return the steps of decay after a stable phase; 0 if there is no decay or no stable phase.

    Rule: this project's decision: the schedules of `multiplier`.
    """
    return schedule_of(hyperparameters).decay_length(hyperparameters) or 0


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


def shorter_decay(hyperparameters: Hyperparameters, old_horizon: int, new_horizon: int) -> int:
    """Return the length of a decay with the same share of a shorter run, in whole steps.

    At least one step where there is a decay. Rule: this project's decision, "Comparison runs".
    """
    decay = decay_length(hyperparameters)
    return max(1, round(new_horizon * decay / old_horizon)) if decay else 0


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
        start = horizon - shorter_decay(hyperparameters, max_train_steps, horizon)
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


def can_decay_linearly(space: Space) -> bool:
    """Return whether a trial of the space may have a linear decay, which uses `decay_steps`.

    Rule: this project's decision: the schedules of `multiplier`.
    """
    match space.get("schedule"):
        case Fixed(value=value):
            return _has_decay(value)
        case Choices(values=values):
            return any(_has_decay(value) for value in values)
        case _:
            return False


def _has_decay(name: Value) -> bool:
    return DECAY_STEPS in schedule(str(name)).hyperparameters


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
    has_trunk = trunk_end(hyperparameters, new_horizon) is not None
    decay_gains = decay_length(hyperparameters) - decay_length(old) if has_trunk else num_gained
    gained = range(new_horizon - min(max(0, decay_gains), num_gained), new_horizon)
    return sum(rate < TINY_RATE for rate in _multipliers(hyperparameters, gained, new_horizon)) / num_gained


def _multipliers(
    hyperparameters: Hyperparameters, updates_done: Iterable[int], max_train_steps: int
) -> Iterator[float]:
    """Return the learning rates as shares of the peak, as for `multiplier`."""
    return (multiplier(done, hyperparameters, max_train_steps) for done in updates_done)
