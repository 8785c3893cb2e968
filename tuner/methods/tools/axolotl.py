"""Axolotl's `axolotl train`, whose own names differ from those of Hugging Face's Trainer underneath."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.tools import (
    Mistaken,
    Settings,
    Tool,
    TrialSettings,
    can_be,
    unknown_names,
)
from tuner.methods.tools.transformers import TRANSFORMERS, refused, trainer_settings
from tuner.records import Space

_ADAPTER: Mapping[str, str] = {
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_rslora": "peft_use_rslora",
    "use_dora": "peft_use_dora",
    "loraplus_ratio": "loraplus_lr_ratio",
}
"""tuner's names and Axolotl's; they have an effect only with `adapter: lora` or `qlora`."""
_RENAMED = {"lr_scheduler_type": "lr_scheduler", "optim": "optimizer"}
"""The Trainer's names and Axolotl's."""
_NOT_ITS = ("logging_strategy", "logging_nan_inf_filter", "eval_delay", "data_seed")
"""What a Trainer is told and Axolotl has no name for."""
_NONE_DELETED = 1_000_000
"""For `save_total_limit`, of which Axolotl reads an empty value as 4."""
_FIXED: Settings = {
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "save_total_limit": _NONE_DELETED,
    "save_only_model": False,
    "load_best_model_at_end": False,
    "auto_resume_from_checkpoints": False,
}
_OTHER_LENGTHS = ("num_epochs", "evals_per_epoch", "saves_per_epoch", "warmup_ratio")
_OTHER_RATES = (
    "cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup", "lr_div_factor",
    "jagged_restart_steps", "relora",
)  # fmt: skip
_RAISED_WARMUP = 1
"""Axolotl trains with two steps of warmup where one is written."""


def _settings(trial: TrialSettings) -> dict[str, Any]:
    values = trial.hyperparameters
    adapter: dict[str, Any] = {theirs: values[ours] for ours, theirs in _ADAPTER.items() if ours in values}
    if (targets := adapter.get("lora_target_modules")) is not None:
        adapter["lora_target_linear"] = targets == ALL_LINEAR
        if targets == ALL_LINEAR:
            adapter["lora_target_modules"] = None
        elif isinstance(targets, str):
            adapter["lora_target_modules"] = [targets]
    made = trainer_settings(trial, batch=AXOLOTL.device_batch)
    renamed = {_RENAMED.get(name, name): value for name, value in made.items()}
    return {**{name: renamed[name] for name in renamed if name not in _NOT_ITS}, **_FIXED, **adapter}


def _mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    if re.search(r"\$\{args", " ".join(command)):
        yield Mistaken("command.run", 'passes ${args}, but Axolotl reads a file: use "${config}"')
    yield from refused(
        command, config, space, ("resume_from_checkpoint", "auto_find_batch_size", "hub_model_id")
    )
    if config.get("adapter") not in ("lora", "qlora"):
        for name in space:
            if name in _ADAPTER:
                yield Mistaken(f"hyperparameters.{name}", "has no effect without `adapter: lora` (or qlora)")
    if not config.get("val_set_size") and not config.get("test_datasets"):
        yield Mistaken("command.config", "evaluates nothing; add `val_set_size: 0.05` or `test_datasets`")
    if "warmup_steps" in space and can_be(space["warmup_steps"], _RAISED_WARMUP):
        yield Mistaken("hyperparameters.warmup_steps", "may not be 1, which Axolotl reads as 2: write 0 or 2")
    for name in _OTHER_RATES:
        if config.get(name):
            yield Mistaken(name, "changes the learning rate behind tuner's schedule; remove it")
    yield from unknown_names("axolotl", "Axolotl", ("all",), config, space)


AXOLOTL = Tool(
    name="axolotl",
    meaning="Axolotl's `axolotl train`. Names of its own go below `extra`.",
    hyperparameters=(*TRANSFORMERS.hyperparameters, *_ADAPTER),
    always=TRANSFORMERS.always,
    settings=_settings,
    mistakes=_mistakes,
    replaced=(
        *_FIXED, "max_steps", "eval_steps", "save_steps", "lr_scheduler", "lr_scheduler_kwargs", "seed",
        "early_stopping_patience", "batch_size", *_OTHER_LENGTHS,
    ),
    has_hook=True,
    device_batch=("micro_batch_size", 1),
)  # fmt: skip
