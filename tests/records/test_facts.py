"""Facts refuse what cannot be, and add up to what is asked of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.methods.table import seed_of
from tuner.records import (
    Attempt,
    Checkpoint,
    CheckpointKind,
    Continuation,
    Evaluation,
    Throughput,
    Trial,
    added_up,
)

_NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_/", min_size=1)


@given(_NAMES, st.integers(0), st.integers(0))
def test_a_continuation_is_read_from_its_text(name: str, trial: int, step: int) -> None:
    told = Continuation(name, trial, step)
    assert Continuation.parse(str(told)) == told


@pytest.mark.parametrize("text", ["", "3@36", "round1/3", "round1/x@36", "round1/3@"])
def test_what_is_no_continuation_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"ROUND/TRIAL@STEP|invalid literal"):
        Continuation.parse(text)


def test_an_evaluation_before_the_first_step_or_without_token_counts_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0; got -1"):
        Evaluation(-1, 2.0)
    with pytest.raises(ValueError, match="one token count for each example"):
        Evaluation(0, 2.0, example_nll=(1.0,))


def test_token_accuracy_is_of_all_target_tokens_where_it_was_counted() -> None:
    counted = Evaluation(0, 2.0, example_nll=(1.0, 1.0), example_tokens=(6, 2), correct_tokens=6)
    assert counted.token_accuracy == 0.75
    assert Evaluation(0, 2.0, example_nll=(1.0,), example_tokens=(6,)).token_accuracy is None
    assert Evaluation(0, 2.0, correct_tokens=0).token_accuracy is None


def test_a_trial_counts_repeated_steps_and_finds_its_newest_checkpoint() -> None:
    trial = Trial(
        "round1",
        3,
        {"training_seed": 7},
        attempts=(Attempt(1, 0, 30, 0.0), Attempt(2, 25, 60, 1.0)),
        checkpoints=tuple(Checkpoint(CheckpointKind.TRUNK, step, "", 1, "") for step in (36, 48, 24)),
    )
    assert (seed_of(trial.hyperparameters), trial.executed_steps) == (7, 65)
    assert trial.checkpoint(CheckpointKind.TRUNK) == trial.checkpoints[1]
    assert trial.checkpoint(CheckpointKind.TRUNK, 24) == trial.checkpoints[2]
    assert trial.checkpoint(CheckpointKind.BEST) is None


def test_throughputs_add_up_and_their_ratios_are_of_the_sums() -> None:
    one = Throughput(
        "a", 4.0, 1.0, 1.0, passes=10, micro_steps=40, trial_steps=20, tokens=300, padded_tokens=400
    )
    two = Throughput(
        "b", 6.0, 3.0, 5.0, passes=10, micro_steps=20, trial_steps=30, tokens=450, padded_tokens=600
    )
    both = added_up([replace(one, peak_memory_bytes=9), replace(two, peak_memory_bytes=5)])
    assert both is not None
    assert both.session == ""
    assert both.tokens_per_second == 75.0
    assert both.trial_steps_per_second == 5.0
    assert both.packing_factor == 3.0
    assert both.padding_share == 0.25
    assert both.evaluation_share == 0.2
    assert both.peak_memory_bytes == 9


def test_nothing_measured_has_no_ratios() -> None:
    assert added_up([]) is None
    idle = Throughput()
    ratios = (
        idle.tokens_per_second,
        idle.trial_steps_per_second,
        idle.packing_factor,
        idle.padding_share,
        idle.evaluation_share,
    )
    assert ratios == (None,) * 5
