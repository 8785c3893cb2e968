"""Settings shared by all tools based on transformers' Trainer: batches, optimizer, schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from tuner.config import ModelSpec
from tuner.errors import InputError
from tuner.methods.kinds import ALL_LAYERS, ALL_LINEAR
from tuner.methods.optimizers import optimizer
from tuner.methods.registry import is_built_in
from tuner.methods.schedules import warmup_length
from tuner.methods.table import HYPERPARAMETERS
from tuner.methods.variants import Variant, variant_of
from tuner.methods.variants.dora import DORA
from tuner.playbook.schedule import schedule_of
from tuner.records import Hyperparameters

MICRO_BATCH = 2
"""Preferred rows per pass, if the batch size allows; results do not depend on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A trial to train again, up to its best step."""

    trial: str
    """Such as `round1/7`."""
    model: ModelSpec
    """Base model, with an absolute path or an id on the Hub."""
    hyperparameters: Hyperparameters
    max_train_steps: int
    """Horizon of the schedule."""
    best_step: int
    """Last step of training, at least 1."""
    max_length: int
    """Maximum tokens of a row."""
    every_steps: int
    """Steps between evaluations."""
    eval_batch_size: int

    @property
    def micro_batch(self) -> int:
        """Rows per pass on one GPU."""
        return MICRO_BATCH if self.number("batch_size") % MICRO_BATCH == 0 else 1

    @property
    def accumulation(self) -> int:
        """Passes per update."""
        return int(self.number("batch_size")) // self.micro_batch

    @property
    def scheduler(self) -> tuple[str, dict[str, Any]]:
        """transformers' schedule and its arguments, with the same rate at every step.

        The schedule is that of the whole run even if training ends earlier.
        """
        values = self.hyperparameters
        if self.best_step <= warmup_length(values):
            return "constant_with_warmup", {}
        named = schedule_of(values).trainer_scheduler
        if named is None:
            raise InputError(
                f"schedule {values['schedule']}: its description has no trainer_scheduler, so it cannot be "
                "exported to a tool"
            )
        scheduler, arguments = named(values, self.best_step, self.max_train_steps)
        return scheduler, dict(arguments)

    @property
    def optimizer(self) -> str:
        """Name of the optimizer."""
        return str(self.hyperparameters["optimizer"])

    @property
    def trainer_optimizer(self) -> Callable[[Hyperparameters], Mapping[str, Any]] | None:
        """transformers' arguments for the optimizer; None if it has none by this name."""
        return (
            optimizer(self.optimizer).trainer_arguments if is_built_in("optimizer", self.optimizer) else None
        )

    @property
    def alpha(self) -> int:
        """`lora_alpha` rounded to a whole number, as the tools require."""
        return round(self.number("lora_alpha"))

    def number(self, name: str) -> float:
        """Return a hyperparameter that is a number."""
        value = self.hyperparameters[name]
        assert isinstance(value, (int, float))
        return value

    def flag(self, name: str) -> bool:
        """Return a hyperparameter that is true or false."""
        return bool(HYPERPARAMETERS[name].value(self.hyperparameters))

    @property
    def variant(self) -> Variant:
        """The kind of adapter: LoRA or a variant."""
        return variant_of(self.hyperparameters)

    @property
    def is_dora(self) -> bool:
        """Whether the trial uses DoRA."""
        return self.variant is DORA

    @property
    def targets(self) -> tuple[str, ...] | str | None:
        """Names of the adapted layers, or a regular expression; None for all linear layers."""
        targets = self.hyperparameters["target_modules"]
        if targets == ALL_LINEAR:
            return None
        return targets if isinstance(targets, str) else tuple(map(str, cast(tuple[str, ...], targets)))

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Numbers of the layers with an adapter; None for all."""
        layers = HYPERPARAMETERS["layers_to_transform"].value(self.hyperparameters)
        return None if layers == ALL_LAYERS else tuple(map(int, cast(tuple[int, ...], layers)))


def trainer_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the settings named as in `transformers.TrainingArguments`."""
    scheduler, arguments = recipe.scheduler
    return {
        "learning_rate": recipe.number("learning_rate"),
        "lr_scheduler_type": scheduler,
        "lr_scheduler_kwargs": arguments,
        "warmup_steps": warmup_length(recipe.hyperparameters),
        "max_steps": recipe.best_step,
        "per_device_train_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": recipe.accumulation,
        **optimization(recipe),
        "seed": int(recipe.number("training_seed")),
        "bf16": recipe.model.dtype == "bfloat16",
        "eval_strategy": "steps",
        "eval_steps": recipe.every_steps,
        "per_device_eval_batch_size": recipe.eval_batch_size,
        "logging_steps": recipe.every_steps,
        "report_to": "none",
        "output_dir": "output",
    }


def optimization(recipe: Recipe) -> dict[str, Any]:
    """Return transformers' `optim` and its arguments, if it has the optimizer, and gradient clipping."""
    named = recipe.trainer_optimizer
    arguments = {} if named is None else named(recipe.hyperparameters)
    return {**arguments, "max_grad_norm": recipe.number("max_grad_norm")}


def without(values: Mapping[str, Any], *nothing: Any) -> dict[str, Any]:
    """Drop keys without a value."""
    return {key: value for key, value in values.items() if value not in (None, {}, *nothing)}
