"""The learning rate over a run, and how it changes with the length of the run.

A step is one optimizer update; every schedule starts with `warmup_steps` of linear warmup. `constant` stays
at the peak, `linear` stays there and decays to zero over its last `decay_steps`, `cosine` decays to zero over
all steps after the warmup.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tuner.records import Choices, Fixed, Hyperparameters, Space

DecayRule: TypeAlias = Literal["steps", "share"]
"""What is kept of a linear decay when the horizon changes: its length in steps, or its share of the run."""

ComparisonRule: TypeAlias = Literal["auto"] | bool
"""`run.decay_branches`: one comparison run if a round needs it, those of all leading trials, or none."""

MIN_DECAY_DIVISOR = 5
"""No promoted decay is shorter than a fifth of the horizon. Final losses of Llama-124M after 50,000
steps: 3.108 without decay, 2.968 with a decay of 20%, 2.955 with 40%."""

TINY_RATE = 0.1
"""Below this share of the peak rate a step counts as spent at a tiny rate."""


def multiplier(
    updates_done: int, *, schedule: str, warmup_steps: int, decay_steps: int, max_train_steps: int
) -> float:
    """Return the learning rate of the next update as a share of the peak, in [0, 1].

    `updates_done` is the argument that `torch.optim.lr_scheduler.LambdaLR` passes: 0 for the first update,
    which therefore has rate 0 if there is a warmup. Only `linear` uses `decay_steps`. Rule: Deep Learning
    Tuning Playbook, "Which learning rate decay schedule is the best to use as a default?" (linear or cosine);
    constant-then-linear is this project's decision, so that runs can be continued.
    """
    if updates_done < warmup_steps:
        return updates_done / warmup_steps
    match schedule:
        case "constant":
            return 1.0
        case "linear":
            left = max_train_steps - updates_done
            return max(0.0, min(1.0, left / decay_steps)) if decay_steps else 1.0
        case "cosine":
            progress = (updates_done - warmup_steps) / max(1, max_train_steps - warmup_steps)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        case _:
            raise ValueError(f"a schedule is constant, linear or cosine; got {schedule!r}")


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
    match hyperparameters.get("schedule", "constant"):
        case "constant":
            return max_train_steps
        case "linear":
            return max_train_steps - decay_length(hyperparameters)
        case _:
            return None


def warmup_length(hyperparameters: Hyperparameters) -> int:
    """Return the steps of warmup; 0 by default. Rule: this project's decision."""
    return _steps(hyperparameters, "warmup_steps")


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
    """Return the steps of linear decay; 0 for schedules that ignore `decay_steps`.

    Rule: this project's decision: the schedules of `multiplier`.
    """
    is_linear = hyperparameters.get("schedule", "constant") == "linear"
    return _steps(hyperparameters, "decay_steps") if is_linear else 0


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
            return value == "linear"
        case Choices(values=values):
            return "linear" in values
        case _:
            return False


def recut_decay(
    decay_steps: int, *, old_horizon: int, new_horizon: int, warmup_steps: int, keep: DecayRule
) -> int:
    """Return the length of the linear decay in a run to another horizon; 0 stays 0.

    `share` keeps the share of the run. `steps` keeps the length, so that added steps run at the peak rate,
    but decays over at least 20% of the new horizon. At the same horizon both keep the length. Never longer
    than the steps after the warmup. Rule: this project's decision: of 9 comparable pairs of Llama-124M runs,
    those with the same share were better in 7, by 0.12 to 0.79% of the loss. The Deep Learning Tuning
    Playbook, "Round 2: Fewer runs, but of longer duration", keeps the length; the 20% are this project's.
    """
    if decay_steps <= 0:
        return 0
    if new_horizon == old_horizon:
        wanted = decay_steps
    elif keep == "share":
        wanted = round(new_horizon * decay_steps / old_horizon)
    else:
        wanted = max(decay_steps, math.ceil(new_horizon / MIN_DECAY_DIVISOR))
    return max(0, min(wanted, new_horizon - warmup_steps))


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
    schedule = str(hyperparameters.get("schedule", "constant"))
    warmup, decay = warmup_length(hyperparameters), decay_length(hyperparameters)
    for done in updates_done:
        yield multiplier(
            done,
            schedule=schedule,
            warmup_steps=warmup,
            decay_steps=decay,
            max_train_steps=max_train_steps,
        )


def _steps(hyperparameters: Hyperparameters, name: str) -> int:
    value = hyperparameters.get(name, 0)
    assert isinstance(value, (int, float))
    return int(value)
