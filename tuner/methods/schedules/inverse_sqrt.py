"""The inverse square root of the step, starting at the peak after the warmup.

Vaswani et al. 2017, "Attention Is All You Need", section 5.3: rate ~ min(step^-0.5, step * warmup^-1.5). It
does not depend on the horizon, so the whole schedule is a stable phase.
"""

from __future__ import annotations

import math

from tuner.methods.schedules import Schedule, warmup_length
from tuner.records import Hyperparameters


def _timescale(values: Hyperparameters) -> int:
    return max(1, warmup_length(values))


def _multiplier(updates_done: int, values: Hyperparameters, max_train_steps: int) -> float:
    timescale = _timescale(values)
    return 1.0 / math.sqrt((updates_done + timescale - warmup_length(values)) / timescale)


INVERSE_SQRT = Schedule(
    name="inverse_sqrt",
    multiplier=_multiplier,
    trainer_scheduler=lambda values, steps, horizon: ("inverse_sqrt", {"timescale": _timescale(values)}),
    trainer_names=("inverse_sqrt",),
    aliases=("inverse_square_root", "inv_sqrt", "rsqrt", "noam"),
)
