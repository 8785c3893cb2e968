"""Trials driven without a parent: update by update, or through the training loop itself."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from tuner.adapters import Adapter, Base, Pack, initial_adapter
from tuner.adapters.initial import lora_config, meta_copy
from tuner.data import Examples
from tuner.pipes import CommandReader
from tuner.records import (
    Assignment,
    CheckpointKind,
    Ended,
    Evaluated,
    Evaluation,
    Event,
    RunId,
    Saved,
    Started,
    Value,
    to_json,
)
from tuner.training.optimizer import TrialOptimizer
from tuner.training.packed_passes import micro_step
from tuner.training.trial_run import TrialRun
from tuner.training.worker import train
from tuner.training.worker_state import WorkerState
from tuner.whole import lead

Hyperparameters = Mapping[str, Value]
Say = Callable[[Event], None]

TRAIN = tiny.examples(40, seed=1)
EVALUATION = tiny.examples(12, seed=2)


class DecidesOnDevice(TrialOptimizer):
    """As on a GPU."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.decides_on_device = True


@contextmanager
def worker_state(
    base: Base,
    trials: Iterable[Hyperparameters],
    *,
    slots: int = 1,
    micro_tokens: int = 1 << 20,
    rows: Examples = TRAIN,
) -> Iterator[WorkerState]:
    """A pack with room for these trials on a base, which gets its own layers back at the end."""
    path = str(base.model.name_or_path)
    meta_model = meta_copy(base, base_path=path)
    adapters = [_start(meta_model, path, trial) for trial in trials]
    pack = Pack(
        base,
        num_slots=slots,
        max_rank=max(adapter.config.r for adapter in adapters),
        modules={name for adapter in adapters for name in adapter.weights},
    )
    try:
        yield WorkerState(
            base=base,
            meta_model=meta_model,
            pack=pack,
            train=rows,
            evaluation=EVALUATION,
            base_path=path,
            revision=None,
            evaluation_rows=5,
            micro_tokens=micro_tokens,
        )
    finally:
        pack.close()


def begin(state: WorkerState, slot: int, trial: Hyperparameters, *, max_train_steps: int) -> TrialRun:
    """Create a trial at step 0 in a slot."""
    assignment = Assignment("round1", slot, 1, trial, max_train_steps, max_train_steps, directory="")
    start = state.new_adapter(trial, seed=int(trial["training_seed"]))
    run = state.new_run(assignment, start)
    state.pack.occupy(slot, run.adapter)
    return run


@dataclass(frozen=True)
class Entry:
    """When and where a trial joins the pack."""

    trial: int
    slot: int
    micro_step: int = 0


@dataclass(frozen=True)
class Trained:
    """What a trial left."""

    losses: list[float] = field(default_factory=list)
    """Train loss of every update."""
    weights: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    start: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)


def drive(
    state: WorkerState,
    trials: Sequence[Hyperparameters],
    entries: Iterable[Entry],
    *,
    max_train_steps: int,
) -> dict[int, Trained]:
    """Train side by side: each trial joins as its entry says, as soon as its slot is free."""
    waiting = sorted(entries, key=lambda entry: entry.micro_step)
    inside: dict[int, tuple[int, TrialRun]] = {}
    left: dict[int, Trained] = {}
    num_micro_steps = 0
    while waiting or inside:
        for entry in [e for e in waiting if e.micro_step <= num_micro_steps and e.slot not in inside]:
            if entry.slot in inside:
                continue
            waiting.remove(entry)
            run = begin(state, entry.slot, trials[entry.trial], max_train_steps=max_train_steps)
            inside[entry.slot] = entry.trial, run
            left[entry.trial] = Trained(start=copied(run.optimizer.weights))
        _micro_step(state, inside, left)
        for slot, (trial, run) in list(inside.items()):
            if run.step == max_train_steps or run.reason_infeasible is not None:
                left[trial].weights.update(copied(run.optimizer.weights))
                del inside[slot]
        num_micro_steps += 1
    return left


def solo(
    base: Base,
    trial: Hyperparameters,
    *,
    max_train_steps: int,
    micro_tokens: int = 1 << 20,
    rows: Examples = TRAIN,
) -> Trained:
    """The trial alone in a pack made for it."""
    with worker_state(base, [trial], micro_tokens=micro_tokens, rows=rows) as state:
        return drive(state, [trial], [Entry(0, 0)], max_train_steps=max_train_steps)[0]


def loss_difference(one: Trained, other: Trained) -> float:
    """The largest relative difference of two runs' losses."""
    assert len(one.losses) == len(other.losses)
    return max(abs(a - b) / abs(b) for a, b in zip(one.losses, other.losses, strict=True))


def update_difference(one: Trained, other: Trained) -> float:
    """How far apart two runs' weights end, by norm, relative to how far they moved."""
    assert one.weights.keys() == other.weights.keys()
    apart = torch.cat([(a - b).reshape(-1) for a, b in _pairs(one.weights, other.weights)])
    moved = torch.cat([(a - b).reshape(-1) for a, b in _pairs(other.weights, other.start)])
    return float(apart.double().norm() / moved.double().norm())


def assert_lost_in_rounding(rounded: Base, exact: Base) -> None:
    """Packing moves trials in bfloat16 by less than bfloat16 itself does: a tolerance measured here.

    `exact` is the same base in float32. Losses differ by their root mean square over all updates,
    weight updates by norm.
    """
    steps = 20
    trials = [
        tiny.hyperparameters(training_seed=n, lora_r=4 + n, lora_dropout=0.1 * n, learning_rate=3e-3)
        for n in range(4)
    ]
    with worker_state(rounded, trials, slots=4) as state:
        entries = [Entry(n, 3 - n, micro_step=2 * n) for n in range(4)]
        packed = drive(state, trials, entries, max_train_steps=steps)
    alone = [solo(rounded, trial, max_train_steps=steps) for trial in trials]
    in_float32 = [solo(exact, trial, max_train_steps=steps) for trial in trials]
    assert alone[0].losses[-1] < alone[0].losses[0]
    for measure in (_typical_loss_difference, _typical_update_difference):
        found = measure([packed[n] for n in range(4)], alone)
        tolerance = measure(alone, in_float32)
        assert 0 < tolerance < 0.5
        assert found < tolerance, f"{measure.__name__}: {found:.1e}, bfloat16 itself {tolerance:.1e}"


def assignment(directory: Path, trial: int = 0, **more: object) -> Assignment:
    """Ten steps with evaluations at 0, 3, 6, 9 and 10."""
    fields: dict[str, object] = {
        "round": "round1",
        "trial": trial,
        "attempt": 1,
        "hyperparameters": tiny.hyperparameters(),
        "max_train_steps": 10,
        "evaluate_every": 3,
        "directory": str(directory / f"trial-{trial:04d}"),
    }
    return Assignment(**fields | more)  # type: ignore[arg-type]


class StopsAtMicroStep(CommandReader):
    """Asks a trial to leave, or the worker to close, when the loop has come round so many times."""

    micro_step: int | None = None
    trial: int | None = 0

    def assignments(self, *, wait: bool) -> Iterator[Assignment]:
        yield from super().assignments(wait=wait)
        if self.micro_step is not None:
            if self.micro_step == 0 and self.trial is None:
                self.closed = True
            elif self.micro_step == 0 and self.trial is not None:
                self.unwanted.add(RunId("round1", self.trial))
            self.micro_step -= 1


def run_loop(
    state: WorkerState,
    assignments: Iterable[Assignment],
    *,
    stop_at_micro_step: int | None = None,
    stop: int | None = 0,
    heard: list[Event] | None = None,
) -> list[Event]:
    """Run assignments through the training loop, one after the other as slots get free; what it said.

    Trial `stop` is to leave at `stop_at_micro_step`; None is the whole worker. `heard` has what was
    said, too, where the loop raises.
    """
    waiting, open_ends = list(assignments), set()
    events = [] if heard is None else heard
    reading, writing = os.pipe()
    with os.fdopen(reading) as lines, os.fdopen(writing, "w", buffering=1) as written:
        directories: dict[int, Path] = {}

        def start(assigned: Assignment) -> None:
            open_ends.add(assigned.trial)
            directories[assigned.trial] = Path(assigned.directory)
            written.write(json.dumps({"order": "start", "assignment": to_json(assigned)}) + "\n")

        def say(event: Event) -> None:
            events.append(event)
            if isinstance(event, Saved) and event.checkpoint.kind == CheckpointKind.BEST:
                directory = directories[event.trial]
                lead(directory / "best", directory.parent / event.checkpoint.path)
            if isinstance(event, Ended):
                open_ends.remove(event.trial)
                if waiting:
                    start(waiting.pop(0))
                elif not open_ends:
                    written.write('{"order": "close"}\n')

        for assigned in waiting[: state.pack.num_slots]:
            start(assigned)
        del waiting[: state.pack.num_slots]
        commands = StopsAtMicroStep(lines, on_parent_gone=lambda: None)
        commands.micro_step, commands.trial = stop_at_micro_step, stop
        commands.listen()
        train(state, commands, say)
    return events


def curve(events: Iterable[Event], trial: int = 0) -> list[Evaluation]:
    """A trial's evaluations in the order of the events."""
    return [event.evaluation for event in events if isinstance(event, Evaluated) and event.trial == trial]


def ended(events: Iterable[Event], trial: int = 0) -> Ended:
    """How a trial's attempt ended."""
    (event,) = [event for event in events if isinstance(event, Ended) and event.trial == trial]
    return event


def started(events: Iterable[Event], trial: int = 0) -> Started:
    """Where a trial's attempt began."""
    (event,) = [event for event in events if isinstance(event, Started) and event.trial == trial]
    return event


def copied(weights: Mapping[str, tuple[Tensor, ...]]) -> dict[str, tuple[Tensor, ...]]:
    return {name: tuple(part.detach().clone() for part in parts) for name, parts in weights.items()}


def _typical_loss_difference(some: Sequence[Trained], others: Sequence[Trained]) -> float:
    a, b = (torch.tensor([trained.losses for trained in group]) for group in (some, others))
    return float(((a - b) / b).square().mean().sqrt())


def _typical_update_difference(some: Sequence[Trained], others: Sequence[Trained]) -> float:
    found = [update_difference(a, b) for a, b in zip(some, others, strict=True)]
    return sum(found) / len(found)


def _start(meta_model: PreTrainedModel, base_path: str, trial: Hyperparameters) -> Adapter:
    config = lora_config(trial, base_path=base_path)
    return initial_adapter(meta_model, config, seed=int(trial["training_seed"]))


def _micro_step(
    state: WorkerState, inside: Mapping[int, tuple[int, TrialRun]], left: Mapping[int, Trained]
) -> None:
    before = {slot: run.step for slot, (_, run) in inside.items()}
    micro_step(state, {slot: run for slot, (_, run) in inside.items()})
    for slot, (trial, run) in inside.items():
        if run.step > before[slot]:
            assert run.train_loss is not None
            left[trial].losses.append(run.train_loss)


def _pairs(
    some: Mapping[str, tuple[Tensor, ...]], others: Mapping[str, tuple[Tensor, ...]]
) -> Iterator[tuple[Tensor, ...]]:
    for name, pair in some.items():
        yield from zip(pair, others[name], strict=True)
