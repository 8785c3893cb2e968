"""All hyperparameters that a round file may name: general ones, and those of built-in methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from tuner.methods.hyperparameters import Hyperparameter, Tier
from tuner.methods.kinds import Integer, Method, Number
from tuner.methods.optimizers import Optimizer, optimizer
from tuner.methods.registry import BUILT_IN, is_built_in
from tuner.methods.schedules import WARMUP_STEPS, Schedule, schedule
from tuner.methods.variants import CHOOSER, PLAIN, switched, variant
from tuner.records import Condition, Hyperparameters, Value

_LEARNING_RATE = Hyperparameter(
    "learning_rate",
    3e-4,
    Number(above=0),
    "Peak learning rate, which the schedule multiplies.",
)
_BATCH_SIZE = Hyperparameter(
    "batch_size",
    8,
    Integer(at_least=1),
    "Sequences per optimizer step. The split into micro-batches is chosen automatically and does not "
    "change results.",
    tier=Tier.KEPT,
)
_OPTIMIZER = Hyperparameter(
    "optimizer",
    "adamw_8bit",
    Method("optimizer"),
    "AdamW or Lion with 32-bit states or, with the suffix _8bit, bitsandbytes' 8-bit states; or Muon for the "
    "adapter's matrices.",
)
_SCHEDULE = Hyperparameter(
    "schedule",
    "linear",
    Method("schedule"),
    "The learning rate after warmup. constant: the peak rate. linear: the peak rate, then a decay to 0 over "
    "the last decay_steps. cosine: half a cosine to 0. inverse_sqrt: the inverse square root of the step.",
    tier=Tier.UNLIKELY,
)
_VARIANT = Hyperparameter(
    CHOOSER,
    PLAIN,
    Method("variant", refused=tuple((each.name, f"write {each.switch}: true") for each in switched())),
    "Variant of LoRA. lora: LoRA itself, or DoRA with use_dora; or your own, by name.",
    tier=Tier.LIKELY,
    only_if_written=True,
)
_MAX_GRAD_NORM = Hyperparameter(
    "max_grad_norm",
    1.0,
    Number(above=0),
    "Maximum norm of the gradient of a step; a larger gradient is scaled down to it.",
)
_TRAINING_SEED = Hyperparameter(
    "training_seed",
    0,
    Integer(at_least=0),
    "Seed of the adapter's initialisation, the order of the data and dropout.",
    tier=Tier.KEPT,
)


def _rows() -> Iterator[Hyperparameter]:
    optimizers = [optimizer(name) for name in BUILT_IN["optimizer"]]
    schedules = [schedule(name) for name in BUILT_IN["schedule"]]
    yield from (_LEARNING_RATE, _BATCH_SIZE)
    yield _OPTIMIZER
    yield from conditional(_OPTIMIZER.name, optimizers)
    yield WARMUP_STEPS
    yield _SCHEDULE
    yield from conditional(_SCHEDULE.name, schedules)
    yield _VARIANT
    for name in BUILT_IN["variant"]:
        yield from variant(name).hyperparameters
    yield from (_MAX_GRAD_NORM, _TRAINING_SEED)


def conditional(chosen_by: str, methods: Sequence[Optimizer | Schedule]) -> Iterator[Hyperparameter]:
    """Yield the hyperparameters that the methods declare, each once, with the methods as its condition."""
    rows = {row.name: row for method in methods for row in method.hyperparameters}
    for row in rows.values():
        declaring = tuple(method.name for method in methods if row in method.hyperparameters)
        yield replace(row, only_with=Condition(chosen_by, declaring))


def limits(table: Mapping[str, Hyperparameter]) -> dict[str, tuple[float | None, float | None]]:
    """Return the lower and upper bound of each numeric hyperparameter by name; None where there is none."""
    return {row.name: row.kind.limits for row in table.values() if isinstance(row.kind, (Integer, Number))}


def counting(values: Hyperparameters) -> dict[str, Value]:
    """Return a trial's hyperparameters without those of methods that it does not use.

    Trials of earlier versions contain such hyperparameters, for example `decay_steps` with a cosine.
    """
    known = dict(values)
    for name, condition in _CONDITIONS.items():
        if name in values and condition.chosen_by in values and not _holds(condition, values):
            del known[name]
    return known


def _holds(condition: Condition, values: Hyperparameters) -> bool:
    chosen = values[condition.chosen_by]
    if chosen in condition.values:
        return True
    kind = HYPERPARAMETERS[condition.chosen_by].kind
    # Which hyperparameters apply to a plug-in is known only to its description; its trials have no others.
    return isinstance(kind, Method) and not is_built_in(kind.kind, str(chosen))


def seed_of(values: Hyperparameters) -> int:
    """Return a trial's seed of initialisation, data order and dropout."""
    return int(_TRAINING_SEED.number(values))


def tier_of(name: str) -> Tier:
    """Return the tier of a hyperparameter; `might` for a name that is not in the table.

    Rule: Deep Learning Tuning Playbook, "Round 1: Many short training runs". This project decided which LoRA
    hyperparameters are architecture, and that batch size and seed are kept.
    """
    row = HYPERPARAMETERS.get(name)
    return Tier.MIGHT if row is None else row.tier


HYPERPARAMETERS: Mapping[str, Hyperparameter] = MappingProxyType({row.name: row for row in _rows()})
"""The table by name, in the order of the reference page."""
_CONDITIONS = {row.name: row.only_with for row in HYPERPARAMETERS.values() if row.only_with is not None}
