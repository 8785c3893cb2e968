"""How many slots fit: memory in bytes by a model of it, and a probe that measures."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch

from tuner.adapters.device_io import one_out_of_memory
from tuner.config import RoundSpec
from tuner.data import batch_rows
from tuner.errors import ModelError
from tuner.methods.variants import CHOOSER, known_variant, possible_variants
from tuner.records import Assignment, Choices, Fixed, Hyperparameters, Prediction, Range, Space, Value
from tuner.training.packed_passes import example_scores, forward_backward, micro_step, padded_tokens
from tuner.training.trial_run import MicroBatch, TrialRun, cut, cut_joined
from tuner.training.worker_state import WorkerState, peak_memory_bytes

MAX_SLOTS = 16
"""More slots have shown no gain: a pass is full long before."""
KNEE_SHARE = 0.1
"""A pass is full when its fixed costs are at most this share of it."""
MIN_KNEE_TOKENS, MAX_KNEE_TOKENS = 1024, 32_768
MARGIN = 0.92
"""Share of the free memory that a prediction may use."""
BYTES_PER_SLOT_WEIGHT = 32
"""Per adapter weight in a slot. In float32: the stacked weight and its gradient, 8; the trial's master
weight, gradient, two moments and best weight, 20; slots that are not adjacent are copied, 4. In bfloat16 the
stacked two take 4, and their sum 4. A GPU's ranks are multiples of 8."""


@dataclass(frozen=True)
class Probed:
    """The measured costs of passes of different sizes, with a trial in each slot."""

    tokens: tuple[int, ...]
    """Of each pass, including padding."""
    seconds: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    """Peak memory during each, including the base model."""


@dataclass(frozen=True)
class PassCost:
    """A linear fit of the probe passes: cost = fixed + per_token * tokens of a pass."""

    fixed_seconds: float
    seconds_per_token: float
    fixed_bytes: float
    bytes_per_token: float

    @property
    def knee_tokens(self) -> int:
        """Return the tokens from which a pass is full because its fixed costs have become small."""
        if self.seconds_per_token <= 0:
            return MIN_KNEE_TOKENS
        tokens = (1 / KNEE_SHARE - 1) * self.fixed_seconds / self.seconds_per_token
        return int(min(max(tokens, MIN_KNEE_TOKENS), MAX_KNEE_TOKENS))

    def peak_bytes(self, *, slots: int, slot_weights: int, pass_tokens: int) -> float:
        """Return the peak memory of training."""
        adapters = slots * slot_weights * BYTES_PER_SLOT_WEIGHT
        return self.fixed_bytes + adapters + self.bytes_per_token * pass_tokens


@dataclass(frozen=True)
class Packing:
    """The slots and tokens of a worker."""

    slots: int
    pass_tokens: int
    """Of all trials in one pass."""


def fit_pass_cost(probed: Probed) -> PassCost:
    """Fit by least squares; costs that fall with the tokens, which is noise, count as constant."""
    fixed_seconds, seconds = _line(probed.tokens, probed.seconds)
    fixed_bytes, per_token = _line(probed.tokens, probed.peak_bytes)
    return PassCost(fixed_seconds, seconds, fixed_bytes, per_token)


def choose_packing(
    cost: PassCost, *, limit_bytes: int, slot_weights: int, update_tokens: int, longest_row: int, trials: int
) -> Packing:
    """Return as many trials as fill a pass and fit into memory; at least one.

    `slot_weights` counts the weights of a slot. `update_tokens` are those of a typical update of one trial,
    padding included, as in what the passes of a probe were measured by.
    Memory goes to the slots first, since the tokens of a pass can be reduced and slots cannot; but a pass
    always has space for one row of each.
    """
    wanted = min(trials, MAX_SLOTS, math.ceil(cost.knee_tokens / max(1, update_tokens)))
    for slots in range(max(1, wanted), 0, -1):
        left = limit_bytes - cost.peak_bytes(slots=slots, slot_weights=slot_weights, pass_tokens=0)
        fitting = left / cost.bytes_per_token if cost.bytes_per_token > 0 else math.copysign(math.inf, left)
        if fitting >= slots * longest_row or slots == 1:
            full = max(cost.knee_tokens, slots * longest_row)
            return Packing(slots, int(max(longest_row, min(fitting, full))))
    raise AssertionError("one slot is always chosen")


@dataclass(frozen=True)
class DeviceRoom:
    """What passes and slots cost one of the base model's devices, and what it has."""

    cost: PassCost
    limit_bytes: int
    slot_weights: int
    """Weights of a slot that are there."""


def choose_on_each(
    rooms: Sequence[DeviceRoom], *, update_tokens: int, longest_row: int, trials: int
) -> Packing:
    """Return `choose_packing` of the device that is full first; the slots are the same on all."""
    for _ in range(2):  # the slots of the fullest leave the others more tokens, or fewer
        each = [
            choose_packing(
                room.cost,
                limit_bytes=room.limit_bytes,
                slot_weights=room.slot_weights,
                update_tokens=update_tokens,
                longest_row=longest_row,
                trials=trials,
            )
            for room in rooms
        ]
        trials = min(packing.slots for packing in each)
    return Packing(trials, min(packing.pass_tokens for packing in each))


def out_of_memory(slots: int | Literal["auto"]) -> ModelError:
    """Return the error for a round whose smallest pass does not fit into memory."""
    return ModelError(
        f"run.slots: with {slots} slot(s), memory has no room for a pass of even one row; lower run.slots, "
        "data.max_length or hyperparameters.lora_r, or set model.quantization: nf4"
    )


@contextmanager
def explain_out_of_memory(slots: int | Literal["auto"]) -> Iterator[None]:
    """Raise `out_of_memory` if memory runs out within the block."""
    try:
        with one_out_of_memory():
            yield
    except torch.OutOfMemoryError as error:
        raise out_of_memory(slots) from error


def free_device_bytes(device: torch.device) -> int:
    """Return the GPU memory that this process holds or may take."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return (value at 0, slope), neither below 0; a constant for a single point."""
    if len(set(x)) < 2:
        return float(np.mean(y)), 0.0
    slope, start = np.polyfit(x, y, 1)
    if slope <= 0:
        return float(np.mean(y)), 0.0
    if start < 0:
        return 0.0, float(np.dot(x, y) / np.dot(x, x))
    return float(start), float(slope)


_STEPS = 3
_PROBED_TOKENS = (512, 2048, 8192)


def predict(state: WorkerState, spec: RoundSpec) -> Prediction:
    """Fill every slot with a trial of the largest adapter, train a few steps and evaluate once.

    Raises ModelError if one row of a trial does not fit into memory.
    """
    devices = state.pack.devices
    hyperparameters = largest_hyperparameters(spec.space())
    slots = range(state.pack.num_slots)
    with explain_out_of_memory(len(slots)):
        runs = {slot: _trial(state, slot, hyperparameters, spec.max_train_steps) for slot in slots}
        took = [_timed(lambda: _update(state, runs), devices) for _ in range(_STEPS + 1)][1:]
        if any(run.step == 0 for run in runs.values()):
            raise out_of_memory(len(slots))
        evaluation = _timed(lambda: example_scores(state, tuple(slots)), devices)
    step = sorted(took)[_STEPS // 2]
    peak = max(peak_memory_bytes(device) for device in devices)
    return Prediction(len(slots), step / len(slots), evaluation / len(slots), peak)


def probe(state: WorkerState, hyperparameters: Hyperparameters) -> list[Probed]:
    """Run passes of a trial in each slot over the longest rows, up to the first that does not fit.

    Returns what was measured for each of the pack's devices.
    """
    devices = state.pack.devices
    runs = {slot: _trial(state, slot, hyperparameters, horizon=1) for slot in range(state.pack.num_slots)}
    longest = state.train.num_tokens.argsort()[::-1].tolist()
    found: list[tuple[int, float, list[int]]] = []
    for wanted in _PROBED_TOKENS:
        rows = longest[: max(1, wanted // len(runs) // int(state.train.num_tokens[longest[0]]))]
        part = MicroBatch(tuple(rows), tuple(range(len(rows))))
        tokens = padded_tokens([part] * len(runs), state)
        if found and tokens <= found[-1][0]:
            break
        seconds = [_timed(lambda part=part: _pass_over(state, runs, part), devices) for _ in range(3)]  # type: ignore[misc]
        if any(run.reason_infeasible for run in runs.values()) or state.pass_tokens < tokens:
            break
        found.append((tokens, min(seconds[1:]), [peak_memory_bytes(device) for device in devices]))
    tokens_of, took = tuple(f[0] for f in found), tuple(f[1] for f in found)
    return [Probed(tokens_of, took, tuple(f[2][number] for f in found)) for number in range(len(devices))]


_SAMPLED_UPDATES = 16


def tokens_of_update(state: WorkerState, batch_size: int) -> int:
    """Return the mean tokens that passes compute for an update of one trial beside another, padding included.

    Rows that are joined are padded to the longest trial's, others to the longest row of all.
    """
    lengths, total = state.train.num_tokens, 0
    divided = cut_joined if state.joins_rows else cut
    for step in range(1, _SAMPLED_UPDATES + 1):
        both = [
            divided(
                batch_rows(len(lengths), batch_size=batch_size, seed=seed, step=step),
                lengths,
                micro_tokens=state.micro_tokens,
            )
            for seed in (0, 1)
        ]
        total += sum(padded_tokens(filter(None, parts), state) for parts in zip_longest(*both))
    return math.ceil(total / (2 * _SAMPLED_UPDATES))


def largest_hyperparameters(space: Space) -> dict[str, Value]:
    """Return the hyperparameters that need the most memory: largest rank, batch and dropout, DoRA, else the
    first.
    """
    switches = [each.switch for each in possible_variants(space)]
    values: dict[str, Value] = {}
    for name, dimension in space.items():
        match dimension:
            case Fixed(value=value):
                values[name] = value
            case Choices(values=choices) if name in ("lora_r", "batch_size", "lora_dropout", *switches):
                values[name] = max(choices)
            case Choices(values=choices) if name == CHOOSER:
                values[name] = max(choices, key=lambda each: known_variant(str(each)).weights_per_output)
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
    run = state.new_run(assignment, start)
    state.pack.occupy(slot, start)
    return run


def _update(state: WorkerState, runs: dict[int, TrialRun]) -> None:
    """Run one update of every trial."""
    steps = {slot: run.step for slot, run in runs.items()}
    while any(run.step == steps[slot] and run.reason_infeasible is None for slot, run in runs.items()):
        micro_step(state, {slot: run for slot, run in runs.items() if run.step == steps[slot]})


def _pass_over(state: WorkerState, runs: dict[int, TrialRun], part: MicroBatch) -> None:
    for device in state.pack.devices:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    forward_backward(state, runs, dict.fromkeys(runs, part))


def _timed(work: Callable[[], object], devices: Sequence[torch.device]) -> float:
    begun = time.perf_counter()
    work()
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - begun
