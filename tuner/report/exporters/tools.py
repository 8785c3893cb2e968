"""Write a recipe for TRL, Axolotl and LLaMA-Factory, with notes on what they cannot express."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from tuner.methods.kinds import ALL_LINEAR
from tuner.methods.registry import is_built_in
from tuner.methods.schedules import warmup_length
from tuner.methods.variants import CHOOSER
from tuner.methods.variants.initialisations import INITIALISATIONS
from tuner.report.exporters.exporter import Recipe, optimization, trainer_arguments, without

ROWS = "rows"
"""Folder of tokenised rows beside the file: `input_ids`, `attention_mask` and `labels`."""
_WIDTH = 110


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A training tool that reads a configuration file."""

    name: str
    file: str
    command: str
    """Command to run in the folder of the file."""
    rows_on_disk: bool
    """Whether it reads rows saved by `datasets` instead of Parquet files."""
    held_out: str
    """Name of the evaluation split, beside `train`."""
    settings: Callable[[Recipe], dict[str, Any]]
    cannot: Callable[[Recipe], Iterator[str]]
    """Return notes on what the file does not express."""


def recipe_file(tool: Tool, recipe: Recipe) -> str:
    """Return the text of the configuration, in YAML that YAML 1.1 parsers read the same way."""
    header = [
        f"The configuration of {recipe.trial} for {tool.name}, up to its best step "
        f"({recipe.best_step} of {recipe.max_train_steps}).",
        f"Run in this folder: {tool.command}",
        f"The rows are tokenised as in the trial ({ROWS}/): same template, truncation and loss mask.",
        "",
        "Differences from the trial:",
        *(f"- {sentence}" for sentence in (*_always(recipe), *tool.cannot(recipe))),
    ]
    lines = [line for text in header for line in _wrapped(text)]
    settings: str = yaml.safe_dump(tool.settings(recipe), sort_keys=False, allow_unicode=True, width=_WIDTH)
    return "\n".join(f"# {line}".rstrip() for line in lines) + f"\n\n{settings}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - 2, subsequent_indent="  " if text.startswith("- ") else "") or [""]


def _always(recipe: Recipe) -> Iterator[str]:
    yield "Row order and dropout masks differ, so losses agree approximately, not to the digit."
    yield (
        f"The batch of {recipe.micro_batch * recipe.accumulation} is {recipe.micro_batch} x "
        f"{recipe.accumulation} on one GPU; with several, divide gradient_accumulation_steps by their number."
    )
    name, arguments = recipe.scheduler
    if "decay_type" in arguments:
        yield (
            f"The schedule `{recipe.hyperparameters['schedule']}` (constant, then to 0 over decay_steps) is "
            f"transformers' {name} with decay_type {arguments['decay_type']}."
        )
    if recipe.trainer_optimizer is None:
        yield (
            f"The optimizer {recipe.optimizer}: transformers' Trainer does not have it, and without `optim` "
            "the tool uses AdamW. In Python, pass the optimizer to the trainer (`optimizers=`)."
        )
    own = recipe.hyperparameters.get(CHOOSER)
    if own is not None and not is_built_in("variant", str(own)):
        yield (
            f"The variant {own}: the tool does not have it and trains plain LoRA; the adapter's "
            "adapter_config.json has its arguments of peft.LoraConfig."
        )
    if recipe.alpha != recipe.number("lora_alpha"):
        yield f"lora_alpha is {recipe.number('lora_alpha')!r}, rounded to {recipe.alpha}."
    if recipe.model.quantization == "int8":
        yield "The trial used no outlier threshold in 8-bit layers (llm_int8_threshold 0); the tool uses 6."


def _trl(recipe: Recipe) -> dict[str, Any]:
    model = recipe.model
    return without(
        {
            "model_name_or_path": model.path,
            "model_revision": model.revision,
            "model_init_kwargs": {"gguf_file": model.gguf_file} if model.gguf_file else None,
            "trust_remote_code": model.trust_remote_code or None,
            "dtype": model.dtype,
            **_bitsandbytes(recipe),
            "use_peft": True,
            "lora_r": int(recipe.number("lora_r")),
            "lora_alpha": recipe.alpha,
            "lora_dropout": recipe.number("lora_dropout"),
            "lora_target_modules": _trl_targets(recipe.targets),
            "use_rslora": recipe.flag("use_rslora"),
            "use_dora": recipe.is_dora,
            "dataset_name": ROWS,
            "dataset_train_split": "train",
            "dataset_test_split": "test",
            "max_length": recipe.max_length,
            "packing": False,
            **trainer_arguments(recipe),
        }
    )


def _trl_targets(targets: tuple[str, ...] | str | None) -> list[str]:
    """Return the targets; TRL reads a list of one as a regular expression, and `all-linear` as PEFT does."""
    match targets:
        case None:
            return [ALL_LINEAR]
        case str():
            return [targets]
        case (name,):
            return [rf"(.*\.)?{re.escape(name)}"]
        case _:
            return list(targets)


def _bitsandbytes(recipe: Recipe) -> dict[str, Any]:
    match recipe.model.quantization:
        case "nf4":
            return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
        case "int8":
            return {"load_in_8bit": True}
        case _:
            return {}


def _trl_cannot(recipe: Recipe) -> Iterator[str]:
    yield from _no_initialisation(recipe)
    yield from _no_layers(recipe)
    if recipe.number("loraplus_ratio") != 1:
        yield (
            f"loraplus_ratio {recipe.number('loraplus_ratio'):g}: this command has no LoRA+; in Python, pass "
            "the trainer the optimizer of peft.optimizers.create_loraplus_optimizer."
        )


def _no_initialisation(recipe: Recipe) -> Iterator[str]:
    if recipe.hyperparameters["lora_init"] != "default":
        yield f"lora_init {recipe.hyperparameters['lora_init']}: the tool uses PEFT's default initialization."


def _no_layers(recipe: Recipe) -> Iterator[str]:
    if recipe.layers is not None:
        yield (
            f"layers_to_transform {list(recipe.layers)}: the tool adapts these layers and all others; in "
            "Python, pass the trainer a LoraConfig with this value."
        )


def _llamafactory(recipe: Recipe) -> dict[str, Any]:
    model, ratio = recipe.model, recipe.number("loraplus_ratio")
    bits = {"nf4": 4, "int8": 8, "none": None}[model.quantization]
    quantised = {"quantization_bit": bits, "quantization_method": "bnb"} if bits else {}
    nf4 = {"quantization_type": "nf4", "double_quantization": True} if bits == 4 else {}
    return without(
        {
            "model_name_or_path": model.path,
            "model_revision": model.revision,
            "trust_remote_code": model.trust_remote_code or None,
            **quantised,
            **nf4,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": int(recipe.number("lora_r")),
            "lora_alpha": recipe.alpha,
            "lora_dropout": recipe.number("lora_dropout"),
            "lora_target": "all" if isinstance(recipe.targets, str) else ",".join(recipe.targets or ("all",)),
            "use_rslora": recipe.flag("use_rslora"),
            "use_dora": recipe.is_dora,
            "loraplus_lr_ratio": ratio if ratio != 1 else None,
            # The tool requires names and a template but does not use them: the rows are tokenised.
            "dataset": "tuner",
            "eval_dataset": "tuner",
            "template": "empty",
            "tokenized_path": ROWS,
            "cutoff_len": recipe.max_length,
            **trainer_arguments(recipe),
        }
    )


def _llamafactory_cannot(recipe: Recipe) -> Iterator[str]:
    yield from _no_initialisation(recipe)
    yield from _no_layers(recipe)
    if isinstance(recipe.targets, str):
        yield (
            f"target_modules {recipe.targets}: the tool does not take a regular expression, and `all` adapts "
            "every linear layer; name the layers in lora_target instead."
        )
    yield from _no_gguf(recipe)


def _no_gguf(recipe: Recipe) -> Iterator[str]:
    if recipe.model.gguf_file:
        yield (
            f"gguf_file {recipe.model.gguf_file}: the tool cannot read a GGUF base model; load it in "
            "transformers, save it with save_pretrained, and use that directory instead."
        )


def _axolotl(recipe: Recipe) -> dict[str, Any]:
    model, ratio, targets = recipe.model, recipe.number("loraplus_ratio"), recipe.targets
    scheduler, arguments = recipe.scheduler
    optimizer = optimization(recipe)
    initialisation = INITIALISATIONS[str(recipe.hyperparameters["lora_init"])]
    is_plain = initialisation.peft is True or initialisation.reads_rows
    is_bfloat16 = model.dtype == "bfloat16"
    return without(
        {
            "base_model": model.path,
            "revision_of_model": model.revision,
            "trust_remote_code": model.trust_remote_code or None,
            "load_in_4bit": model.quantization == "nf4",
            "load_in_8bit": model.quantization == "int8",
            "bf16": is_bfloat16,
            "fp16": False,
            "tf32": False,
            "adapter": "qlora" if model.quantization == "nf4" else "lora",
            "lora_r": int(recipe.number("lora_r")),
            "lora_alpha": recipe.alpha,
            "lora_dropout": recipe.number("lora_dropout"),
            "lora_target_linear": True if targets is None else None,
            "lora_target_modules": list(targets) if isinstance(targets, tuple) else targets,
            "peft_layers_to_transform": list(recipe.layers) if recipe.layers else None,
            "peft_use_rslora": recipe.flag("use_rslora") or None,
            "peft_use_dora": recipe.is_dora or None,
            "peft_init_lora_weights": None if is_plain else initialisation.peft,
            "loraplus_lr_ratio": ratio if ratio != 1 else None,
            "datasets": [_parquet("train")],
            "test_datasets": [_parquet("test")],
            "sequence_len": recipe.max_length,
            "sample_packing": False,
            "eval_sample_packing": False,
            "micro_batch_size": recipe.micro_batch,
            "gradient_accumulation_steps": recipe.accumulation,
            "max_steps": recipe.best_step,
            "learning_rate": recipe.number("learning_rate"),
            "lr_scheduler": scheduler,
            "lr_scheduler_kwargs": arguments,
            "warmup_steps": warmup_length(recipe.hyperparameters),
            "optimizer": optimizer.pop("optim", None),
            **optimizer,
            "seed": int(recipe.number("training_seed")),
            "eval_steps": recipe.every_steps,
            "eval_batch_size": recipe.eval_batch_size,
            "logging_steps": recipe.every_steps,
            "output_dir": "output",
        }
    )


def _axolotl_cannot(recipe: Recipe) -> Iterator[str]:
    yield from _no_gguf(recipe)
    if INITIALISATIONS[str(recipe.hyperparameters["lora_init"])].reads_rows:
        yield from _no_initialisation(recipe)


def _parquet(split: str) -> Mapping[str, Any]:
    """Return a split of tokenised rows, without a type: with one, Axolotl would tokenise them."""
    return {"path": f"{ROWS}/{split}.parquet", "ds_type": "parquet", "split": "train", "type": None}


TOOLS: Mapping[str, Tool] = {
    "axolotl": Tool(
        name="Axolotl",
        file="axolotl.yaml",
        command="axolotl train axolotl.yaml",
        rows_on_disk=False,
        held_out="test",
        settings=_axolotl,
        cannot=_axolotl_cannot,
    ),
    "llamafactory": Tool(
        name="LLaMA-Factory",
        file="llamafactory.yaml",
        command="llamafactory-cli train llamafactory.yaml",
        rows_on_disk=True,
        held_out="validation",
        settings=_llamafactory,
        cannot=_llamafactory_cannot,
    ),
    "trl": Tool(
        name="TRL",
        file="trl.yaml",
        command="trl sft --config trl.yaml",
        rows_on_disk=False,
        held_out="test",
        settings=_trl,
        cannot=_trl_cannot,
    ),
}
"""Tools by the names of `--as`."""
