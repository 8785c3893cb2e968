"""What running a round file would mean: steps, epochs, tokens, evaluation's share, checkpoint disk."""

from __future__ import annotations

from tuner.data import PreparedData
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Choices, Dimension, Fixed, Range
from tuner.report.documents import RoundPlan as PlannedRound
from tuner.spec import RoundSpec
from tuner.study.disk import checkpoint_bytes


def planned_round(spec: RoundSpec, data: PreparedData, *, adapter_weights: int) -> PlannedRound:
    """The plan of a round. `adapter_weights` is the number of weights of its largest adapter."""
    batch_size = mean(spec.space()["batch_size"])
    trained_tokens = spec.max_train_steps * batch_size * float(data.train.num_tokens.mean())
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    evaluated_tokens = evaluations * float(data.evaluation.num_tokens.sum())
    return PlannedRound(
        trials=spec.search.trials,
        max_train_steps=spec.max_train_steps,
        epochs=spec.max_train_steps * batch_size / len(data.train),
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        tokens=round(spec.search.trials * trained_tokens),
        # A frozen base's token costs a forward pass in evaluation, twice that in training.
        evaluation_share=evaluated_tokens / (evaluated_tokens + 2 * trained_tokens),
        checkpoint_bytes=checkpoint_bytes(spec, adapter_weights),
    )


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
