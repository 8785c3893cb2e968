from __future__ import annotations

import pytest

from tests.contracts.store import StoreContract
from tuner.store import MemoryStore


class TestMemoryStore(StoreContract):
    @pytest.fixture
    def store(self) -> MemoryStore:
        return MemoryStore()

    @pytest.fixture
    def other(self) -> MemoryStore:
        return MemoryStore()


def test_closing_is_allowed() -> None:
    MemoryStore().close()
