"""On a device without values: nothing is in the wrong place, and the host waits once an update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorDeviceMismatchError

from tests import tiny
from tests.accelerator import FIRST, SECOND, Crossings, accelerated, training
from tuner.adapters.device_io import send
from tuner.training.packed_passes import evaluate, micro_step


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
        pytest.param((0, 1, 2, 3), 0.05, True, id="four"),
        pytest.param((0, 1, 2, 3), 0.0, False, id="four, padded"),
        pytest.param((0, 1, 3), 0.05, False, id="a hole, padded"),
        pytest.param((0, 1, 3), 0.0, True, id="a hole"),
    ],
)
def test_updates_and_evaluations(slots: Sequence[int], rate: float, joined: bool) -> None:
    trials = {slot: tiny.hyperparameters(training_seed=slot, lora_dropout=rate) for slot in slots}
    with training(trials, joins_rows=joined) as on:
        for step in range(1, 4):
            if step == 3:
                assert on.state.base.keep_fewer_activations()
            micro_step(on.state, on.runs)
            assert {run.step for run in on.runs.values()} == {step}
            assert on.reads.devices == [FIRST] * step
        made = evaluate(on.state, on.runs)
        assert on.reads.devices == [FIRST] * 4
    assert all(evaluation.step == 3 for evaluation in made.values())
    assert all(run.train_loss is not None and run.train_loss > 0 for run in on.runs.values())


SPREAD = ("model.layers.1", "model.norm", "lm_head")


@pytest.mark.parametrize(
    ("slots", "rate", "joined", "second"),
    [
        pytest.param((0,), 0.0, False, SPREAD, id="alone, padded"),
        pytest.param((0, 1, 2, 3), 0.05, True, SPREAD, id="four"),
        pytest.param((0, 1, 3), 0.05, True, SPREAD[:-1], id="a hole, without the head"),
    ],
)
def test_two_devices(slots: Sequence[int], rate: float, joined: bool, second: Sequence[str]) -> None:
    """Each layer's weights are with it; losses and norms are read from the first device."""
    trials = {slot: tiny.hyperparameters(training_seed=slot, lora_dropout=rate) for slot in slots}
    with training(trials, joins_rows=joined, second=second) as on:
        assert [str(device) for device in on.state.pack.devices] == [FIRST, SECOND]
        for step in range(1, 3):
            if step == 2:
                assert on.state.base.keep_fewer_activations()
            micro_step(on.state, on.runs)
            assert {run.step for run in on.runs.values()} == {step}
            assert on.reads.devices == [FIRST] * step
        evaluate(on.state, on.runs)
        for name, (a, b) in on.runs[0].optimizer.weights.items():
            assert {str(a.device), str(b.device)} == {SECOND if ".1." in name else FIRST}


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
        ("cpu", FIRST): 1,
        ("cpu", SECOND): 1,
        # Hidden states, two tensors of rotary embeddings, and a mask if rows are padded.
        (FIRST, SECOND): 3 if joined else 4,
        # The gradient of the hidden states, all losses, and a norm of each trial.
        (SECOND, FIRST): 2 + num_trials,
    }


def test_no_read_between_updates() -> None:
    """Micro-batches of an unfinished update are not waited for."""
    trials = {n: tiny.hyperparameters(training_seed=n, batch_size=size) for n, size in enumerate((8, 2))}
    with training(trials, micro_tokens=30) as on:
        updates = 0
        while on.runs[0].step < 1:
            before = [run.step for run in on.runs.values()]
            micro_step(on.state, on.runs)
            updates += before != [run.step for run in on.runs.values()]
        assert on.runs[1].step > 1
        assert len(on.reads.devices) == updates


def test_numbers_that_are_read_decide() -> None:
    """Losses and norms that are not finite end a trial at its third bad update."""

    def bad(tensors: Sequence[Tensor]) -> list[list[float]]:
        return [[float("nan")] * tensor.numel() for tensor in tensors]

    with training({0: tiny.hyperparameters(batch_size=2)}, answer=bad) as on:
        for _ in range(3):
            assert on.runs[0].reason_infeasible is None
            micro_step(on.state, on.runs)
    assert str(on.runs[0].reason_infeasible).endswith("the last at step 3")


def test_what_is_sent_arrives_in_one_copy() -> None:
    with accelerated():
        one, other = send([np.ones((2, 3), np.float32), np.arange(3)], torch.device(FIRST))
    assert (str(one.device), one.dtype, one.shape) == (FIRST, torch.float32, (2, 3))
    assert (str(other.device), other.dtype, other.shape) == (FIRST, torch.int64, (3,))
