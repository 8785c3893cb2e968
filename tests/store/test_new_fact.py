"""A new kind of fact is one class, one description of its table and one migration; nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Column, ForeignKeyConstraint, Integer, Table, Text, create_engine

from tests.contracts.store import HISTORY, ROUND, TRIAL
from tuner.records import (
    AttemptFact,
    FactError,
    RoundBegun,
    TrialAsked,
    event_from_json,
    event_to_json,
)
from tuner.records.state import Said, TrialFacts
from tuner.store import MemoryStore, Store, kept, open_store, recording
from tuner.store.schema import METADATA, ExactFloat, Numbers


@dataclass(frozen=True, slots=True)
class Heat:
    """What a device was like."""

    celsius: float
    samples: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Heated(AttemptFact):
    """A worker's device got hot; the last said counts."""

    heat: Heat

    def change(self, trial: TrialFacts) -> None:
        trial.note = f"{self.heat.celsius} degrees, {max(self.heat.samples)} at most"


SAID = Heated("round1", 7, 1, Heat(0.1 + 0.2, (80.5, float("inf"))))


@pytest.fixture
def table() -> Iterator[Table]:
    """The description, and what a migration would create."""
    table = Table(
        "tuner_heat",
        METADATA,
        Column("study", Text, primary_key=True),
        Column("round", Text, primary_key=True),
        Column("trial", Integer, primary_key=True, autoincrement=False),
        Column("attempt", Integer, nullable=False),
        Column("celsius", ExactFloat, nullable=False),
        Column("samples", Numbers("d"), nullable=False),
        ForeignKeyConstraint(
            ["study", "round", "trial"], ["tuner_trials.study", "tuner_trials.round", "tuner_trials.number"]
        ),
    )
    kept(Heated, table)
    yield table
    METADATA.remove(table)
    del recording.WRITES[Heated], recording.TRIAL_ROWS[table]


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path, table: Table) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
        return
    url = f"sqlite:///{tmp_path}/tuner.db"
    with closing(open_store(url, study="study")) as store:
        engine = create_engine(url)
        table.create(engine)
        engine.dispose()
        yield store


def test_it_is_recorded_and_read_back(store: Store) -> None:
    store.record(*HISTORY[:3], SAID)
    before = store.trials("round1")
    assert before[0].reason == "0.30000000000000004 degrees, inf at most"
    store.record(SAID)
    assert store.trials("round1") == before
    assert store.trial("round1", 7) == before[0]
    store.record(Heated("round1", 7, 1, Heat(9.0, (1.0,))))
    assert store.trials("round1")[0].reason == "9.0 degrees, 1.0 at most"


def test_of_the_unknown_it_is_refused(store: Store) -> None:
    store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
    with pytest.raises(FactError, match="Heated: attempt 1 of trial round1/8 is not recorded"):
        store.record(Heated("round1", 8, 1, SAID.heat))


def test_a_worker_says_it_as_a_line() -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(SAID)))) == SAID
    assert Said.kinds["heated"] is Heated
