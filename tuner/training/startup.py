"""Load the base model and the data of a round file, make the pack and evaluate the base model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import torch
from transformers import PreTrainedModel

from tuner.adapters import Base, Pack, load_base
from tuner.adapters.device_io import one_out_of_memory
from tuner.adapters.initial import adapter_sizes, meta_copy, targeted_modules, values_of
from tuner.adapters.linear_layers import refuse_unlike_linear
from tuner.adapters.placement import worker_devices
from tuner.config import RoundSpec
from tuner.data import PreparedData, load_tokenizer, prepare, refuse_tokens_beyond
from tuner.data.pretrained import CONFIG_OF_THE_FILES, loaded_commit, model_fingerprint
from tuner.methods.metrics import metric
from tuner.methods.plug_ins import named
from tuner.methods.table import seed_of
from tuner.methods.variants import CHOOSER, PLAIN, possible_variants, variant_names
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Evaluation, Prediction, Ready, Space, corners
from tuner.training.environment import environment
from tuner.training.memory_budget import (
    MARGIN,
    DeviceRoom,
    Packing,
    choose_on_each,
    explain_out_of_memory,
    fit_pass_cost,
    free_device_bytes,
    largest_hyperparameters,
    predict,
    probe,
    tokens_of_update,
)
from tuner.training.optimizer import refuse_bad_optimizer
from tuner.training.packed_passes import example_scores, measured_evaluation
from tuner.training.worker_state import Kept, WorkerState, generation_eval, tried_metric

_log = logging.getLogger(__name__)

PASS_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Tokens of all trials in one pass, including padding, if memory is not the limit. On a CPU larger tensors
exceed the caches (docs/log.md)."""


def load_worker_state(
    spec: RoundSpec,
    *,
    cache: Path,
    slots: int | Literal["auto"],
    base_evaluation: Evaluation | None = None,
    say: Callable[[str], None] = lambda _: None,
    names: Mapping[str, str] | None = None,
    known_data: str | None = None,
    kept: Kept | None = None,
) -> tuple[WorkerState, Ready]:
    """Load base model and data; evaluate the base model unless its evaluation is given.

    `say` receives progress messages. `names` says what adapters call a base model that was sent here: path
    here -> the user's path or Hub id. `known_data` is the fingerprint of the round's data, if it has begun;
    `kept` is what a round before left, used where it is the same. Raises InputError if model, data or metric
    cannot be used.
    """
    chosen = metric(spec.objective.metric)
    on_gpus = spec.run.gpus_per_worker
    of_model = (spec.model.model_dump_json(), spec.data.max_length, on_gpus, model_fingerprint(spec.model))
    if kept is not None and kept.model != of_model:
        kept = None
    tokenizer = load_tokenizer(spec.model) if kept is None else kept.tokenizer
    data = prepare(spec, tokenizer, cache, say, known=known_data)
    answers = spec.evaluation.answers
    compare = None if answers is None else tried_metric(answers, data.eval_prompts)
    say(f"loading {spec.model.path}")
    state = arrange(spec, data, slots=slots, base=None if kept is None else kept.base)
    state.base_path = state.meta_model.name_or_path = (names or {}).get(spec.model.path, spec.model.path)
    state.metric, state.objective = chosen, chosen.objective(spec.objective.metric)
    if answers is not None and compare is not None:
        state.generation_eval = generation_eval(answers, compare, data.eval_prompts, state.base, tokenizer)
    measured = _measured_with(state, data, spec)
    known = kept.evaluation if kept is not None and kept.measured == measured else None
    state.base_evaluation = base_evaluation or known or _measured_base(state, say)
    state.kept = Kept(of_model, tokenizer, state.base, measured, state.base_evaluation)
    code = state.generation_eval.metric.code if state.generation_eval is not None else None
    state.environment = environment(
        state.base.device, slots=state.pack.num_slots, metric=code, kernels=spec.model.kernels
    )
    return state, _ready(state, data, spec)


def _measured_base(state: WorkerState, say: Callable[[str], None]) -> Evaluation:
    say(f"evaluating the base model on {len(state.evaluation):,} rows")
    with explain_out_of_memory(state.pack.num_slots):
        return measure_base(state)


def _ready(state: WorkerState, data: PreparedData, spec: RoundSpec) -> Ready:
    """Return what the round is told before it begins."""
    smallest, largest = adapter_sizes(state.meta_model, spec.space())
    assert state.base_evaluation is not None
    return Ready(
        slots=state.pack.num_slots,
        device=str(state.base.device),
        base=state.base_evaluation,
        train_rows=len(data.train),
        eval_rows=len(data.evaluation),
        workload=workload(state.base, data, spec),
        evaluation_share=_evaluation_share(data, spec),
        data_fingerprint=data.fingerprint,
        model_fingerprint=model_fingerprint(spec.model),
        smallest_adapter=smallest,
        largest_adapter=largest,
        waits_for_disk=True,
        remarks=tuple(data.report.left_out(spec.data.max_length)),
    )


def _measured_with(state: WorkerState, data: PreparedData, spec: RoundSpec) -> tuple[object, ...]:
    """Return all that the digits of the base model's evaluation depend on, besides the model."""
    evaluation = spec.evaluation.model_dump_json(exclude={"every_steps"})
    objective = spec.objective.model_dump_json()
    sizes = (state.pack.num_slots, state.pack.slot_weights, state.evaluation_rows, state.evaluation_tokens)
    return (data.fingerprint, evaluation, objective, *sizes)


def arrange(
    spec: RoundSpec, data: PreparedData, *, slots: int | Literal["auto"], base: Base | None = None
) -> WorkerState:
    """Load the base model, unless it is given, and put a pack on it.

    With `auto`, one slot on a CPU, where packing gains little and a trial alone is reproducible to the digit;
    on a GPU as many as fill a pass and fit into memory; with DoRA one. Raises ModelError if the model cannot
    be used, or does not fit into memory with the slots; InputError for a custom optimizer that does not work.
    """
    device, *others = worker_devices(spec.run.gpus_per_worker)
    for kind, name in named(spec.hyperparameters):
        if kind == "optimizer":
            for trial in corners(spec.space(), {kind: name}):
                refuse_bad_optimizer(trial, devices=[device, *others])
    if spec.trains_alone:
        _log.info("slots: %s: %s", slots, spec.trains_alone)
        slots = 1
    if base is None:
        base = load_base(
            spec.model,
            device=device,
            max_length=spec.data.max_length,
            others=others,
            kernels=spec.model.kernels,
            attention=spec.model.attention,
        )
    refuse_tokens_beyond(data, base.num_embeddings, lambda: load_tokenizer(spec.model))
    with explain_out_of_memory(slots):
        state = _packed(spec, data, base, slots=slots)
        _refuse_adapters(state, spec.space())
    return state


def _packed(spec: RoundSpec, data: PreparedData, base: Base, *, slots: int | Literal["auto"]) -> WorkerState:
    """Put a pack on the base model, with slots as `arrange` says."""
    device = base.device
    packing = Packing(1 if slots == "auto" else slots, PASS_TOKENS[device.type])
    meta_model = meta_copy(base, base_path=spec.model.path)
    modules = targeted_modules(meta_model, spec.space())
    refuse_unlike_linear(base, modules)
    state = _state(spec, data, base, meta_model, modules, packing)
    if slots != "auto" or device.type == "cpu":
        return state
    state.pack.close()
    make = partial(_state, spec, data, base, meta_model, modules)
    for probed in range(min(_PROBED_SLOTS, spec.num_trials), 0, -1):
        found = _packing_with(partial(make, replace(packing, slots=probed)), spec)
        if found is not None and (found.slots > 1 or probed == 1):
            return make(found)
    return make(packing)


_PROBED_SLOTS = 2
"""Trials in a probe's passes, whose rows are then laid as those of a pack are; one where two do not fit."""


def _packing_with(make: Callable[[], WorkerState], spec: RoundSpec) -> Packing | None:
    """Return `packing_for` a state, and give the base model its layers back; None if out of memory."""
    state = None
    try:
        with one_out_of_memory():
            state = make()
            limits = [int(MARGIN * free_device_bytes(device)) for device in state.pack.devices]
            return packing_for(state, spec, limits=limits)
    except torch.OutOfMemoryError:
        return None
    finally:
        if state is not None:
            state.pack.close()


def _state(
    spec: RoundSpec,
    data: PreparedData,
    base: Base,
    meta_model: PreTrainedModel,
    modules: Collection[str],
    packing: Packing,
) -> WorkerState:
    max_rank = int(max(values_of(spec.space()["lora_r"])))
    return WorkerState(
        base=base,
        meta_model=meta_model,
        pack=Pack(base, num_slots=packing.slots, max_rank=max_rank, modules=modules),
        train=data.train,
        evaluation=data.evaluation,
        base_path=spec.model.path,
        revision=loaded_commit(spec.model) or spec.model.revision,
        evaluation_rows=spec.evaluation.batch_size,
        micro_tokens=max(1, packing.pass_tokens // packing.slots),
        pass_tokens=packing.pass_tokens,
        evaluation_tokens=packing.pass_tokens,
    )


PROBED_SLOTS = 4
"""Slots with which a probe tells what packing would be worth on a CPU."""
_MEMORY_FACTOR = 3
"""Times the peak memory of one slot that must be free for that: activations grow with the slots."""


def predict_packed(state: WorkerState, spec: RoundSpec, predicted: Prediction) -> Prediction:
    """Add the time of a step with several slots, if `slots: auto` chose one for the sake of its digits.

    That is so on a CPU. `state` is of no use afterwards.
    """
    slots = min(PROBED_SLOTS, spec.num_trials)
    fits = _MEMORY_FACTOR * predicted.peak_memory_bytes < psutil.virtual_memory().available
    if state.base.device.type != "cpu" or predicted.slots > 1 or slots < 2 or spec.trains_alone or not fits:
        return predicted
    packed = predict(with_slots(state, spec, slots), spec)
    return replace(predicted, packed_slots=slots, packed_seconds_per_step=packed.seconds_per_step)


def with_slots(state: WorkerState, spec: RoundSpec, slots: int) -> WorkerState:
    """Return the state with another number of slots; its own pack is closed."""
    modules = targeted_modules(state.meta_model, spec.space())
    max_rank = int(max(values_of(spec.space()["lora_r"])))
    state.pack.close()
    return replace(
        state,
        pack=Pack(state.base, num_slots=slots, max_rank=max_rank, modules=modules),
        micro_tokens=max(1, state.pass_tokens // slots),
    )


def _refuse_adapters(state: WorkerState, space: Space) -> None:
    """Make adapters that the base model may not allow now, so that no trial fails for them.

    DoRA reads the base model's weights, EVA's rank is at most a layer's width, and a plug-in may be wrong.
    Raises ModelError or InputError.
    """
    values = largest_hyperparameters(space)
    seed = seed_of(values)
    if not all(each.packs for each in possible_variants(space)):
        state.new_adapter(values, seed=seed)
    for name in variant_names(space):
        if name != PLAIN:
            state.new_adapter({**values, CHOOSER: name}, seed=seed)
    if space["lora_init"].contains("eva"):
        state.new_adapter({**values, "lora_init": "eva"}, seed=seed)


def packing_for(state: WorkerState, spec: RoundSpec, *, limits: Sequence[int]) -> Packing:
    """Choose the slots for `auto`, from a few probe passes of a trial in each slot of `state`.

    `limits` are the bytes that each of the pack's devices may use; the fullest one decides.
    """
    probed = probe(state, largest_hyperparameters(spec.space()))
    if not probed[0].tokens:
        return Packing(1, state.pass_tokens)
    largest = adapter_sizes(state.meta_model, spec.space())[1]
    packing = choose_on_each(
        [
            DeviceRoom(
                fit_pass_cost(of_device),
                limit_bytes=limit,
                slot_weights=math.ceil(share * max(state.pack.slot_weights, largest)),
            )
            for of_device, limit, share in zip(probed, limits, state.pack.shares, strict=True)
        ],
        update_tokens=tokens_of_update(state, round(_mean_batch_size(spec))),
        longest_row=int(state.train.num_tokens.max()),
        trials=spec.num_trials,
    )
    _log.info("slots: auto: %s, from passes of %s tokens", packing, probed)
    return packing


def workload(base: Base, data: PreparedData, spec: RoundSpec) -> str:
    """Return the fingerprint of what is held fixed: the base model's config and sampled weights; the data."""
    total = hashlib.sha256(data.fingerprint.encode())
    config = {k: v for k, v in base.model.config.to_dict().items() if k not in CONFIG_OF_THE_FILES}
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    total.update(f"{spec.model.dtype} {spec.model.quantization} {spec.data.max_length}".encode())
    if spec.model.tf32:
        total.update(b" tf32")
    for chosen in (spec.model.kernels, spec.model.attention):
        if chosen != "torch":
            total.update(f" {chosen}".encode())
    for name, parameter in base.model.named_parameters():
        sample = parameter.detach().reshape(-1)[:1024].cpu().contiguous().view(torch.uint8)
        total.update(name.encode() + sample.numpy().tobytes())
    return total.hexdigest()


def _evaluation_share(data: PreparedData, spec: RoundSpec) -> float:
    """Return the share of a trial's compute spent on evaluation: its tokens cost half of training tokens."""
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    evaluated = evaluations * float(data.evaluation.num_tokens.sum())
    trained = 2.0 * spec.max_train_steps * _mean_batch_size(spec) * float(data.train.num_tokens.mean())
    return float(evaluated / (evaluated + trained))


def _mean_batch_size(spec: RoundSpec) -> float:
    sizes = values_of(spec.space()["batch_size"])
    return float(sum(sizes) / len(sizes))


def measure_base(state: WorkerState) -> Evaluation:
    """Return the base model's evaluation; no slot has a trial."""
    (scores,) = example_scores(state, ())
    return measured_evaluation(state, scores)
