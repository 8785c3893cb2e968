"""A pass costs as many operators with many trials as with one, and few more with dropout or an empty slot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests import tiny
from tests.operators import OperatorCounter, operators_of
from tests.training.driving import begin, worker_state
from tuner.adapters import Base
from tuner.training.packed_passes import micro_step


@pytest.fixture
def base(models: tiny.Models) -> Base:
    return models.base("llama", dtype="bfloat16")


def of_micro_step(base: Base, slots: Sequence[int], **changes: float | str) -> OperatorCounter:
    """What the second update of trials in these slots takes, of one micro-batch each."""
    trials = [tiny.hyperparameters(training_seed=slot, **changes) for slot in slots]
    with worker_state(base, trials, slots=max(slots) + 1) as state:
        runs = {
            slot: begin(state, slot, trial, max_train_steps=9)
            for slot, trial in zip(slots, trials, strict=True)
        }
        micro_step(state, runs)
        counted = operators_of(lambda: micro_step(state, runs))
        assert all(run.step == 2 for run in runs.values())
    return counted


def test_the_counter_counts_what_is_computed() -> None:
    x = torch.ones(4, 4)
    counted = operators_of(lambda: (x.view(16).t(), x @ x, x + 1, x[0]))
    assert counted.calls == {"mm": 1, "add": 1}


@pytest.mark.parametrize("num_trials", [1, 8, 16])
def test_dropout(base: Base, num_trials: int) -> None:
    """Measured: 1.9 times."""
    slots = range(num_trials)
    without, dropping = (of_micro_step(base, slots, lora_dropout=rate).total for rate in (0.0, 0.05))
    assert without < dropping <= 2.2 * without


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_number_of_trials(base: Base, rate: float) -> None:
    """Each trial adds its own optimizer, but nothing in a layer."""
    few, many = (of_micro_step(base, range(k), lora_dropout=rate) for k in (1, 16))
    assert few.of("bmm", "baddbmm_", "mm", "bitwise_xor_") == many.of("bmm", "baddbmm_", "mm", "bitwise_xor_")
    assert many.total - few.total <= 15 * 15


@pytest.mark.parametrize("rate", [0.0, 0.05])
def test_an_empty_slot_between_others(base: Base, rate: float) -> None:
    whole, holed = (of_micro_step(base, slots, lora_dropout=rate) for slots in ([0, 1, 2], [0, 1, 3]))
    assert whole.total <= holed.total <= 1.02 * whole.total
    for name in ("index", "index_put_", "baddbmm_", "_local_scalar_dense"):
        assert holed.calls[name] == whole.calls[name]


CEILINGS = {"load": (1, 0), "collect": (2, 0), "clip": (0, 4), "update": (0, 4)}
"""Operators of each part: so many, and so many more a trial."""


@pytest.mark.parametrize(
    ("slots", "changes"),
    [
        (range(1), {}),
        (range(8), {}),
        (range(16), {}),
        (range(8), {"lora_dropout": 0.05}),
        ((0, 1, 2, 3, 4, 5, 6, 8), {}),
        (range(8), {"optimizer": "adamw_8bit"}),
        (range(16), {"optimizer": "adamw_8bit"}),
    ],
    ids=["1", "8", "16", "dropout", "a hole", "8 in 8-bit", "16 in 8-bit"],
)
def test_what_follows_a_pass(base: Base, slots: Sequence[int], changes: dict[str, float | str]) -> None:
    """Load, collect, clip and update, of which only the last two are each trial's own."""
    trials = [tiny.hyperparameters(training_seed=slot, max_grad_norm=1e-3, **changes) for slot in slots]
    with worker_state(base, trials, slots=max(slots) + 1) as state:
        runs = {s: begin(state, s, trial, max_train_steps=9) for s, trial in zip(slots, trials, strict=True)}
        micro_step(state, runs)
        weights = {slot: run.optimizer.weights for slot, run in runs.items()}
        gradients = {slot: run.optimizer.gradients for slot, run in runs.items()}
        micro_step(state, runs)  # leaves gradients behind
        optimizers = [run.optimizer for run in runs.values()]
        parts = {
            "load": lambda: state.pack.load(weights),
            "collect": lambda: state.pack.collect(gradients),
            "clip": lambda: [optimizer.gradient_norm() for optimizer in optimizers],
            "update": lambda: [optimizer.step(1.0, norm=0.0) for optimizer in optimizers],
        }
        found = {name: operators_of(work) for name, work in parts.items()}
    for name, (once, a_trial) in CEILINGS.items():
        assert found[name].total <= once + a_trial * len(trials), (name, found[name].calls)
