"""The cost of running a round file: steps, epochs, tokens, evaluation's share, checkpoint disk, hours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tuner.config import RoundSpec
from tuner.data import PreparedData
from tuner.methods.registry import is_built_in
from tuner.playbook.comparison_runs import ComparisonRun, expected_runs
from tuner.playbook.schedule import decay_lengths, evaluation_steps
from tuner.records import Choices, Dimension, Fixed, Range
from tuner.report.documents import RoundPlan as PlannedRound
from tuner.study.disk import checkpoint_bytes, num_kept


@dataclass(frozen=True, slots=True)
class Work:
    """The most work that a round's trials and comparison runs do together."""

    steps: int
    """Updates, including those of the comparison runs."""
    evaluations: int
    """Without those of the base model."""
    branches: int = 0
    branch_steps: int = 0


def planned_work(spec: RoundSpec) -> Work:
    """Return the work of a round if all trials run from step 0 to the end, with the most comparison runs."""
    horizon, every, trials = spec.max_train_steps, spec.evaluation.every_steps, spec.num_trials
    steps, evaluations = trials * horizon, trials * (len(evaluation_steps(horizon, every)) - 1)
    runs = max(_expected_runs(spec), key=lambda runs: sum(run.num_steps for run in runs))
    compared = sum(run.num_steps for run in runs)
    made = sum(step > run.from_step for run in runs for step in evaluation_steps(run.max_train_steps, every))
    return Work(steps + compared, evaluations + made, len(runs), compared)


def _expected_runs(spec: RoundSpec) -> Iterator[tuple[ComparisonRun, ...]]:
    """Return the comparison runs for each schedule and its extreme lengths, as if all trials used it."""
    space, trials = spec.space(), spec.num_trials
    # A trial that continues another may have no checkpoint at the start of its comparison run.
    continue_others = any("continues" in entry for entry in spec.search.enqueue)
    kept = 0 if continue_others else num_kept(trials, spec.checkpoints.most_kept_trials)
    lengths = [name for name in ("warmup_steps", *decay_lengths(space)) if name in space]
    ends = itertools.product(*(_ends(space[name]) for name in lengths))
    for schedule, values in itertools.product(_values(space["schedule"]), ends):
        yield expected_runs(
            trials,
            {"schedule": schedule, **dict(zip(lengths, values, strict=True))},
            spec.max_train_steps,
            rule=spec.run.decay_branches,
            num_kept=kept,
        )


def planned_commands(spec: RoundSpec, *, checkpoint_bytes: int | None = None) -> PlannedRound:
    """Return the plan of a round that runs a command, as far as it is known without one."""
    work = planned_work(spec)
    return PlannedRound(
        trials=spec.num_trials,
        max_train_steps=spec.max_train_steps,
        checkpoint_bytes=checkpoint_bytes,
        branches=work.branches,
        branch_steps=work.branch_steps,
        metric=spec.objective.metric,
        direction=spec.recorded_objective.direction.value,
    )


def planned_round(spec: RoundSpec, data: PreparedData, *, adapter_weights: int) -> PlannedRound:
    """Return the plan of a round. `adapter_weights` is the number of weights of its largest adapter."""
    work, batch_size = planned_work(spec), mean(spec.space()["batch_size"])
    trained_tokens = work.steps * batch_size * float(data.train.num_tokens.mean())
    evaluated_tokens = work.evaluations * float(data.evaluation.num_tokens.sum())
    return PlannedRound(
        trials=spec.num_trials,
        max_train_steps=spec.max_train_steps,
        epochs=spec.max_train_steps * batch_size / len(data.train),
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        tokens=round(trained_tokens),
        # A frozen base's token costs a forward pass in evaluation, twice that in training.
        evaluation_share=evaluated_tokens / (evaluated_tokens + 2 * trained_tokens),
        checkpoint_bytes=checkpoint_bytes(spec, adapter_weights),
        branches=work.branches,
        branch_steps=work.branch_steps,
        token_lengths=data.report.train.token_lengths,
        metric=spec.objective.metric,
        direction=_direction(spec),
    )


def _direction(spec: RoundSpec) -> str | None:
    """Return the objective's direction; None if it is known only to a user's metric."""
    known = spec.objective.direction is not None or is_built_in("metric", spec.objective.metric)
    return spec.recorded_objective.direction.value if known else None


def planned_hours(spec: RoundSpec, *, seconds_per_step: float, seconds_per_evaluation: float) -> float:
    """Return the hours of a round, from the worker time of one step and one evaluation of a trial."""
    work = planned_work(spec)
    return (work.steps * seconds_per_step + work.evaluations * seconds_per_evaluation) / 3600


def mean(dimension: Dimension) -> float:
    """Return the middle of a dimension's numbers."""
    match dimension:
        case Fixed(value=value):
            return float(value)  # type: ignore[arg-type]
        case Choices(values=values):
            return float(sum(map(float, values))) / len(values)  # type: ignore[arg-type]
        case Range(low=low, high=high):
            return (low + high) / 2
        case other:
            raise TypeError(f"{other} is not a number")


def _ends(dimension: Dimension) -> tuple[int, ...]:
    """Return the smallest and the largest length, and all listed ones between them."""
    match dimension:
        case Choices(values=values):
            return tuple(int(value) for value in values)  # type: ignore[arg-type]
        case Range(low=low, high=high):
            return int(low), int(high)
        case _:
            return (round(mean(dimension)),)


def _values(dimension: Dimension) -> tuple[str, ...]:
    values = dimension.values if isinstance(dimension, Choices) else (getattr(dimension, "value", ""),)
    return tuple(map(str, values))
