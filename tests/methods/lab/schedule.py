"""A rate that falls with a power of the steps that are left."""

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import Number
from tuner.methods.schedules import Schedule, warmup_length

EXPONENT = Hyperparameter(
    "decay_power", 2.0, Number(above=0), "Power of the steps that are left.", tier=Tier.UNLIKELY
)


def multiplier(updates_done, values, max_train_steps):
    left = (max_train_steps - updates_done) / max(1, max_train_steps - warmup_length(values))
    return left ** EXPONENT.number(values)


POWER = Schedule(name="power", multiplier=multiplier, has_stable_phase=False, hyperparameters=(EXPONENT,))
