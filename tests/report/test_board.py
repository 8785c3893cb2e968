from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.records import (
    Died,
    Ended,
    Evaluated,
    Event,
    Progressed,
    Ready,
    RunId,
    Started,
    Trial,
    TrialState,
)
from tuner.report.board import Board

from . import synthetic


def waiting(number: int) -> Trial:
    return synthetic.trial(number, 1e-4, state=TrialState.WAITING, evaluations=())


def run(
    board: Board, trial: int, *, start: int = 0, stop: int = 60, at: float = 0.0, pace: float = 1.0
) -> float:
    """A trial that says a step at a time, `pace` seconds each; returns when it ends."""
    board.take(Started("round1", trial, 1, start), now=at)
    for step in range(start + 1, stop + 1):
        at += pace
        board.take(Progressed("round1", trial, 1, step, 1.5), now=at)
    return at


def test_time_left_is_the_remaining_steps_at_the_pace_so_far() -> None:
    board = Board(trials_total=4, max_train_steps=60)
    assert board.eta_seconds(0.0) is None
    at = run(board, 0, pace=2.0)
    board.take(Ended("round1", 0, 1, 60, "complete"), now=at)
    assert board.remaining_steps == 180
    assert board.steps_per_second(at) == pytest.approx(0.5)
    assert board.eta_seconds(at) == pytest.approx(360.0)
    assert board.done_share == pytest.approx(0.25)


def test_steps_inherited_from_a_trunk_are_neither_executed_nor_still_to_run() -> None:
    board = Board(trials_total=1, max_train_steps=60)
    at = run(board, 0, start=36, stop=48, pace=1.0)
    assert board.steps_per_second(at) == pytest.approx(1.0)
    assert board.remaining_steps == 12


def test_an_infeasible_trial_has_nothing_left_to_run_and_is_never_the_best() -> None:
    board = Board(trials_total=2, max_train_steps=60)
    board.sync([synthetic.trial(0, 1e-4), waiting(1)])
    board.take(Started("round1", 1, 1, 0), now=0.0)
    board.take(Evaluated("round1", 1, 1, synthetic.evaluation(5, 0.01)), now=5.0)
    board.take(Ended("round1", 1, 1, 20, "infeasible", "diverged"), now=20.0)
    assert board.remaining_steps == 0
    assert board.num_results == 2
    assert board.best is board.rows[0]
    assert board.rows[1].reason == "diverged"


def test_a_dead_worker_leaves_its_trials_waiting_and_the_others_alone() -> None:
    board = Board(trials_total=3, max_train_steps=60)
    board.sync([synthetic.trial(0, 1e-4)])
    run(board, 1, stop=10)
    board.take(Died("killed", (RunId("round1", 1),)), now=11.0)
    assert [row.state for row in board.rows.values()] == [TrialState.COMPLETE, TrialState.WAITING]


def test_going_back_to_a_checkpoint_lowers_the_step() -> None:
    board = Board(trials_total=1, max_train_steps=60)
    run(board, 0, stop=33)
    board.take(Died("killed", (RunId("round1", 0),)), now=40.0)
    board.take(Started("round1", 0, 2, 30), now=50.0)
    assert board.rows[0].step == 30
    assert board.remaining_steps == 30


def test_facts_overrule_what_an_event_suggested() -> None:
    board = Board(trials_total=1, max_train_steps=60)
    run(board, 0, stop=5)
    board.take(Ended("round1", 0, 1, 5, "failed", "out of disk"), now=6.0)
    assert board.rows[0].state is TrialState.WAITING
    failed = dataclasses.replace(synthetic.trial(0, 1e-4, evaluations=()), state=TrialState.FAILED)
    board.sync([failed])
    assert board.rows[0].state is TrialState.FAILED
    assert board.remaining_steps == 60, "a failed trial is replaced by a new one"


def test_a_failed_attempt_that_was_not_the_last_leaves_the_trial_waiting() -> None:
    board = Board(trials_total=1, max_train_steps=60)
    board.take(Ended("round1", 0, 1, 5, "stopped"), now=1.0)
    assert board.rows[0].state is TrialState.WAITING


events = st.one_of(
    st.builds(Ready, slots=st.integers(1, 4), device=st.just("cpu")),
    st.builds(Started, st.just("r"), st.integers(0, 3), st.just(1), st.integers(0, 60)),
    st.builds(Progressed, st.just("r"), st.integers(0, 3), st.just(1), st.integers(0, 60), st.floats()),
    st.builds(
        Evaluated, st.just("r"), st.integers(0, 3), st.just(1),
        st.builds(synthetic.evaluation, st.integers(0, 60), st.floats(width=32)),
    ),
    st.builds(
        Ended, st.just("r"), st.integers(0, 3), st.just(1), st.integers(0, 60),
        st.sampled_from(["complete", "infeasible", "pruned", "stopped", "failed"]),
    ),
    st.builds(Died, st.text(max_size=5)),
)  # fmt: skip


@given(st.lists(events, max_size=30))
def test_whatever_is_said_the_shares_stay_shares(said: list[Event]) -> None:
    board = Board(trials_total=3, max_train_steps=60)
    for now, event in enumerate(said):
        board.take(event, now=float(now))
        assert 0.0 <= board.done_share <= 1.0
        assert board.remaining_steps >= 0
        eta = board.eta_seconds(float(now))
        assert eta is None or eta >= 0.0
