"""What the device decides is what the host would have decided, to the digit, whenever it is read."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from tests import tiny
from tests.training.driving import DecidesOnDevice, assignment, curve, ended, run_loop, worker_state
from tuner.adapters import Adapter
from tuner.records import Event
from tuner.training import trial_run
from tuner.training.packed_passes import _update_by_host, _update_on_device, read_updates
from tuner.training.trial_run import TrialRun

CPU = torch.device("cpu")
LENGTHS, TARGETS = np.full(40, 9), np.arange(1, 41)

gradients = st.sampled_from([math.nan, math.inf, 0.0, 1e-3, 5.0])
losses = st.sampled_from([0.0, 0.1, 2.5, math.nan])


def begun(kind: str = "adamw", *, max_grad_norm: float, on_device: bool) -> TrialRun:
    torch.manual_seed(0)
    start = Adapter(LoraConfig(r=16), {"layer": (torch.randn(16, 300), torch.randn(4, 16))})
    trial = tiny.hyperparameters(
        optimizer=kind, max_grad_norm=max_grad_norm, weight_decay=0.1, learning_rate=0.01
    )
    assigned = assignment(Path(), hyperparameters=trial, max_train_steps=30, evaluate_every=30)
    run = TrialRun(assigned, start, device=CPU)
    run.optimizer.decides_on_device = on_device
    return run


def begin_update(run: TrialRun, gradient: float, nll: float) -> None:
    run.begin_update(LENGTHS, TARGETS, micro_tokens=1 << 20)
    for parts in run.optimizer.gradients.values():
        for number, part in enumerate(parts):
            part.fill_(gradient * (number + 1))
    for share in (0.25, 0.75):
        run.add_loss(torch.tensor(nll * share))


def left(run: TrialRun) -> dict[str, Any]:
    """All that a checkpoint keeps of the run, with numbers as text: NaN is as NaN."""
    snapshot = run.snapshot()
    return {
        "step": snapshot.step,
        "counters": repr(dict(snapshot.counters)),
        "loss": repr((run.train_loss, run.loss_step, run.reason_infeasible)),
        "weights": [part.tolist() for parts in run.optimizer.weights.values() for part in parts],
        "moments": {
            name: value.tolist()
            for name, value in snapshot.optimizer.items()
            if bool(value.any()) and "qmap" not in name  # constants, which the first update makes
        },
    }


KINDS = ["adamw", "adamw_8bit", "lion", "lion_8bit", "muon"]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(
    updates=st.lists(st.tuples(gradients, losses, st.booleans()), min_size=1, max_size=12),
    max_grad_norm=st.sampled_from([0.0, 1.0]),
)
def test_read_at_once_or_late(
    kind: str, updates: list[tuple[float, float, bool]], max_grad_norm: float
) -> None:
    """A trial that rests repeats the updates since then, once the host has read of it."""
    host, there = (begun(kind, max_grad_norm=max_grad_norm, on_device=where) for where in (False, True))
    for gradient, nll, _ in updates:
        if host.reason_infeasible is None:
            begin_update(host, gradient, nll)
            _update_by_host({0: host}, [host])
    reads = iter([is_read for _, _, is_read in updates])
    while there.reason_infeasible is None and there.step < len(updates):
        gradient, nll, _ = updates[there.step]
        begin_update(there, gradient, nll)
        _update_on_device({0: there})
        if there.step == len(updates) or next(reads, False):
            read_updates([there])
    assert left(there) == left(host)


@pytest.mark.parametrize("kind", KINDS)
def test_read_at_once_is_as_the_host_decides(kind: str) -> None:
    host, there = (begun(kind, max_grad_norm=1.0, on_device=where) for where in (False, True))
    for gradient in (math.nan, 1e-3, math.inf, 5.0, 0.0, math.nan, 5.0, 1e-3):
        for run in (host, there):
            begin_update(run, gradient, 2.0)
        _update_by_host({0: host}, [host])
        _update_on_device({0: there})
        read_updates([there])
        assert left(there) == left(host)


def test_a_trial_is_over_at_its_third_bad_update_however_long_it_goes_on() -> None:
    run = begun(max_grad_norm=1.0, on_device=True)
    for gradient in (1e-3, math.nan, math.inf, 0.0, 1e-3, 5.0):
        begin_update(run, gradient, 2.0)
        _update_on_device({0: run})
    assert (run.step, run.reason_infeasible) == (6, None)
    read_updates([run])
    assert run.step == 4
    assert run.reason_infeasible == "gradient zero or not finite in 3 updates in a row, the last at step 4"


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("seconds", [0.0, 3600.0])
def test_mixed_batch_sizes_and_a_wild_trial(
    models: tiny.Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, kind: str
) -> None:
    """The loop says the same evaluations and ends, with counts read once a step or at evaluations only."""
    trials = [
        tiny.hyperparameters(optimizer=kind, batch_size=size, training_seed=size, learning_rate=rate)
        for size, rate in ((6, 3e-3), (2, 1e-2), (3, 1e30))
    ]

    def events(where: str) -> list[Event]:
        assigned = [
            assignment(tmp_path / where, number, hyperparameters=trial, evaluate_every=5 + 5 * (number == 2))
            for number, trial in enumerate(trials)
        ]
        with worker_state(models.base("llama"), trials, slots=3, micro_tokens=30) as state:
            state.read_every_seconds, state.read_at = seconds, time.monotonic()
            return run_loop(state, assigned)

    host = events("host")
    monkeypatch.setattr(trial_run, "TrialOptimizer", DecidesOnDevice)
    there = events("there")
    for number in range(3):
        if kind == "adamw_8bit":  # the wild one rests, and the shapes of the others' passes are not the same
            losses = [[(e.step, e.eval_loss) for e in curve(each, number)] for each in (there, host)]
            assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]
            assert [loss for _, loss in losses[0]] == pytest.approx([loss for _, loss in losses[1]], rel=1e-3)
        else:
            assert curve(there, number) == curve(host, number)
        assert ended(there, number) == ended(host, number)
    assert ended(there, 2).outcome == "infeasible"
    assert "updates in a row, the last at step 4" in str(ended(there, 2).reason)
