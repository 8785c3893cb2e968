from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from tests.contracts.store import ROUND, TRIAL, StoreContract
from tuner.records import (
    Evaluated,
    Evaluation,
    RoundBegun,
    TrialAsked,
)
from tuner.store import SqlStore, open_store


class RefusesWhatNoRecordHolds:
    def test_a_missing_loss_is_not_taken_for_an_unknown_trial(self, store: SqlStore) -> None:
        nothing: Any = None
        store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
        with pytest.raises(IntegrityError):
            store.record(Evaluated("round1", 7, 1, Evaluation(0, nothing)))
        assert store.trials("round1") == (TRIAL,)


class SqlContract(RefusesWhatNoRecordHolds, StoreContract):
    """Every study in one database; a subclass gives the fixture `url`."""

    @pytest.fixture
    def store(self, url: str) -> Iterator[SqlStore]:
        with closing(open_store(url, study="study")) as store:
            yield store

    @pytest.fixture
    def other(self, url: str) -> Iterator[SqlStore]:
        with closing(open_store(url, study="other")) as store:
            yield store


class TestSqlite(SqlContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tuner.db"


class TestPostgres(SqlContract):
    @pytest.fixture
    def url(self, postgres_url: str) -> str:
        return postgres_url


def test_a_study_opened_again_is_the_same(url: str) -> None:
    for known, study in ((0, "study"), (0, "other"), (1, "study")):
        with closing(open_store(url, study=study)) as store:
            assert len(store.rounds()) == known
            store.record(RoundBegun(ROUND))
