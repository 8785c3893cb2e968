"""How a refusal of a round file is worded: the place, what was read, and which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from tuner.errors import one_of
from tuner.methods.optimizers import optimizer
from tuner.methods.registry import BUILT_IN, NOT_INSTALLED, Kind, names
from tuner.methods.schedules import schedule

Location = tuple[str | int, ...]
"""Keys and list positions of a value, relative to the model being validated."""

MISTAKE = "mistake"
"""Type of a pydantic error whose message is already complete."""
UNKNOWN_KEY = "unknown_key"
"""Type of a pydantic error for an unknown name; pydantic's own is `extra_forbidden`."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One mistake in a round file."""

    location: Location
    message: str
    rests_on: tuple[str, ...] = ()
    """Dotted names of other keys this depends on: while one of them is wrong, this is not reported."""
    type: str = MISTAKE


def mistake(message: str, *, rests_on: tuple[str, ...] = (), type: str = MISTAKE) -> PydanticCustomError:
    """Return a pydantic error with exactly this message."""
    return PydanticCustomError(type, "{message}", {"message": message, "rests_on": rests_on})


def refuse(title: str, refusals: Iterable[Refusal]) -> None:
    """Raise one ValidationError with all refusals, if there are any."""
    details = [
        InitErrorDetails(
            type=mistake(refusal.message, rests_on=refusal.rests_on, type=refusal.type),
            loc=refusal.location,
            input=None,
        )
        for refusal in refusals
    ]
    if details:
        raise ValidationError.from_exception_data(title, details)


class Alias(NamedTuple):
    """Other spellings of one name."""

    meant: str
    """Dotted name of the key, or a value of a key."""
    typed: str
    """The other spellings, in lower case, separated by spaces."""
    reason: str = ""
    """A note for the message where the value may have to change too."""


_STEPS_NOT_EPOCHS = "it is a number of optimizer steps: epochs x training rows / batch_size"
_STEPS_NOT_SHARE = "it is a number of optimizer steps, not a share of the run"
_WHOLE_BATCH = (
    "it is the number of sequences per optimizer step, including gradient accumulation; "
    "the split into micro-batches is automatic"
)

KEYS = (
    Alias(
        "max_train_steps",
        "max_steps num_train_steps train_steps num_steps n_steps steps total_steps max_iters",
    ),
    Alias(
        "max_train_steps", "num_train_epochs num_epochs n_epochs epochs epoch max_epochs", _STEPS_NOT_EPOCHS
    ),
    Alias("hyperparameters.learning_rate", "lr base_lr peak_lr max_lr learning_rates"),
    Alias("hyperparameters.lora_r", "lora_rank r rank lora_dim lora_n adapter_rank"),
    Alias("hyperparameters.lora_alpha", "alpha lora_scaling scaling"),
    Alias(
        "hyperparameters.target_modules", "lora_target_modules lora_target lora_target_linear lora_modules"
    ),
    Alias(
        "hyperparameters.batch_size",
        "per_device_train_batch_size per_gpu_train_batch_size train_batch_size micro_batch_size "
        "gradient_accumulation_steps grad_accum_steps accumulation_steps "
        "global_batch_size effective_batch_size bs",
        _WHOLE_BATCH,
    ),
    Alias("hyperparameters.optimizer", "optim optimiser optimizer_name optimizer_type"),
    Alias("hyperparameters.warmup_steps", "warmup num_warmup_steps lr_warmup_steps"),
    Alias("hyperparameters.warmup_steps", "warmup_ratio warmup_fraction", _STEPS_NOT_SHARE),
    Alias("hyperparameters.schedule", "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type"),
    Alias("hyperparameters.decay_steps", "decay num_decay_steps lr_decay_steps cooldown_steps"),
    Alias("hyperparameters.decay_steps", "decay_ratio decay_fraction cooldown_fraction", _STEPS_NOT_SHARE),
    Alias("hyperparameters.lora_dropout", "dropout dropout_rate"),
    Alias("hyperparameters.use_rslora", "rslora use_rs_lora rs_lora"),
    Alias("hyperparameters.use_dora", "dora peft_use_dora"),
    Alias("hyperparameters.loraplus_ratio", "loraplus_lr_ratio lora_plus_ratio loraplus"),
    Alias("hyperparameters.lora_init", "init_lora_weights init_weights lora_initialization"),
    Alias("hyperparameters.weight_decay", "wd decoupled_weight_decay"),
    Alias("hyperparameters.adam_beta1", "beta1 beta_1 adam_beta_1 betas adam_betas"),
    Alias("hyperparameters.adam_beta2", "beta2 beta_2 adam_beta_2"),
    Alias("hyperparameters.adam_epsilon", "eps epsilon adam_eps"),
    Alias(
        "hyperparameters.max_grad_norm",
        "grad_clip clip_grad_norm gradient_clipping gradient_clip_val max_norm",
    ),
    Alias("hyperparameters.training_seed", "seed train_seed data_seed random_seed"),
    Alias("model.path", "model_name_or_path base_model model_name model_id pretrained_model name"),
    Alias("model.dtype", "torch_dtype precision bf16 fp16 fp32 mixed_precision"),
    Alias("model.quantization", "load_in_4bit quantization_bit bnb_4bit_quant_type", "nf4 is the 4-bit form"),
    Alias("model.quantization", "load_in_8bit", "int8 is the 8-bit form"),
    Alias("data.train", "dataset datasets train_file train_data train_dataset dataset_name"),
    Alias("data.eval", "eval_dataset test_datasets eval_file validation_file validation valid val dev"),
    Alias(
        "data.eval_fraction",
        "val_set_size val_size validation_split eval_split test_size",
        "it is a share of the rows, between 0 and 1",
    ),
    Alias("data.max_length", "max_seq_length max_seq_len sequence_len seq_len cutoff_len block_size"),
    Alias(
        "data.loss_on",
        "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss",
        "it is completion, or all to train on the prompt too",
    ),
    Alias("data.allow_overlap", "allow_duplicates allow_leakage ignore_overlap"),
    Alias("data.train.columns", "column_mapping field_mapping field_map column_map"),
    Alias("data.train.template", "chat_template prompt_template prompt_style conversation_template"),
    Alias("data.train.split_on", "separator delimiter record_separator split_by"),
    Alias("data.train.record_bytes", "chunk_bytes chunk_size block_bytes"),
    Alias("data.train.group_records", "group group_lines records_per_example packing pack"),
    Alias("data.train.overlap_tokens", "overlap chunk_overlap stride"),
    Alias("data.train.weight", "probability probabilities interleave_prob interleave_probs mixing_weight"),
    Alias("data.train.config", "subset config_name dataset_config"),
    Alias("search.trials", "n_trials num_trials num_samples max_trials"),
    Alias("search.sampler", "algorithm search_algorithm searcher"),
    Alias("search.enqueue", "enqueue_trial enqueue_trials baseline baselines points_to_evaluate"),
    Alias("evaluation", "eval evaluate"),
    Alias("evaluation.every_steps", "eval_steps eval_every eval_interval eval_freq eval_every_steps"),
    Alias("evaluation.batch_size", "eval_batch_size per_device_eval_batch_size per_gpu_eval_batch_size"),
    Alias("evaluation.max_examples", "max_eval_samples max_eval_examples eval_examples num_eval_examples"),
    Alias("objective.metric", "metric_for_best_model eval_metric"),
    Alias("objective.direction", "greater_is_better", "it is minimize or maximize"),
    Alias("checkpoints.directory", "output_dir save_dir out_dir checkpoint_dir dir"),
    Alias("checkpoints.keep_best", "save_total_limit num_checkpoints keep"),
    Alias("run.slots", "n_jobs num_slots parallel_trials"),
    Alias("run.production_steps", "production max_production_steps"),
    Alias("storage", "storage_url database database_url db"),
    Alias("study", "study_name project experiment"),
    Alias("round", "round_name run_name"),
)

NOT_KEYS = (
    Alias(
        "tuner chooses this for the machine automatically",
        "gradient_checkpointing device_map device num_workers",
    ),
    Alias(
        "tuner saves the best step and resumable checkpoints automatically",
        "save_steps save_strategy save_every",
    ),
    Alias(
        "the best step by the objective is always chosen after the run",
        "load_best_model_at_end early_stopping early_stopping_patience",
    ),
)
"""Settings of other tools without a counterpart; `meant` is the reason."""

VALUES = (
    *(Alias(name, " ".join(optimizer(name).aliases)) for name in BUILT_IN["optimizer"]),
    *(Alias(name, " ".join(schedule(name).aliases)) for name in BUILT_IN["schedule"]),
    Alias("default", "kaiming kaiming_uniform"),
    Alias("quasi-random", "qmc sobol halton quasi_random quasirandom"),
    Alias("gp", "bayesian gaussian_process bo"),
    Alias("bfloat16", "bf16"),
    Alias("float32", "fp32 float"),
    Alias("nf4", "4bit int4 fp4"),
    Alias("int8", "8bit"),
    Alias("sharegpt", "share_gpt conversations vicuna"),
    Alias("messages", "openai conversational chat_messages"),
    Alias("alpaca", "instruction instruct stanford"),
    Alias("chatml", "im_start qwen"),
    Alias("llama3", "llama-3 llama_3"),
    Alias("tokenizer", "tokenizer_default auto"),
    Alias("line", "lines newline"),
    Alias("blank", "paragraph paragraphs blank_line blank_lines"),
    Alias("bytes", "byte size"),
    Alias("minimize", "min minimise lower less"),
    Alias("maximize", "max maximise higher greater"),
    Alias("completion", "assistant response output outputs completion_only"),
)


_SOURCE = "{path: PATH, format: alpaca}"
EXAMPLES = {
    "model": "{path: PATH}",
    "data": f"{{train: [{_SOURCE}], eval_fraction: 0.05}}",
    **{f"data.{part}": f"[{_SOURCE}]" for part in ("train", "eval", "test")},
    **{f"data.{part}[]": _SOURCE for part in ("train", "eval", "test")},
    **{f"data.{part}[].columns": "{instruction: question}" for part in ("train", "eval", "test")},
    "command": "{run: [python, train.py]}",
    "command.run": "[python, train.py]",
    "command.resume": '[--resume, "${resume_from}"]',
    "hyperparameters": "{learning_rate: 3e-4, lora_r: [8, 16]}",
    "search": "{trials: 16}",
    "search.enqueue": "[{learning_rate: 3e-4}]",
    "search.enqueue[]": "{learning_rate: 3e-4}",
    "evaluation": "{every_steps: 5}",
    "evaluation.answers": "{metric: exact_match}",
    "objective": "{metric: eval_loss}",
    "checkpoints": "{directory: runs}",
    "run": "{slots: auto}",
    "run.report_to": "[tensorboard]",
}
"""A right value of each section and list; PATH stands for what the user has."""

ONE_HORIZON = (
    "All trials of a round train for the same number of steps: a search over the length would mostly find "
    "that longer is better, and hide which hyperparameters are better (Deep Learning Tuning Playbook: never "
    "tune max_train_steps within a round). Choose one value; each trial's best step is chosen from its "
    "evaluations afterwards, and `tuner study promote` uses them to suggest the next round's value"
)
"""Why a range or a list of horizons is refused."""

_SIMILAR = 0.7
"""Minimum difflib ratio for a suggestion."""


def _by_typed(aliases: Iterable[Alias]) -> dict[str, Alias]:
    return {typed: alias for alias in aliases for typed in alias.typed.split()}


_KEYS, _NOT_KEYS, _VALUES = _by_typed(KEYS), _by_typed(NOT_KEYS), _by_typed(VALUES)


def unknown_key(path: Sequence[str | int], known: Collection[str]) -> str:
    """Return the message for a key that does not exist, or not in that place.

    `path` leads to it from the top of the file; `known` are the dotted names of all keys.
    """
    section, typed = _section(path), str(path[-1]).lower().replace("-", "_")
    if tuple(path[:2]) == ("search", "enqueue"):
        known = [*known, f"{section}.continues"]
    alias = _in_the_same_list(_KEYS.get(typed, Alias("", "")), section)
    here = {_leaf(name): name for name in known if _parent(name) == section}
    elsewhere = [name for name in known if _leaf(name) == typed and _parent(name) != section]
    if alias.meant and _parent(alias.meant) == section:
        return _did_you_mean(alias, section)
    if elsewhere:
        return _misplaced(typed, elsewhere, alias, section)
    if alias.meant:
        return _did_you_mean(alias, section)
    if typed in _NOT_KEYS:
        return f"unknown, and not needed: {_NOT_KEYS[typed].meant}"
    anywhere = {_leaf(name): name for name in known}
    if similar := _similar(typed, here, section) or _similar(typed, anywhere, None):
        return _did_you_mean(similar, section)
    return f"unknown; allowed here: {', '.join(here)}"


def key_like(name: str) -> str | None:
    """Return the dotted name of the key that a name of this or another tool means; None without one."""
    typed = name.lower().replace("-", "_")
    if typed in _KEYS:
        return _KEYS[typed].meant
    return next((alias.meant for alias in KEYS if _leaf(alias.meant) == typed), None)


def meant_value(raw: Any, allowed: Collection[str]) -> str:
    """Return `did you mean ...?` for a value that is not allowed; empty if nothing is similar."""
    if not isinstance(raw, str):
        return ""
    typed = raw.lower()
    meant = _VALUES[typed].meant if typed in _VALUES else None
    if meant not in allowed:
        meant = next(iter(difflib.get_close_matches(typed, allowed, n=1, cutoff=_SIMILAR)), None)
    return f"did you mean {meant}?" if meant else ""


def meant_method(kind: Kind, raw: Any) -> str:
    """Return what to do about a name that no method of this kind has."""
    return meant_value(raw, names(kind)) or (NOT_INSTALLED if isinstance(raw, str) else "")


def _in_the_same_list(alias: Alias, section: str) -> Alias:
    """Return the alias of `data.train` for the same key of `data.eval` or `data.test`."""
    if section in ("data.eval", "data.test") and _parent(alias.meant) == "data.train":
        return alias._replace(meant=f"{section}.{_leaf(alias.meant)}")
    return alias


def _did_you_mean(alias: Alias, section: str) -> str:
    meant = _leaf(alias.meant) if _parent(alias.meant) == section else _place(alias.meant)
    if alias.meant == "max_train_steps" and section == "hyperparameters":
        return f"unknown; did you mean {meant}? {ONE_HORIZON}"
    reason = f" {alias.reason[0].upper()}{alias.reason[1:]}." if alias.reason else ""
    return f"unknown; did you mean {meant}?{reason}"


def _misplaced(typed: str, names: Sequence[str], alias: Alias, section: str) -> str:
    if typed == "max_train_steps" and section == "hyperparameters":
        return f"not a hyperparameter: write one whole number at the top level of the file. {ONE_HORIZON}"
    message = f"unknown here; {typed} belongs {one_of([_home(name) for name in names])}"
    return f"{message}. Or did you mean {_place(alias.meant)}?" if alias.meant else message


def _similar(typed: str, names: dict[str, str], section: str | None) -> Alias | None:
    """Return the key, or the alias of a key, most similar to `typed`; `section` restricts the aliases."""
    aliases = {word: alias for word, alias in _KEYS.items() if section in (None, _parent(alias.meant))}
    candidates = {**aliases, **{leaf: Alias(name, leaf) for leaf, name in names.items()}}
    found = difflib.get_close_matches(typed, candidates, n=1, cutoff=_SIMILAR)
    return candidates[found[0]] if found else None


def _section(path: Sequence[str | int]) -> str:
    if tuple(path[:2]) == ("search", "enqueue") and len(path) > 2:
        return "hyperparameters"
    return ".".join(part for part in path[:-1] if isinstance(part, str))


def _place(name: str) -> str:
    return name if _parent(name) else f"{name}, at the top level of the file"


def _home(name: str) -> str:
    return f"under {_parent(name)}" if _parent(name) else "at the top level of the file"


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
