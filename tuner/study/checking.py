"""What running a round file would mean: steps, epochs, tokens, evaluation's share, checkpoint disk, hours."""

from __future__ import annotations

from dataclasses import dataclass

from tuner.data import PreparedData
from tuner.playbook.branching import expected_branches
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Choices, Dimension, Fixed, Range
from tuner.report.documents import RoundPlan as PlannedRound
from tuner.spec import RoundSpec
from tuner.study.disk import checkpoint_bytes
from tuner.study.keeping import num_kept


@dataclass(frozen=True, slots=True)
class Work:
    """What a round's trials and decay branches do, all together."""

    steps: int
    """Updates, those of the branches included."""
    evaluations: int
    """Without those of the untouched base."""
    branches: int = 0
    branch_steps: int = 0


def planned_work(spec: RoundSpec) -> Work:
    """The work of a round whose trials all begin at step 0 and end complete."""
    horizon, every, trials = spec.max_train_steps, spec.evaluation.every_steps, spec.num_trials
    steps, evaluations = trials * horizon, trials * (len(evaluation_steps(horizon, every)) - 1)
    if not spec.run.decay_branches:
        return Work(steps, evaluations)
    kept = num_kept(trials, spec.checkpoints.most_kept_trials)
    space = spec.space()
    lengths = {name: round(mean(space[name])) for name in ("warmup_steps", "decay_steps")}
    schedules = _values(space["schedule"])
    branches = [
        branch
        for schedule in schedules
        for branch in expected_branches(trials, {**lengths, "schedule": schedule}, horizon, most=kept)
    ]
    # Where the schedule is searched, the leading trials have each of them equally often.
    num, run, made = (
        round(sum(parts) / len(schedules))
        for parts in (
            [1 for _ in branches],
            [branch.decay_steps for branch in branches],
            [
                sum(step > branch.from_step for step in evaluation_steps(branch.max_train_steps, every))
                for branch in branches
            ],
        )
    )
    return Work(steps + run, evaluations + made, num, run)


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


def _values(dimension: Dimension) -> tuple[str, ...]:
    values = dimension.values if isinstance(dimension, Choices) else (getattr(dimension, "value", ""),)
    return tuple(map(str, values))
