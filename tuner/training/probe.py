"""`study check --probe`: a few steps of one trial, timed, with what they take in memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tuner.adapters import Pack, initial_adapter, load_base
from tuner.adapters.initial import hollow_copy, lora_config
from tuner.data import PreparedData
from tuner.playbook.schedule import evaluation_steps
from tuner.records import Assignment, Choices, Fixed, Range, Space, Value
from tuner.spec import RoundSpec
from tuner.training.loop import example_nll, tick
from tuner.training.opening import PASS_TOKENS
from tuner.training.trial_run import TrialRun
from tuner.training.workplace import Workplace

_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """What a probe saw."""

    seconds_per_trial: float
    peak_memory_bytes: int


def probe_round(spec: RoundSpec, data: PreparedData) -> Measured:
    """Train one trial of the largest adapter for a few steps and evaluate once. Keeps nothing."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    base = load_base(spec.model, device=device, max_length=spec.data.max_length)
    hollow = hollow_copy(base, base_path=spec.model.path)
    hyperparameters = largest(spec.space())
    start = initial_adapter(hollow, lora_config(hyperparameters, base_path=spec.model.path), seed=0)
    place = Workplace(
        base=base,
        hollow=hollow,
        pack=Pack(base, num_slots=1, max_rank=start.config.r, modules=start.weights),
        train=data.train,
        evaluation=data.evaluation,
        base_path=spec.model.path,
        revision=spec.model.revision,
        evaluation_rows=spec.evaluation.batch_size,
        micro_tokens=PASS_TOKENS[device.type],
    )
    assignment = Assignment(
        spec.round, 0, 1, hyperparameters, spec.max_train_steps, spec.evaluation.every_steps, directory=""
    )
    run = TrialRun(assignment, start, device=device)
    place.pack.occupy(0, start)
    took = [_timed(lambda: _update(place, run), device) for _ in range(_STEPS + 1)][1:]
    evaluation = _timed(lambda: example_nll(place, (0,)), device)
    evaluations = len(evaluation_steps(spec.max_train_steps, spec.evaluation.every_steps)) - 1
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return Measured(spec.max_train_steps * sorted(took)[_STEPS // 2] + evaluations * evaluation, int(peak))


def largest(space: Space) -> dict[str, Value]:
    """The hyperparameters that take the most memory: the largest rank and batch, the first of all else."""
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case Choices(values=choices) if name in ("lora_r", "batch_size"):
                values[name] = max(choices)
            case Choices(values=choices):
                values[name] = choices[0]
            case Range(high=high, integer=integer):
                values[name] = int(high) if integer else high
            case _:
                values[name] = 1.0
    return values


def _update(place: Workplace, run: TrialRun) -> None:
    step = run.step
    while run.step == step:
        tick(place, {0: run})


def _timed(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
