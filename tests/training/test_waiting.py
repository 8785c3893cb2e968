"""The host waits for the device once an update, and once an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import masking_utils

from tests import tiny
from tests.operators import OperatorCounter, operators_of
from tests.training.driving import begin, worker_state
from tuner.adapters import device_io, evaluation
from tuner.training import packed_passes, trial_run
from tuner.training.packed_passes import evaluate, micro_step
from tuner.training.worker_state import WorkerState

WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "item")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many values each read brought to the host."""
    seen: list[int] = []

    def counted(tensors: Sequence[Tensor]) -> list[list[float]]:
        found = device_io.read(tensors)
        seen.append(sum(map(len, found)))
        return found

    for reader in (packed_passes, evaluation, trial_run):
        monkeypatch.setattr(reader, "read", counted)
    return seen


def counted_micro_step(state: WorkerState, runs: dict[int, trial_run.TrialRun]) -> OperatorCounter:
    return operators_of(lambda: micro_step(state, runs))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_read_an_update_and_none_between(models: tiny.Models, reads: list[int], dropout: float) -> None:
    trials = [tiny.hyperparameters(batch_size=4, lora_dropout=dropout, training_seed=n) for n in range(3)]
    with worker_state(models.base("llama"), trials, slots=3, micro_tokens=1) as state:
        runs = {n: begin(state, n, trial, max_train_steps=9) for n, trial in enumerate(trials)}
        for _ in range(3):
            for micro_batch in range(4):
                counted = counted_micro_step(state, runs)
                assert not counted.of(*WAITS)
                assert reads == ([15] if micro_batch == 3 else [])  # 3 norms, 4 losses of 3 trials
            reads.clear()
        losses = [run.train_loss for run in runs.values()]
        assert all(loss is not None and loss > 0 for loss in losses)


def test_one_read_an_evaluation(models: tiny.Models, reads: list[int]) -> None:
    trials = [tiny.hyperparameters(training_seed=n) for n in range(2)]
    with worker_state(models.base("llama"), trials, slots=2) as state:
        runs = {n: begin(state, n, trial, max_train_steps=9) for n, trial in enumerate(trials)}
        micro_step(state, runs)
        reads.clear()
        state.evaluation_tokens = 40
        evaluate(state, runs)
    assert reads == [2 * 2 * len(state.evaluation)]


def test_a_model_that_looks_for_several_examples_in_a_row_does_again_afterwards() -> None:
    ids = torch.tensor([[0, 1, 0, 1]])
    with device_io.one_example_a_row():
        assert masking_utils.find_packed_sequence_indices(ids) is None
    assert masking_utils.find_packed_sequence_indices(ids) is not None


ARRAYS = st.lists(
    st.tuples(
        st.sampled_from([np.int64, np.int32, np.float32, np.float64, np.uint8]),
        st.lists(st.integers(0, 4), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=5,
)


@given(ARRAYS)
def test_one_buffer_holds_every_array(shapes: list[tuple[type[np.generic], list[int]]]) -> None:
    arrays = [
        (np.arange(np.prod(shape)) + 7 * n).astype(kind).reshape(shape)
        for n, (kind, shape) in enumerate(shapes)
    ]
    buffer, starts = device_io.in_one(arrays)
    found = device_io.apart(torch.from_numpy(buffer), starts, arrays)
    for tensor, array in zip(found, arrays, strict=True):
        assert torch.equal(tensor, torch.from_numpy(array))
        assert tensor.dtype == torch.from_numpy(array).dtype


@given(st.lists(st.lists(st.floats(width=32), max_size=4), max_size=4))
def test_reads_in_order(values: list[list[float]]) -> None:
    found = device_io.read([torch.tensor(part, dtype=torch.float32) for part in values])
    assert repr(found) == repr(values)
