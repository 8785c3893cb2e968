"""Time a few passes and steps and measure their memory; nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tuner.config import RoundSpec
from tuner.methods.variants import possible_variants
from tuner.records import Assignment, Choices, Fixed, Hyperparameters, Range, Space, Value
from tuner.training.memory_budget import Probed, explain_out_of_memory, out_of_memory
from tuner.training.packed_passes import example_scores, forward_backward, micro_step
from tuner.training.trial_run import MicroBatch, TrialRun
from tuner.training.worker_state import WorkerState, peak_memory_bytes

_STEPS = 3
_PROBED_TOKENS = (512, 2048, 8192)


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of a round, from a few steps of all its slots."""

    slots: int
    seconds_per_step: float
    """Per trial: slots that train together divide the time of a pass."""
    seconds_per_evaluation: float
    """The same for an evaluation."""
    peak_memory_bytes: int


def predict(state: WorkerState, spec: RoundSpec) -> Prediction:
    """Fill every slot with a trial of the largest adapter, train a few steps and evaluate once.

    Raises ModelError if one row of a trial does not fit into memory.
    """
    device = state.base.device
    hyperparameters = largest_hyperparameters(spec.space())
    slots = range(state.pack.num_slots)
    with explain_out_of_memory(len(slots)):
        runs = {slot: _trial(state, slot, hyperparameters, spec.max_train_steps) for slot in slots}
        took = [_timed(lambda: _update(state, runs), device) for _ in range(_STEPS + 1)][1:]
        if any(run.step == 0 for run in runs.values()):
            raise out_of_memory(len(slots))
        evaluation = _timed(lambda: example_scores(state, tuple(slots)), device)
    step = sorted(took)[_STEPS // 2]
    return Prediction(len(slots), step / len(slots), evaluation / len(slots), peak_memory_bytes(device))


def probe(state: WorkerState, hyperparameters: Hyperparameters) -> Probed:
    """Run passes of one trial over its longest rows, up to the first that does not fit."""
    device = state.base.device
    run = _trial(state, 0, hyperparameters, horizon=1)
    longest = state.train.num_tokens.argsort()[::-1].tolist()
    found: list[tuple[int, float, int]] = []
    for wanted in _PROBED_TOKENS:
        rows = longest[: max(1, wanted // int(state.train.num_tokens[longest[0]]))]
        tokens = len(rows) * int(state.train.num_tokens[longest[0]])
        if found and tokens <= found[-1][0]:
            break
        seconds = [_timed(lambda rows=rows: _pass_over(state, run, rows), device) for _ in range(3)]  # type: ignore[misc]
        if run.reason_infeasible is not None or state.pass_tokens < tokens:
            break
        found.append((tokens, min(seconds[1:]), peak_memory_bytes(device)))
    return Probed(tuple(f[0] for f in found), tuple(f[1] for f in found), tuple(f[2] for f in found))


def largest_hyperparameters(space: Space) -> dict[str, Value]:
    """Return the hyperparameters that need the most memory: largest rank and batch, DoRA, else the first."""
    switches = [each.switch for each in possible_variants(space)]
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case Choices(values=choices) if name in ("lora_r", "batch_size", *switches):
                values[name] = max(choices)
            case Choices(values=choices):
                values[name] = choices[0]
            case Range(high=high, integer=integer):
                values[name] = int(high) if integer else high
            case _:
                values[name] = 1.0
    return values


def _trial(state: WorkerState, slot: int, hyperparameters: Hyperparameters, horizon: int) -> TrialRun:
    """Create a trial at step 0 in a slot."""
    start = state.new_adapter(hyperparameters, seed=0)
    assignment = Assignment("probe", slot, 1, hyperparameters, horizon, horizon, directory="")
    run = TrialRun(assignment, start, device=state.base.device)
    state.pack.occupy(slot, start)
    return run


def _update(state: WorkerState, runs: dict[int, TrialRun]) -> None:
    """Run one update of every trial."""
    steps = {slot: run.step for slot, run in runs.items()}
    while any(run.step == steps[slot] and run.reason_infeasible is None for slot, run in runs.items()):
        micro_step(state, {slot: run for slot, run in runs.items() if run.step == steps[slot]})


def _pass_over(state: WorkerState, run: TrialRun, rows: list[int]) -> None:
    if state.base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(state.base.device)
    forward_backward(state, {0: run}, {0: MicroBatch(tuple(rows), tuple(range(len(rows))))})


def _timed(work: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
