"""LLaMA-Factory's `llamafactory-cli train`, which trains with Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.tools import Mistaken, Settings, Tool, TrialSettings, unknown_names
from tuner.methods.tools.transformers import TRANSFORMERS, trainer_mistakes, trainer_settings
from tuner.records import Space

_ADAPTER: Mapping[str, str] = {
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
    "loraplus_ratio": "loraplus_lr_ratio",
}
"""tuner's names and LLaMA-Factory's; they have an effect only with `finetuning_type: lora`."""


def _settings(trial: TrialSettings) -> dict[str, Any]:
    values = trial.hyperparameters
    adapter: dict[str, Any] = {theirs: values[ours] for ours, theirs in _ADAPTER.items() if ours in values}
    targets = adapter.get("lora_target")
    if targets is not None:
        adapter["lora_target"] = "all" if targets == ALL_LINEAR else _listed(targets)
    return {**adapter, "do_train": True, **trainer_settings(trial)}


def _listed(targets: Any) -> str:
    return targets if isinstance(targets, str) else ",".join(targets)


def _mistakes(command: Sequence[str], config: Settings, space: Space) -> Iterator[Mistaken]:
    yield from trainer_mistakes(command, config, space)
    if config.get("finetuning_type", "lora") != "lora":
        for name in space:
            if name in _ADAPTER:
                yield Mistaken(f"hyperparameters.{name}", "has no effect without `finetuning_type: lora`")
    if not config.get("eval_dataset") and not config.get("val_size"):
        yield Mistaken("command.config", "evaluates nothing; add `val_size: 0.05` or `eval_dataset`")
    yield from unknown_names("llamafactory", "LLaMA-Factory", ("all",), config, space)


LLAMAFACTORY = Tool(
    name="llamafactory",
    meaning="LLaMA-Factory's `llamafactory-cli train`. Names of its own go below `extra`.",
    hyperparameters=(*TRANSFORMERS.hyperparameters, *_ADAPTER),
    always=TRANSFORMERS.always,
    settings=_settings,
    mistakes=_mistakes,
    replaced=TRANSFORMERS.replaced,
    has_hook=True,
)
