"""What running a round file would mean: steps, epochs, tokens, evaluation's share, checkpoint disk, hours."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tuner.config import RoundSpec
from tuner.data import PreparedData
from tuner.playbook.comparison_runs import expected_runs
from tuner.playbook.schedule import ComparisonRun, evaluation_steps
from tuner.records import Choices, Dimension, Fixed, Range
from tuner.report.documents import RoundPlan as PlannedRound
from tuner.study.disk import checkpoint_bytes
from tuner.study.retention import num_kept


@dataclass(frozen=True, slots=True)
class Work:
    """What a round's trials and comparison runs do at most, all together."""

    steps: int
    """Updates, those of the comparison runs included."""
    evaluations: int
    """Without those of the untouched base."""
    branches: int = 0
    branch_steps: int = 0


def planned_work(spec: RoundSpec) -> Work:
    """The work of a round whose trials begin at step 0 and end complete, with the most comparison runs."""
    horizon, every, trials = spec.max_train_steps, spec.evaluation.every_steps, spec.num_trials
    steps, evaluations = trials * horizon, trials * (len(evaluation_steps(horizon, every)) - 1)
    runs = max(_expected_runs(spec), key=lambda runs: sum(run.num_steps for run in runs))
    compared = sum(run.num_steps for run in runs)
    made = sum(step > run.from_step for run in runs for step in evaluation_steps(run.max_train_steps, every))
    return Work(steps + compared, evaluations + made, len(runs), compared)


def _expected_runs(spec: RoundSpec) -> Iterator[tuple[ComparisonRun, ...]]:
    """The comparison runs for each schedule and the ends of its lengths, if all trials have those."""
    space, trials = spec.space(), spec.num_trials
    # A trial that continues another's may have no checkpoint where its comparison run would start.
    continue_others = any("continues" in entry for entry in spec.search.enqueue)
    kept = 0 if continue_others else num_kept(trials, spec.checkpoints.most_kept_trials)
    for schedule, warmup, decay in itertools.product(
        _values(space["schedule"]), _ends(space["warmup_steps"]), _ends(space.get("decay_steps", Fixed(0)))
    ):
        yield expected_runs(
            trials,
            {"schedule": schedule, "warmup_steps": warmup, "decay_steps": decay},
            spec.max_train_steps,
            rule=spec.run.decay_branches,
            num_kept=kept,
        )


def planned_round(spec: RoundSpec, data: PreparedData, *, adapter_weights: int) -> PlannedRound:
    """The plan of a round. `adapter_weights` is the number of weights of its largest adapter."""
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
    )


def planned_hours(spec: RoundSpec, *, seconds_per_step: float, seconds_per_evaluation: float) -> float:
    """Hours of a round, from what a trial's step and evaluation take as its share of a worker's time."""
    work = planned_work(spec)
    return (work.steps * seconds_per_step + work.evaluations * seconds_per_evaluation) / 3600


def mean(dimension: Dimension) -> float:
    """The middle of what a number may be."""
    match dimension:
        case Fixed(value=value):
            return float(value)  # type: ignore[arg-type]
        case Choices(values=values):
            return float(sum(map(float, values))) / len(values)  # type: ignore[arg-type]
        case Range(low=low, high=high):
            return (low + high) / 2
        case other:
            raise TypeError(f"{other} is no number")


def _ends(dimension: Dimension) -> tuple[int, ...]:
    """The least and the most that a length may be, and what is listed between."""
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
