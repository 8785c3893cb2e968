"""Half a cosine from the peak rate to 0 at the horizon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tuner.methods.schedules import Schedule, warmup_length
from tuner.records import Hyperparameters


def _multiplier(updates_done: int, values: Hyperparameters, max_train_steps: int) -> float:
    warmup = warmup_length(values)
    progress = (updates_done - warmup) / max(1, max_train_steps - warmup)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def _trainer_scheduler(values: Hyperparameters, steps: int, horizon: int) -> tuple[str, Mapping[str, Any]]:
    warmup = warmup_length(values)
    waves = 0.5 * (steps - warmup) / (horizon - warmup)
    return "cosine", {} if waves == 0.5 else {"num_cycles": waves}


COSINE = Schedule(
    name="cosine",
    multiplier=_multiplier,
    has_stable_phase=False,
    trainer_scheduler=_trainer_scheduler,
    trainer_names=("cosine",),
    aliases=("cosine_annealing", "cosine_with_restarts", "cosine_with_min_lr"),
)
