"""The peak rate, and then a linear decay to 0 over the last `decay_steps`.

Constant-then-linear is this project's decision, so that runs can go on: a longer run resumes at the end of
the stable phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tuner.methods.schedules import DECAY_STEPS, DecayRule, Schedule, recut_decay, warmup_length
from tuner.records import Hyperparameters, Value


def _decay(values: Hyperparameters) -> int:
    return int(DECAY_STEPS.number(values))


def _multiplier(updates_done: int, values: Hyperparameters, max_train_steps: int) -> float:
    decay = _decay(values)
    return max(0.0, min(1.0, (max_train_steps - updates_done) / decay)) if decay else 1.0


def _rescale(values: Hyperparameters, old: int, new: int, keep: DecayRule) -> Mapping[str, Value]:
    warmup = warmup_length(values)
    decay = recut_decay(_decay(values), old_horizon=old, new_horizon=new, warmup_steps=warmup, keep=keep)
    return {DECAY_STEPS.name: decay}


def _trainer_scheduler(values: Hyperparameters, steps: int, horizon: int) -> tuple[str, Mapping[str, Any]]:
    decay = _decay(values)
    if not decay:
        return "constant_with_warmup", {}
    return "warmup_stable_decay", {
        "num_stable_steps": horizon - warmup_length(values) - decay,
        "num_decay_steps": decay,
        "decay_type": "linear",
    }


LINEAR = Schedule(
    name="linear",
    multiplier=_multiplier,
    decay_length=_decay,
    rescale=_rescale,
    hyperparameters=(DECAY_STEPS,),
    trainer_scheduler=_trainer_scheduler,
    aliases=("wsd", "warmup_stable_decay", "linear_decay", "trapezoidal"),
)
