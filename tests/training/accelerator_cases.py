"""On a device without values: nothing is in the wrong place, and the host waits once a step at most."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError
from torch.utils._python_dispatch import TorchDispatchMode

from tests import tiny
from tests.accelerator import FIRST, SECOND, Crossings, accelerated, is_tally, tally, training
from tuner.adapters.device_io import send
from tuner.methods.optimizers.adamw import ADAMW
from tuner.training.packed_passes import evaluate, micro_step, read_updates

OF_BOTH = pytest.mark.acceptance
"""Combines what other cases show one by one."""


def test_it_finds_what_is_in_the_wrong_place() -> None:
    with accelerated():
        one, other = torch.ones(2, device=FIRST), torch.ones(2, device=SECOND)
        for elsewhere in (torch.ones(2), other):
            with pytest.raises(FakeTensorDeviceMismatchError):
                one + elsewhere
        with pytest.raises(DataDependentOutputException):
            one.tolist()
        with pytest.raises(DataDependentOutputException):
            bool((one > 0).all())


@pytest.mark.parametrize(
    ("slots", "rate", "joined"),
    [
        pytest.param((0,), 0.05, True, id="alone"),
        pytest.param((0, 1, 2, 3), 0.05, True, id="four", marks=OF_BOTH),
        pytest.param((0, 1, 2, 3), 0.0, False, id="four, padded"),
        pytest.param((0, 1, 3), 0.05, False, id="a hole, padded", marks=OF_BOTH),
        pytest.param((0, 1, 3), 0.0, True, id="a hole"),
    ],
)
def test_updates_and_evaluations(slots: Sequence[int], rate: float, joined: bool) -> None:
    trials = {slot: tiny.hyperparameters(training_seed=slot, lora_dropout=rate) for slot in slots}
    with training(trials, joins_rows=joined) as on:
        on.state.read_every_seconds = 0.0
        for step in range(1, 3):
            if step == 2:
                assert on.state.base.keep_fewer_activations()
            micro_step(on.state, on.runs)
            assert {run.step for run in on.runs.values()} == {step}
            assert on.reads.devices == [FIRST] * step
        on.state.read_every_seconds = 3600.0
        micro_step(on.state, on.runs)
        assert on.reads.devices == [FIRST] * 2
        made = evaluate(on.state, on.runs)
        assert on.reads.devices == [FIRST] * 4  # of the update, and of the scores
    assert all(evaluation.step == 3 for evaluation in made.values())
    assert all(run.train_loss is not None and run.train_loss > 0 for run in on.runs.values())


SPREAD = ("model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize(
    ("slots", "rate", "joined", "second"),
    [
        pytest.param((0,), 0.0, False, SPREAD, id="alone, padded"),
        pytest.param((0, 1, 2, 3), 0.05, True, SPREAD, id="four", marks=OF_BOTH),
        pytest.param((0, 1, 3), 0.05, True, SPREAD[:-1], id="a hole, without the head"),
    ],
)
def test_two_devices(slots: Sequence[int], rate: float, joined: bool, second: Sequence[str]) -> None:
    """Each layer's weights are with it; losses and counts are read from the first device."""
    trials = {slot: tiny.hyperparameters(training_seed=slot, lora_dropout=rate) for slot in slots}
    with training(trials, joins_rows=joined, second=second) as on:
        assert [str(device) for device in on.state.pack.devices] == [FIRST, SECOND]
        on.state.read_every_seconds = 0.0
        for step in range(1, 3):
            if step == 2:
                assert on.state.base.keep_fewer_activations()
            micro_step(on.state, on.runs)
            assert {run.step for run in on.runs.values()} == {step}
            assert on.reads.devices == [FIRST] * step
        evaluate(on.state, on.runs)
        for name, (a, b) in on.runs[0].optimizer.weights.items():
            assert {str(a.device), str(b.device)} == {SECOND if ".1." in name else FIRST}


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param([(0,), (0,)], id="none on the second"),
        pytest.param([(1,), (1,)], id="all on the second"),
        pytest.param([(1,), (0, 1)], id="one alone"),
    ],
)
def test_trials_that_adapt_layers_of_one_device(layers: Sequence[tuple[int, ...]]) -> None:
    """What a device has nothing of is left alone, and no device decides for another."""
    trials = {
        n: tiny.hyperparameters(training_seed=n, layers_to_transform=wanted)
        for n, wanted in enumerate(layers)
    }
    with training(trials, joins_rows=True, second=SPREAD) as on:
        micro_step(on.state, on.runs)
        micro_step(on.state, on.runs)
        evaluate(on.state, on.runs)
        assert {run.step for run in on.runs.values()} == {2}


@pytest.mark.parametrize(("num_trials", "joined", "more"), [(1, True, 0), (4, False, 2)])
def test_each_device_gets_row_data_once_a_pass(num_trials: int, joined: bool, more: int) -> None:
    """However many layers and trials there are."""
    trials = {n: tiny.hyperparameters(training_seed=n, lora_dropout=0.05) for n in range(num_trials)}
    second = [*SPREAD, *(f"model.layers.{2 + number}" for number in range(more))]
    with training(trials, joins_rows=joined, second=second, num_layers=2 + more) as on:
        micro_step(on.state, on.runs)
        with Crossings() as crossings:
            micro_step(on.state, on.runs)
    assert crossings.counted == {
        ("cpu", FIRST): 2,  # The other one is of the updates.
        ("cpu", SECOND): 1,
        # Hidden states, two tensors of rotary embeddings, and a mask if rows are padded; what is decided of
        # all updates, and torch's own copies for the A's and the B's of each trial.
        (FIRST, SECOND): (3 if joined else 4) + 1 + 2 * num_trials,
        # The gradient of the hidden states, all losses, and a norm of each trial.
        (SECOND, FIRST): 2 + num_trials,
    }


@pytest.mark.parametrize(
    ("sizes", "seconds", "optimizer", "second", "a_step"),
    [
        pytest.param((8, 4, 3, 2), 0.0, "adamw", (), 1, id="four, mixed"),
        pytest.param((4, 2), 3600.0, "adamw", (), 0, id="nothing to read for"),
        pytest.param((4, 2), 0.0, "adamw_8bit", (), 1, id="mixed, adamw_8bit"),
        pytest.param((4, 2), 0.0, "lion", (), 1, id="mixed, lion"),
        pytest.param((4, 2), 0.0, "lion_8bit", (), 1, id="mixed, lion_8bit"),
        pytest.param((4, 2), 0.0, "muon", (), 1, id="mixed, muon"),
        pytest.param((4, 2), 3600.0, "adamw_8bit", (), 0, id="nothing to read for, 8 bits", marks=OF_BOTH),
        pytest.param((4, 2), 0.0, "adamw", SPREAD, 1, id="mixed, two devices"),
        pytest.param((4, 2), 0.0, "adamw_8bit", SPREAD, 1, id="mixed, adamw_8bit, two devices"),
        pytest.param((4, 2), 0.0, "muon", SPREAD, 1, id="mixed, muon, two devices", marks=OF_BOTH),
        pytest.param((4,), 0.0, f"{__name__}:HOSTS", (), 1, id="decided by the host"),
    ],
)
def test_reads_a_step_of_the_slowest_trial(
    sizes: Sequence[int], seconds: float, optimizer: str, second: Sequence[str], a_step: int
) -> None:
    """However many updates of the others it takes, and never between two micro-batches of it."""
    trials = {
        n: tiny.hyperparameters(training_seed=n, batch_size=size, optimizer=optimizer)
        for n, size in enumerate(sizes)
    }
    with training(trials, micro_tokens=30, second=second) as on:
        on.state.read_every_seconds, on.state.read_at = seconds, time.monotonic()
        for step in range(1, 3):
            while on.runs[0].step < step:
                assert len(on.reads.devices) <= a_step * (step - 1)
                micro_step(on.state, on.runs)
            assert len(on.reads.devices) == a_step * step
        assert len(set(sizes)) == 1 or on.runs[len(sizes) - 1].step > 2


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_what_a_micro_step_sends(optimizer: str) -> None:
    """One copy for the rows of a pass and what belongs to them, one for all updates that it completes."""
    trials = {
        n: tiny.hyperparameters(training_seed=n, batch_size=size, optimizer=optimizer, lora_dropout=0.05)
        for n, size in enumerate((6, 3))
    }
    seen = set()
    with training(trials, micro_tokens=30) as on:
        on.state.read_every_seconds, on.state.read_at = 3600.0, time.monotonic()
        while on.runs[0].step < 1:  # the first updates make the moments
            micro_step(on.state, on.runs)
        while on.runs[0].step < 3:
            steps = [run.step for run in on.runs.values()]
            with Crossings() as crossings:
                micro_step(on.state, on.runs)
            is_update = steps != [run.step for run in on.runs.values()]
            assert crossings.counted == {("cpu", FIRST): 1 + is_update}
            seen.add(is_update)
    assert seen == {False, True}


class Attended(TorchDispatchMode):
    """Counts calls of `varlen_attn`, forward and backward, and copies into grids."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.name().partition("::")[2]
        if "attn" in name or "attention" in name or name == "index_copy_":
            self.counted[name] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("slots", "second"),
    [
        pytest.param((0, 1, 3), (), id="a hole"),
        pytest.param((0,), SPREAD, id="alone, two devices", marks=OF_BOTH),
    ],
)
def test_varlen_is_one_call_a_layer(slots: Sequence[int], second: Sequence[str]) -> None:
    """For all trials; what marks their examples comes with the rows, and the host does not wait for it."""
    trials = {n: tiny.hyperparameters(training_seed=n, lora_dropout=0.05) for n in slots}
    with training(trials, second=second, attention="varlen") as on:
        on.state.read_every_seconds, on.state.read_at = 3600.0, time.monotonic()
        micro_step(on.state, on.runs)
        before = len(on.reads.devices)
        with Attended() as attended, Crossings() as crossings:
            micro_step(on.state, on.runs)
        assert len(on.reads.devices) == before
    copies = attended.counted.pop("index_copy_", 0)
    assert attended.counted == {"_varlen_attn": 2, "_varlen_attn_backward": 2}
    assert copies <= 2  # of the last layer's feed-forward
    assert crossings.counted["cpu", FIRST] == 2  # Rows and what belongs to them, and the updates.
    assert crossings.counted["cpu", SECOND] == (1 if second else 0)


HOSTS = replace(ADAMW, name="hosts", skips_on_device=False)
"""A plug-in's whose updates the host decides."""


def test_numbers_that_are_read_decide() -> None:
    """Losses and norms that are not finite end a trial of the host's at its third bad update."""

    def bad(tensors: Sequence[Tensor]) -> list[list[float]]:
        return [[float("nan")] * tensor.numel() for tensor in tensors]

    with training({0: tiny.hyperparameters(batch_size=2, optimizer=f"{__name__}:HOSTS")}, answer=bad) as on:
        for _ in range(3):
            assert on.runs[0].reason_infeasible is None
            micro_step(on.state, on.runs)
    assert str(on.runs[0].reason_infeasible).endswith("the last at step 3")


def test_a_count_that_is_read_late_decides() -> None:
    """The trial has trained on; the step and the reason are those of its third bad update."""

    def third(tensors: Sequence[Tensor]) -> list[list[float]]:
        assert all(map(is_tally, tensors))
        return [tally(0.5, rests_at=3, bad=3)] * len(tensors)

    with training({0: tiny.hyperparameters(batch_size=2)}, answer=third) as on:
        on.state.read_every_seconds = 3600.0
        on.state.read_at = time.monotonic()
        for _ in range(7):
            micro_step(on.state, on.runs)
        assert (on.runs[0].step, on.runs[0].reason_infeasible) == (7, None)
        read_updates(on.runs.values())
    assert on.runs[0].step == 3
    assert str(on.runs[0].reason_infeasible).endswith("the last at step 3")


def test_what_is_sent_arrives_in_one_copy() -> None:
    with accelerated():
        one, other = send([np.ones((2, 3), np.float32), np.arange(3)], torch.device(FIRST))
    assert (str(one.device), one.dtype, one.shape) == (FIRST, torch.float32, (2, 3))
    assert (str(other.device), other.dtype, other.shape) == (FIRST, torch.int64, (3,))
