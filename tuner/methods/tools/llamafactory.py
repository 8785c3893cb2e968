"""LLaMA-Factory's `llamafactory-cli train`, which trains with Hugging Face's Trainer."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.tools import EXTRA, Mistaken, Settings, Tool, TrialSettings, bare, known_names
from tuner.methods.tools.transformers import TRANSFORMERS, trainer_mistakes, trainer_settings

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


def _mistakes(command: Sequence[str], config: Settings, names: Sequence[str]) -> Iterator[Mistaken]:
    yield from trainer_mistakes(command, config, names)
    if config.get("finetuning_type", "lora") != "lora":
        for name in names:
            if name in _ADAPTER:
                yield Mistaken(f"hyperparameters.{name}", "has no effect without `finetuning_type: lora`")
    if not config.get("eval_dataset") and not config.get("val_size"):
        yield Mistaken("command.config", "evaluates nothing; add `val_size: 0.05` or `eval_dataset`")
    known = known_names("llamafactory", "all")
    extra = [name for name in names if name.startswith(EXTRA)]
    for shown, name in [*((f"hyperparameters.{n}", bare(n)) for n in extra), *((n, n) for n in config)]:
        if name not in known.names:
            near = difflib.get_close_matches(name, known.names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield Mistaken(
                shown, f"is not a name of LLaMA-Factory {known.version} (listed {known.date}){hint}"
            )


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
