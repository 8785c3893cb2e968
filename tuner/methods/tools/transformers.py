"""A script that trains with Hugging Face's Trainer and reads TrainingArguments as options or from a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tuner.methods.schedules import schedule
from tuner.methods.tools import EXTRA, Mistaken, Settings, Tool, TrialSettings, bare, options_of
from tuner.records import Space, Value

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "lion": "lion_32bit",
    "lion_8bit": "lion_8bit",
}
"""tuner's names of optimizers, and TrainingArguments'."""
SAME_NAME = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "warmup_steps",
    "max_grad_norm",
)  # fmt: skip
OF_THE_SCHEDULE = ("schedule", "decay_steps", "decay_shape")
FIXED: Settings = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "logging_strategy": "steps",
    "save_total_limit": None,
    "save_only_model": False,
    "load_best_model_at_end": False,
    "logging_nan_inf_filter": False,
    "eval_delay": 0,
}
"""What every trial sets: evaluations and checkpoints at tuner's steps, none deleted by the tool."""
_ONE_PLACE = "would let every trial push to one place; `tuner trial export best --push` pushes the best one"
_REFUSED = {
    "resume_from_checkpoint": "would let every trial start from one checkpoint, in place of its own",
    "auto_find_batch_size": "would let a trial train with another batch than its batch_size",
    "ignore_data_skip": "would let a trial that resumes train on the first rows again",
    "push_to_hub": _ONE_PLACE,
    "hub_model_id": _ONE_PLACE,
}
"""What no trial may be told, and why."""
DEVICE_BATCH = ("per_device_train_batch_size", 8)
"""TrainingArguments' name and default for the sequences of one device's pass."""


def trainer_settings(trial: TrialSettings, batch: tuple[str, int] = DEVICE_BATCH) -> dict[str, Any]:
    """Return TrainingArguments of a trial; hyperparameters that are not among them are left out.

    `batch` is as `Tool.device_batch`.
    """
    values = trial.hyperparameters
    chosen = schedule(str(values["schedule"]))
    assert chosen.trainer_scheduler is not None
    kind, details = chosen.trainer_scheduler(values, trial.max_train_steps, trial.max_train_steps)
    seed = values["training_seed"]
    return {
        **FIXED,
        "output_dir": trial.output,
        "max_steps": trial.max_train_steps,
        "eval_steps": trial.evaluate_every,
        "save_steps": trial.evaluate_every,
        "logging_steps": trial.evaluate_every,
        **{name: values[name] for name in SAME_NAME if name in values},
        "lr_scheduler_type": kind,
        "lr_scheduler_kwargs": dict(details) or None,
        "seed": seed,
        "data_seed": seed,
        **({"optim": OPTIMIZERS[str(values["optimizer"])]} if "optimizer" in values else {}),
        **_accumulation(trial, batch),
        **({"resume_from_checkpoint": trial.resume_from} if trial.resume_from else {}),
        **{bare(name): value for name, value in values.items() if name.startswith(EXTRA)},
    }


def _accumulation(trial: TrialSettings, batch: tuple[str, int]) -> dict[str, int]:
    size = trial.hyperparameters.get("batch_size")
    if size is None:
        return {}
    return {"gradient_accumulation_steps": int(str(size)) // _at_once(batch, trial.config, trial.gpus)}


def _at_once(batch: tuple[str, int], config: Settings, gpus: int) -> int:
    """Return the sequences that all GPUs together see in one pass."""
    name, default = batch
    return int(config.get(name) or default) * max(1, gpus)


def device_batch_mistake(config: Settings, batch: tuple[str, int]) -> str | None:
    """Return why the sequences of one device's pass are no number to divide by; None if they are one."""
    name, default = batch
    written = str(config.get(name) or default)
    if written.isdecimal() and int(written):
        return None
    return f"cannot be divided into passes of {name} {written}: write a whole number of at least 1 there"


def batch_mistake(
    sizes: Sequence[Value], config: Settings, gpus: int, batch: tuple[str, int] = DEVICE_BATCH
) -> str | None:
    """Return why batch sizes cannot be divided into passes; None if they can."""
    at_once, name = _at_once(batch, config, gpus), batch[0]
    wrong = [size for size in sizes if int(str(size)) % at_once]
    if not wrong:
        return None
    return (
        f"{wrong[0]} is no multiple of {at_once}, the sequences of one pass ({name} "
        f"{at_once // max(1, gpus)} x {max(1, gpus)} device): choose multiples of {at_once}, or set a "
        f"smaller {name} in the configuration or the command"
    )


def trainer_mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    """Yield what no trial of a Trainer can use."""
    if "warmup_ratio" in options_of(command):
        yield Mistaken("command.run", "sets --warmup_ratio: lengths are steps here; remove it")
    warmup = config.get("warmup_steps")
    if isinstance(warmup, float) and 0 < warmup < 1:
        yield Mistaken(
            "warmup_steps", f"is {warmup}, a share of the run; write warmup_steps in the round file"
        )
    yield from refused(command, config, space, {*_REFUSED} - {"hub_model_id"})  # has no effect by itself


def refused(
    command: Sequence[str], config: Settings, space: Space, names: Collection[str]
) -> Iterator[Mistaken]:
    """Yield those of the names that the command, its configuration or `extra` switches on."""
    for name, why in _REFUSED.items():
        if name not in names:
            continue
        if _is_on(options_of(command).get(name)):
            yield Mistaken("command.run", f"--{name} {why}; remove it")
        if _is_on(config.get(name)):
            yield Mistaken(name, f"{why}; remove it")
        if EXTRA + name in space:
            yield Mistaken(f"hyperparameters.{EXTRA}{name}", f"{why}; remove it")


def _is_on(value: object) -> bool:
    return str(value).lower() not in ("none", "null", "false", "no", "0", "")


def _mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    yield from trainer_mistakes(command, config, space)


TRANSFORMERS = Tool(
    name="transformers",
    meaning="A script with Hugging Face's Trainer, whose TrainingArguments are options or a file. Its other "
    "arguments go below `extra`.",
    hyperparameters=(*SAME_NAME, *OF_THE_SCHEDULE, "batch_size", "optimizer", "training_seed"),
    always=("schedule", "warmup_steps", "decay_steps", "training_seed"),
    settings=trainer_settings,
    mistakes=_mistakes,
    replaced=(
        *FIXED,
        "max_steps",
        "num_train_epochs",
        "eval_steps",
        "save_steps",
        "lr_scheduler_type",
        "seed",
    ),
    has_hook=True,
)
