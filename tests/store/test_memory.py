from __future__ import annotations

import pytest

from tests.contracts.store import StoreContract
from tuner.records import (
    RoundBegun,
    RoundRecord,
)
from tuner.store import MemoryStore


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def other(self) -> MemoryStore:
        return MemoryStore()


def test_closing_loses_nothing() -> None:
    """There is no file to open again: what a closed one holds stays readable."""
    store = MemoryStore()
    store.record(RoundBegun(RoundRecord("round1", 10, {}, 0.0)))
    store.close()
    assert [record.name for record in store.rounds()] == ["round1"]
