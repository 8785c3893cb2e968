"""Whatever is said again, and in whatever pieces, a store knows what the facts say once."""

from __future__ import annotations

import tempfile
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.store.histories import ROUNDS, histories, replayable
from tuner.records import (
    Fact,
)
from tuner.store import MemoryStore, Store, open_store


def contents(store: Store) -> str:
    """Everything a store gives, to the last digit; NaN equals itself here."""
    return repr((store.rounds(), [store.trials(name) for name in ROUNDS], store.promotions()))


def record_with_replays(store: Store, history: list[Fact], data: st.DataObject) -> None:
    done = 0
    while done < len(history):
        piece = data.draw(st.integers(1, len(history) - done), label="piece")
        store.record(*history[done : done + piece])
        done += piece
        before = contents(store)
        for fact in data.draw(
            st.lists(st.sampled_from(replayable(history[:done])), max_size=5), label="again"
        ):
            store.record(fact)
            assert contents(store) == before, fact
        if data.draw(st.booleans(), label="all again"):
            for fact in history[:done]:
                store.record(fact)
            assert contents(store) == before


def memory_store(_directory: str) -> Store:
    return MemoryStore()


def sqlite_store(directory: str) -> Store:
    return open_store(f"sqlite:///{directory}/tuner.db", study="study")


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(data=st.data())
def test_studies_told_in_turns_know_what_each_would_alone(data: st.DataObject) -> None:
    told = {"one": data.draw(histories()), "other": data.draw(histories())}
    with tempfile.TemporaryDirectory() as directory:
        stores = {name: open_store(f"sqlite:///{directory}/tuner.db", study=name) for name in told}
        turns = data.draw(st.permutations([name for name, history in told.items() for _ in history]))
        facts = {name: iter(history) for name, history in told.items()}
        for name in turns:
            stores[name].record(next(facts[name]))
        for name, store in stores.items():
            alone = MemoryStore()
            alone.record(*told[name])
            assert contents(store) == contents(alone)
            store.close()


@pytest.mark.parametrize("make", [memory_store, sqlite_store])
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(history=histories(), data=st.data())
def test_replays_change_nothing(
    make: Callable[[str], Store], history: list[Fact], data: st.DataObject
) -> None:
    once = MemoryStore()
    once.record(*history)
    with tempfile.TemporaryDirectory() as directory:
        store = make(directory)
        record_with_replays(store, history, data)
        assert contents(store) == contents(once)
        store.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(history=histories())
def test_a_round_taken_over_is_what_it_was(history: list[Fact]) -> None:
    whole, taken = MemoryStore(), MemoryStore()
    whole.record(*history)
    for record in whole.rounds():
        taken.take_over(record, whole.trials(record.name))
    assert repr(taken.rounds()) == repr(whole.rounds())
    assert repr([taken.trials(name) for name in ROUNDS]) == repr([whole.trials(name) for name in ROUNDS])
