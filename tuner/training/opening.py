"""From a round file to a workplace: base and data are loaded, the pack is made, the base is measured."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

import torch

from tuner.adapters import Base, Pack, load_base
from tuner.adapters.initial import adapter_sizes, hollow_copy, targeted_modules, values_of
from tuner.data import PreparedData, load_tokenizer, prepare
from tuner.errors import ModelError
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Evaluation, Ready
from tuner.spec import RoundSpec
from tuner.training.loop import example_nll
from tuner.training.workplace import Workplace

PASS_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of all trials in one training pass, padding included, before memory says otherwise."""
SLOTS = {"cpu": 1, "cuda": 4}
"""What `slots: auto` means on each kind of device."""
_CONFIG_OF_THE_FILES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
"""Keys of a model's configuration that say where it lies, not what it is."""


def open_workplace(
    spec: RoundSpec, *, cache: Path, slots: int | Literal["auto"], base_evaluation: Evaluation | None = None
) -> tuple[Workplace, Ready]:
    """Load base and data; measure the untouched base unless its evaluation is given.

    Raises InputError when model or data cannot be used.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    num_slots = SLOTS[device.type] if slots == "auto" else slots
    space = spec.space()
    if any(values_of(space["use_dora"])):
        raise ModelError("hyperparameters.use_dora: this version trains plain LoRA; leave it false")
    data = prepare(spec, load_tokenizer(spec.model), cache)
    base = load_base(spec.model, device=device, max_length=spec.data.max_length)
    workload = _workload(base, data, spec)
    hollow = hollow_copy(base, base_path=spec.model.path)
    place = Workplace(
        base=base,
        hollow=hollow,
        pack=Pack(
            base,
            num_slots=num_slots,
            max_rank=int(max(values_of(space["lora_r"]))),
            modules=targeted_modules(hollow, space),
        ),
        train=data.train,
        evaluation=data.evaluation,
        base_path=spec.model.path,
        revision=spec.model.revision,
        evaluation_rows=spec.evaluation.batch_size,
        micro_tokens=max(1, PASS_TOKENS[device.type] // num_slots),
    )
    place.base_evaluation = base_evaluation or _measure_base(place)
    smallest, largest = adapter_sizes(hollow, space)
    ready = Ready(
        slots=num_slots,
        device=str(device),
        base=place.base_evaluation,
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        workload=workload,
        evaluation_share=_evaluation_share(data, spec),
        smallest_adapter=smallest,
        largest_adapter=largest,
    )
    return place, ready


def _workload(base: Base, data: PreparedData, spec: RoundSpec) -> str:
    """Fingerprint of what is held fixed: the base's configuration and a sample of its weights; the data."""
    total = hashlib.sha256(data.fingerprint.encode())
    config = {k: v for k, v in base.model.config.to_dict().items() if k not in _CONFIG_OF_THE_FILES}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    total.update(f"{spec.model.dtype} {spec.model.quantization} {spec.data.max_length}".encode())
    for name, parameter in base.model.named_parameters():
        sample = parameter.detach().reshape(-1)[:1024].cpu().contiguous().view(torch.uint8)
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()


def _evaluation_share(data: PreparedData, spec: RoundSpec) -> float:
    """Share of a trial's work that its evaluations take: a token costs half of one that is trained on."""
    space = spec.space()
    sizes = values_of(space["batch_size"])
    batch_size = sum(sizes) / len(sizes)
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    evaluated = evaluations * float(data.evaluation.num_tokens.sum())
    trained = 2.0 * spec.max_train_steps * batch_size * float(data.train.num_tokens.mean())
    return float(evaluated / (evaluated + trained))


def _measure_base(place: Workplace) -> Evaluation:
    sums = example_nll(place, ())[0]
    tokens = place.evaluation.num_targets.tolist()
    return Evaluation(0, sum(sums) / sum(tokens), example_nll=tuple(sums), example_tokens=tuple(tokens))
