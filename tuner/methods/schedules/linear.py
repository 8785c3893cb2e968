"""The peak rate, then a decay to 0 over the last `decay_steps`, linear or of another shape.

Constant-then-decay is this project's decision: a longer run can resume at the end of the stable phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import OneOf
from tuner.methods.schedules import DECAY_STEPS, Schedule, warmup_length
from tuner.records import Hyperparameters

_TRAINER_DECAYS = {"linear": "linear", "sqrt": "1-sqrt", "cosine": "cosine"}
"""Our shape to transformers' `decay_type`."""
DECAY_SHAPE = Hyperparameter(
    "decay_shape",
    "linear",
    OneOf(tuple(_TRAINER_DECAYS)),
    "Shape of the decay: learning rate relative to the peak after a share x of the decay. linear: 1 - x; "
    "sqrt: 1 - sqrt(x) (Haegele et al. 2024, arXiv:2405.18392); cosine: half a cosine.",
    tier=Tier.UNLIKELY,
    in_decay="shape",
)


def _decay(values: Hyperparameters) -> int:
    return int(DECAY_STEPS.number(values))


def _shape(values: Hyperparameters) -> str:
    return str(DECAY_SHAPE.value(values))


def _multiplier(updates_done: int, values: Hyperparameters, max_train_steps: int) -> float:
    decay = _decay(values)
    left = max(0.0, min(1.0, (max_train_steps - updates_done) / decay)) if decay else 1.0
    match _shape(values):
        case "sqrt":
            return 1.0 - math.sqrt(1.0 - left)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
        case _:
            return left


def _trainer_scheduler(values: Hyperparameters, steps: int, horizon: int) -> tuple[str, Mapping[str, Any]]:
    decay = _decay(values)
    if not decay:
        return "constant_with_warmup", {}
    return "warmup_stable_decay", {
        "num_stable_steps": horizon - warmup_length(values) - decay,
        "num_decay_steps": decay,
        "decay_type": _TRAINER_DECAYS[_shape(values)],
    }


LINEAR = Schedule(
    name="linear",
    multiplier=_multiplier,
    hyperparameters=(DECAY_STEPS, DECAY_SHAPE),
    trainer_scheduler=_trainer_scheduler,
    trainer_names=("linear", "warmup_stable_decay"),
    aliases=("wsd", "warmup_stable_decay", "linear_decay", "trapezoidal"),
)
