from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from tests.contracts.store import ROUND, TRIAL, StoreContract
from tuner.records import Evaluation
from tuner.store import SqlStore, open_store
from tuner.store.facts import EvaluationMade, RoundBegun, TrialAsked


class RefusesWhatNoRecordHolds:
    def test_a_missing_loss_is_not_taken_for_an_unknown_trial(self, store: SqlStore) -> None:
        nothing: Any = None
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        with pytest.raises(IntegrityError):
            store.record(EvaluationMade("round1", 7, Evaluation(0, nothing)))
        assert store.trials("round1") == (TRIAL,)


class TestSqlite(RefusesWhatNoRecordHolds, StoreContract):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SqlStore]:
        store = open_store(f"sqlite:///{tmp_path}/tuner.db")
        yield store
        store.close()


class TestPostgres(RefusesWhatNoRecordHolds, StoreContract):
    @pytest.fixture
    def store(self, postgres_url: str) -> Iterator[SqlStore]:
        store = open_store(postgres_url)
        yield store
        store.close()
