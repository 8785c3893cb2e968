"""The peak rate until the end."""

from __future__ import annotations

from tuner.methods.schedules import Schedule

CONSTANT = Schedule(
    name="constant",
    multiplier=lambda updates_done, values, max_train_steps: 1.0,
    trainer_scheduler=lambda values, steps, horizon: ("constant_with_warmup", {}),
    trainer_names=("constant", "constant_with_warmup"),
    aliases=("constant_with_warmup", "flat"),
)
