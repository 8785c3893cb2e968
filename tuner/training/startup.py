"""From a round file to a workplace: base and data are loaded, the pack is made, the base is measured."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from tuner.adapters import Base, Pack, load_base
from tuner.adapters.initial import adapter_sizes, hollow_copy, targeted_modules, values_of
from tuner.adapters.linear_layers import refuse_unlike_linear
from tuner.config import DORA_TRAINS_ALONE, RoundSpec
from tuner.data import PreparedData, load_tokenizer, prepare, refuse_tokens_beyond
from tuner.data.pretrained import loaded_commit
from tuner.methods.metrics import metric
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Evaluation, Ready
from tuner.training.environment import environment
from tuner.training.generation_eval import exam
from tuner.training.memory_budget import (
    MARGIN,
    Packing,
    choose_packing,
    fit_room,
    free_device_bytes,
    needing_room,
)
from tuner.training.packed_passes import example_scores, measured_evaluation
from tuner.training.probe import largest_hyperparameters, probe
from tuner.training.worker_state import Workplace

_log = logging.getLogger(__name__)

PASS_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Tokens of all trials in one pass, padding included, where memory is not the limit. On a CPU larger tensors
leave the caches (docs/log.md)."""
_CONFIG_OF_THE_FILES = ("_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype")
"""Keys of a model's configuration that say where it lies, not what it is."""


def open_workplace(
    spec: RoundSpec,
    *,
    cache: Path,
    slots: int | Literal["auto"],
    base_evaluation: Evaluation | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Workplace, Ready]:
    """Load base and data; measure the untouched base unless its evaluation is given.

    `say` hears what is being done. Raises InputError when model, data or metric cannot be used.
    """
    chosen = metric(spec.objective.metric)
    tokenizer = load_tokenizer(spec.model)
    data = prepare(spec, tokenizer, cache, say)
    say(f"loading {spec.model.path}")
    place = arrange(spec, data, slots=slots)
    place.metric, place.objective = chosen, chosen.objective(spec.objective.metric)
    if spec.evaluation.answers is not None:
        place.exam = exam(spec.evaluation.answers, data.questions, place.base, tokenizer)
    if base_evaluation is None:
        say(f"evaluating the untouched base on {len(data.evaluation):,} rows")
        with needing_room(place.pack.num_slots):
            base_evaluation = measure_base(place)
    place.base_evaluation = base_evaluation
    code = place.exam.metric.code if place.exam is not None else None
    place.environment = environment(place.base.device, slots=place.pack.num_slots, metric=code)
    smallest, largest = adapter_sizes(place.hollow, spec.space())
    ready = Ready(
        slots=place.pack.num_slots,
        device=str(place.base.device),
        base=place.base_evaluation,
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        workload=_workload(place.base, data, spec),
        evaluation_share=_evaluation_share(data, spec),
        smallest_adapter=smallest,
        largest_adapter=largest,
        remarks=tuple(data.report.left_out(spec.data.max_length)),
    )
    return place, ready


def arrange(spec: RoundSpec, data: PreparedData, *, slots: int | Literal["auto"]) -> Workplace:
    """Load the base and put a pack on it.

    `auto` slots are one on a CPU, where packing gains little and a trial alone is exact to the digit, and
    as many as fill a pass and fit into memory on a GPU; DoRA has one. Raises ModelError when the model cannot
    be used, or memory has no room for it and the slots.
    """
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    space = spec.space()
    if spec.trains_alone:
        _log.info("slots: %s: %s", slots, DORA_TRAINS_ALONE)
        slots = 1
    base = load_base(spec.model, device=device, max_length=spec.data.max_length)
    refuse_tokens_beyond(data, base.num_embeddings, lambda: load_tokenizer(spec.model))
    hollow = hollow_copy(base, base_path=spec.model.path)
    modules = targeted_modules(hollow, space)
    refuse_unlike_linear(base, modules)
    max_rank = int(max(values_of(space["lora_r"])))

    def place_with(num_slots: int, pass_tokens: int) -> Workplace:
        return Workplace(
            base=base,
            hollow=hollow,
            pack=Pack(base, num_slots=num_slots, max_rank=max_rank, modules=modules),
            train=data.train,
            evaluation=data.evaluation,
            base_path=spec.model.path,
            revision=loaded_commit(spec.model) or spec.model.revision,
            evaluation_rows=spec.evaluation.batch_size,
            micro_tokens=max(1, pass_tokens // num_slots),
            pass_tokens=pass_tokens,
            evaluation_tokens=pass_tokens,
        )

    pass_tokens = PASS_TOKENS[device.type]
    with needing_room(slots):
        if slots != "auto":
            place = place_with(slots, pass_tokens)
            if spec.trains_alone:
                # Refuses a base that DoRA cannot read.
                place.new_adapter(largest_hyperparameters(space), seed=0)
            return place
        if device.type == "cpu":
            return place_with(1, pass_tokens)
        alone = place_with(1, pass_tokens)
        packing = packing_for(alone, spec, limit_bytes=int(MARGIN * free_device_bytes(device)))
        alone.pack.close()
        return place_with(packing.slots, packing.pass_tokens)


def packing_for(place: Workplace, spec: RoundSpec, *, limit_bytes: int) -> Packing:
    """What `auto` settles on: a few passes of one trial in `place`, and what they took, in so much memory."""
    probed = probe(place, largest_hyperparameters(spec.space()))
    if not probed.tokens:
        return Packing(1, place.pass_tokens)
    packing = choose_packing(
        fit_room(probed),
        limit_bytes=limit_bytes,
        slot_weights=max(place.pack.slot_weights, adapter_sizes(place.hollow, spec.space())[1]),
        update_tokens=int(_mean_batch_size(spec) * float(place.train.num_tokens.mean())),
        longest_row=int(place.train.num_tokens.max()),
        trials=spec.num_trials,
    )
    _log.info("slots: auto: %s, from passes of %s tokens", packing, probed)
    return packing


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
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    evaluated = evaluations * float(data.evaluation.num_tokens.sum())
    trained = 2.0 * spec.max_train_steps * _mean_batch_size(spec) * float(data.train.num_tokens.mean())
    return float(evaluated / (evaluated + trained))


def _mean_batch_size(spec: RoundSpec) -> float:
    sizes = values_of(spec.space()["batch_size"])
    return float(sum(sizes) / len(sizes))


def measure_base(place: Workplace) -> Evaluation:
    """The untouched base's evaluation; no slot has a trial."""
    (scores,) = example_scores(place, ())
    return measured_evaluation(place, scores)
