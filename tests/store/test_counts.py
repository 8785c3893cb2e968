"""Steps that were run are never fewer than what checkpoints and progress prove, after any kill."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tuner.records import (
    AttemptStarted,
    Checkpoint,
    CheckpointKind,
    Ended,
    Evaluated,
    Evaluation,
    Fact,
    Progressed,
    RoundBegun,
    RoundRecord,
    Saved,
    Trial,
    TrialAsked,
)
from tuner.report.tables import _trial_facts
from tuner.store import MemoryStore, Store, open_store


def said(attempt: int, step: int, kind: str) -> Fact:
    if kind == "progress":
        return Progressed("round1", 0, attempt, step)
    if kind == "evaluation":
        return Evaluated("round1", 0, attempt, Evaluation(step, 1.0))
    path = f"trial-0000/{kind}/step-{step:06d}.a{attempt}"
    return Saved("round1", 0, attempt, Checkpoint(CheckpointKind(kind), step, path, 1, "x"))


KINDS = st.sampled_from(["progress", "evaluation", "best", "last", "trunk"])
ATTEMPTS = st.lists(
    st.tuples(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 30), KINDS), max_size=6)),
    min_size=1,
    max_size=4,
)
"""Attempts: where each starts, and what is heard of it before it is killed, as steps after its start."""


def told(store: Store, attempts: list[tuple[int, list[tuple[int, str]]]]) -> int:
    """Record the attempts; return the steps that are proved."""
    store.record(
        RoundBegun(RoundRecord("round1", 60, {}, 0.0)), TrialAsked(Trial("round1", 0, {"lora_r": 8}))
    )
    proved = 0
    for number, (start, heard) in enumerate(attempts, start=1):
        store.record(AttemptStarted("round1", 0, number, start, 0.0))
        for after, kind in heard:
            store.record(said(number, start + after, kind))
        store.record(Ended("round1", 0, number, start, "interrupted", at=1.0))
        proved += max((after for after, _ in heard), default=0)
    return proved


@given(ATTEMPTS)
def test_no_proved_step_is_lost(attempts: list[tuple[int, list[tuple[int, str]]]]) -> None:
    store = MemoryStore()
    proved = told(store, attempts)
    assert store.trial("round1", 0).executed_steps == proved


def test_nor_in_a_database(url: str, tmp_path: Path) -> None:
    attempts = [(0, [(5, "progress"), (10, "last")]), (10, [(3, "evaluation"), (1, "progress")]), (10, [])]
    with closing(open_store(url, study="tiny")) as store:
        assert told(store, attempts) == 13
        trial = store.trial("round1", 0)
    assert trial.executed_steps == 13
    assert "13 steps in 3 attempts; up to a second of a killed attempt is unknown" in str(
        _trial_facts(trial, max_train_steps=60, kept={})
    )
