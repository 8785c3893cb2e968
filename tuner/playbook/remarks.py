"""What a change of the search says about how many steps the next round needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tuner.playbook.carrying import longest
from tuner.playbook.curves import FITTED_TRAIN_LOSS, train_losses
from tuner.playbook.edges import number
from tuner.playbook.horizon import Diagnosis
from tuner.playbook.reading import Reading
from tuner.playbook.results import RoundResults
from tuner.records import Fixed, Space, Trial, searched

FAR_FROM_FITTED = 4 * FITTED_TRAIN_LOSS
"""Nats per token above which the training set counts as not fitted yet."""


def remarks(
    results: RoundResults,
    reading: Reading,
    space: Space,
    incumbents: Sequence[Trial],
    earlier: Sequence[RoundResults],
) -> Iterator[str]:
    """What the next round's space says of its number of steps.

    Rule: Deep Learning Tuning Playbook, "Deciding how long to train when training is not compute-bound" and
    "Deciding how long to train when training is compute-bound": more gradient noise wants more steps, a
    better tuned optimizer fewer, and regularisation helps where the training set can be fitted.
    """
    if incumbents:
        yield from _noisier_gradients(results, space, incumbents, earlier)
        yield from _other_optimizer(results, space)
        yield from _early_regularisation(reading, space, incumbents[0])


def _noisier_gradients(
    results: RoundResults, space: Space, incumbents: Sequence[Trial], earlier: Sequence[RoundResults]
) -> Iterator[str]:
    dropouts = [number(trial.hyperparameters.get("lora_dropout")) or 0.0 for trial in incumbents]
    known = max(*dropouts, _largest(results.space, "lora_dropout"))
    if (dropout := _largest(space, "lora_dropout")) > known:
        yield (
            f"lora_dropout goes up to {dropout:g}, above the {known:g} so far: gradients are noisier, so "
            "more steps may be needed."
        )
    before = _largest(earlier[-1].space, "batch_size") if earlier else 0.0
    now = _largest(space, "batch_size")
    if now < before:
        yield (
            f"The batch size went down from {before:g} to {now:g}: gradients are noisier, so more steps may "
            "be needed."
        )


def _other_optimizer(results: RoundResults, space: Space) -> Iterator[str]:
    before = results.space.get("optimizer")
    if "optimizer" in searched(space) and isinstance(before, Fixed):
        yield f"Another optimizer than {before.value} is tried: with a better one, fewer steps may do."


def _early_regularisation(reading: Reading, space: Space, best: Trial) -> Iterator[str]:
    names = [name for name in ("lora_dropout", "weight_decay") if name in searched(space)]
    lowest = min(train_losses(best.evaluations), default=0.0)
    if names and lowest > FAR_FROM_FITTED and reading.diagnosis != Diagnosis.OVERFITTING:
        yield (
            f"{' and '.join(names)} will probably not help yet: the training set is not fitted (train loss "
            f"{lowest:.2g}) and nothing overfits."
        )


def _largest(space: Space, name: str) -> float:
    dimension = space.get(name)
    return 0.0 if dimension is None else longest(dimension)
