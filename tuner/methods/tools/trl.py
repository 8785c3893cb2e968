"""TRL's commands: `trl sft`, `trl dpo` and the others, or a script with their arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.methods.tools import Mistaken, Settings, Tool, TrialSettings, bare, options_of, unknown_names
from tuner.methods.tools.transformers import TRANSFORMERS, trainer_mistakes, trainer_settings
from tuner.records import Space

_PEFT: Mapping[str, str] = {
    "lora_r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""tuner's names and TRL's; without `use_peft` they have no effect."""
_METHODS = ("sft", "dpo", "grpo", "kto", "reward", "rloo")


def _settings(trial: TrialSettings) -> dict[str, Any]:
    values = trial.hyperparameters
    adapter: dict[str, Any] = {theirs: values[ours] for ours, theirs in _PEFT.items() if ours in values}
    if isinstance(targets := adapter.get("lora_target_modules"), str):
        adapter["lora_target_modules"] = [targets]
    return {**adapter, **trainer_settings(trial)}


def _mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    yield from trainer_mistakes(command, config, space)
    uses_peft = str({**config, **options_of(command)}.get("use_peft")).lower() == "true"
    if not uses_peft:
        for name in space:
            if name in _PEFT or bare(name) in _PEFT.values():
                yield Mistaken(
                    f"hyperparameters.{name}", "has no effect without `use_peft: true` in TRL's configuration"
                )
    method = next((part for part in command if part in _METHODS), None)
    called = f"trl {method or ''}".strip() + ", TRL"
    groups = ("trainer", "common", *([method] if method else _METHODS))
    yield from unknown_names("trl", called, groups, config, space)


TRL = Tool(
    name="trl",
    meaning="TRL's commands, such as `trl dpo`. Names of its configuration that tuner has no name for go "
    "below `extra`.",
    hyperparameters=(*TRANSFORMERS.hyperparameters, *_PEFT),
    always=TRANSFORMERS.always,
    settings=_settings,
    mistakes=_mistakes,
    replaced=TRANSFORMERS.replaced,
    has_hook=True,
)
