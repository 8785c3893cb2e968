"""A database that cannot be used is refused in one clear message, and nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from tests import unsynced
from tests.contracts.store import ROUND, TRIAL
from tests.store import processes
from tuner.errors import StorageAway, StorageError
from tuner.installation import install_command
from tuner.records import (
    RoundBegun,
    TrialAsked,
)
from tuner.store import exists, normal_url, open_store, open_to_read
from tuner.store.database import _switch_to_wal, open_engine, parse_url


@pytest.mark.parametrize("content", [b"xy", b"goal: notes\n" * 3, b"\0" * 600, os.urandom(9000)])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tuner.db"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=rf"{path}: file is not a database; .*storage") as raised:
        open_store(f"sqlite:///{path}", study="study")
    assert raised.value.exit_code == 2
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    (tmp_path / "tuner.db").touch()
    open_store(f"sqlite:///{tmp_path}/tuner.db", study="study").close()
    assert exists(f"sqlite:///{tmp_path}/tuner.db")


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a directory"):
        open_store(f"sqlite:///{tmp_path}", study="study")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"there is no directory {tmp_path}/a/b"):
        open_store(f"sqlite:///{tmp_path}/a/b/tuner.db", study="study")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        open_store(f"sqlite:///{tmp_path}/file/tuner.db", study="study")


@contextmanager
def as_somebody() -> Iterator[Path]:
    """A directory, and a user whose rights count: those of root always suffice."""
    directory = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    try:
        if is_root:
            shutil.chown(directory, 65534)
            os.seteuid(65534)
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)
        shutil.rmtree(directory)


def test_a_directory_without_the_right_to_write() -> None:
    with as_somebody() as directory:
        directory.chmod(0o555)
        with pytest.raises(StorageError, match=rf"{directory}/tuner.db: Permission denied"):
            open_store(f"sqlite:///{directory}/tuner.db", study="study")
        assert list(directory.iterdir()) == []


@pytest.mark.parametrize("closed", ["file", "directory"])
def test_a_database_without_the_right_to_write(closed: str) -> None:
    with as_somebody() as directory:
        path = directory / "tuner.db"
        open_store(f"sqlite:///{path}", study="study").close()
        culprit = path if closed == "file" else directory
        culprit.chmod(0o555)
        before = path.read_bytes()
        with pytest.raises(StorageError, match=rf"{culprit} is not writable"):
            open_store(f"sqlite:///{path}", study="study")
        assert path.read_bytes() == before
        assert list(directory.iterdir()) == [path]


@pytest.mark.parametrize("closed", ["file", "directory"])
def test_a_database_without_the_right_to_write_is_read(closed: str) -> None:
    with as_somebody() as directory:
        path = directory / "tuner.db"
        with closing(open_store(f"sqlite:///{path}", study="study")) as store:
            store.record(RoundBegun(ROUND))
            store.record(TrialAsked(TRIAL))
        (path if closed == "file" else directory).chmod(0o555)
        with closing(open_to_read(f"sqlite:///{path}", study="study")) as store:
            assert store.round(ROUND.name) == ROUND
            assert store.trials(ROUND.name) == (TRIAL,)
            with pytest.raises(StorageError, match="is not writable; make it writable, or copy") as raised:
                store.record(TrialAsked(TRIAL))
            assert not isinstance(raised.value, StorageAway)  # nobody waits for it
        assert list(directory.iterdir()) == [path]


def test_tables_of_an_earlier_version_are_not_read_where_they_cannot_be_brought_up_to_date() -> None:
    with as_somebody() as directory:
        path = directory / "tuner.db"
        with closing(sqlite3.connect(path)) as connection:
            connection.execute("CREATE TABLE other (id INTEGER)")
        path.chmod(0o444)
        with pytest.raises(StorageError, match="is not writable; make it writable, or copy"):
            open_to_read(f"sqlite:///{path}", study="study")


LITTLE_ROOM = """
import resource, signal, sys
from tuner.errors import StorageAway, StorageError
from tuner.store import open_store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    open_store(sys.argv[1], study="study")
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("room", [0, 2000, 20000])
def test_no_room_leaves_no_file(tmp_path: Path, room: int) -> None:
    path = tmp_path / "tuner.db"
    command = [sys.executable, "-c", LITTLE_ROOM, f"sqlite:///{path}", str(room)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{path}: ")
    assert list(tmp_path.iterdir()) == []


def test_no_room_leaves_a_database_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "tuner.db"
    sqlite3.connect(path).execute("CREATE TABLE mine (x)").connection.close()
    before = path.read_bytes()
    command = [sys.executable, "-c", LITTLE_ROOM, f"sqlite:///{path}", "2000"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith(f"{path}: ")
    assert path.read_bytes()[100:] == before[100:]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://me@host/db", "'mysql'.*sqlite:///FILE.db or postgresql"),
        ("postgresql+psycopg2://me@host/db", "'postgresql\\+psycopg2' is not supported"),
        ("tuner.db", "'tuner.db' is not a database URL"),
        ("", "is not a database URL"),
        ("postgres//me:secret@host/db", r"me:\*\*\*@host"),
        ("postgresql://host:port/db", "is not a database URL"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///file:x?uri=true", "names no file"),
    ],
)
def test_a_url_that_cannot_be_used(url: str, message: str) -> None:
    for use in (normal_url, exists, partial(open_store, study="study")):
        with pytest.raises(StorageError, match=f"storage: .*{message}") as raised:
            use(url)
        assert "secret" not in str(raised.value)


def test_one_form_for_each_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert normal_url("sqlite:///a/../tuner.db") == f"sqlite:///{tmp_path}/tuner.db"
    assert normal_url(f"sqlite+pysqlite:///{tmp_path}/tuner.db") == f"sqlite:///{tmp_path}/tuner.db"
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert (
            normal_url(f"{scheme}://me:p%40ss@host:5/db?sslmode=require")
            == "postgresql+psycopg://me:p%40ss@host:5/db?sslmode=require"
        )


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "é.db", "a#b.db"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    url = normal_url(f"sqlite:///{tmp_path}/{name}")
    assert normal_url(url) == url
    store = open_store(url, study="study")
    store.record(RoundBegun(ROUND))
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_new_file_that_many_open_at_once(tmp_path: Path) -> None:
    """SQLite refuses some of those that switch its journal, whatever their timeout."""
    for number in range(60):
        url, together = f"sqlite:///{tmp_path}/{number}.db", threading.Barrier(4)
        (tmp_path / f"{number}.db").touch()

        def look(url: str, together: threading.Barrier) -> int:
            together.wait()
            engine = open_engine(parse_url(url))
            with engine.connect() as connection:
                found = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master").scalar()
            engine.dispose()
            return int(found or 0)

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(look, [url] * 4, [together] * 4)) == [0] * 4


def test_closing_leaves_one_file(tmp_path: Path) -> None:
    store = open_store(f"sqlite:///{tmp_path}/tuner.db", study="study")
    store.record(RoundBegun(ROUND), TrialAsked(TRIAL))
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == ["tuner.db"]
    again = open_store(f"sqlite:///{tmp_path}/tuner.db", study="study")
    assert (again.rounds(), again.trials("round1")) == ((ROUND,), (TRIAL,))
    again.close()


def test_facts_are_synced_to_a_log_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsynced, "is_on", False)
    store = open_store(f"sqlite:///{tmp_path}/tuner.db", study="study")
    with store._engine.connect() as connection:
        settings = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        ]
    store.close()
    assert settings == ["wal", 2, 1, 60_000]


def test_whether_a_database_exists_is_found_without_making_one(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    assert not exists(url)
    assert not exists(f"sqlite:///{tmp_path}/nowhere/tuner.db")
    assert list(tmp_path.iterdir()) == []
    open_store(url, study="study").close()
    assert exists(url)


def test_whether_a_server_has_our_tables_is_found_without_making_them(postgres_url: str) -> None:
    assert not exists(postgres_url)
    assert not exists(postgres_url)
    open_store(postgres_url, study="study").close()
    assert exists(postgres_url)


def test_a_full_disk_while_recording(tmp_path: Path) -> None:
    """SQLite's own limit stands for the disk's."""
    store = open_store(f"sqlite:///{tmp_path}/tuner.db", study="study")
    store.record(*processes.beginning())
    store._engine.dispose()
    with store._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=1")
    with pytest.raises(StorageError, match=f"{tmp_path}/tuner.db: database or disk is full"):
        store.record(*(fact for number in range(1, 300) for fact in processes.step(number)))
    assert processes.steps_known(store) == 0
    store.close()


def test_a_driver_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(StorageError, match=re.escape(install_command("postgres"))) as raised:
        open_store("postgresql://me:secret@127.0.0.1:1/db", study="study")
    assert "secret" not in str(raised.value)


def test_a_server_that_does_not_answer() -> None:
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    began = time.monotonic()
    for use in (partial(open_store, study="study"), exists):
        with pytest.raises(StorageError, match=r"me:\*\*\*@127.0.0.1:1/db: .*refused") as raised:
            use("postgresql://me:secret@127.0.0.1:1/db")
        assert "\n" not in str(raised.value)
        assert "secret" not in str(raised.value)
    assert time.monotonic() - began < 20


def test_a_database_that_the_server_does_not_have(postgres_url: str) -> None:
    url = make_url(postgres_url).set(database="absent").render_as_string(hide_password=False)
    with pytest.raises(StorageError, match='database "absent" does not exist'):
        open_store(url, study="study")


def test_a_server_where_we_may_not_make_tables(postgres_url: str) -> None:
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("CREATE ROLE guest LOGIN"))
    try:
        url = make_url(postgres_url).set(username="guest").render_as_string(hide_password=False)
        with pytest.raises(StorageError, match="permission denied"):
            open_store(url, study="study")
    finally:
        with engine.connect() as connection:
            connection.execute(text("DROP ROLE guest"))
        engine.dispose()


def test_a_server_that_went_away_for_a_moment(postgres_url: str) -> None:
    store = open_store(postgres_url, study="study")
    store.record(*processes.beginning())
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    engine.dispose()
    store.record(*processes.step(1))
    assert processes.steps_known(store) == 1
    store.close()


def test_a_postgres_database_that_is_not_utf8_is_refused_with_the_command_for_one_that_is(
    postgres_server: str,
) -> None:
    """initdb in the locale C makes such databases."""
    server = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        options = "ENCODING 'SQL_ASCII' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        connection.execute(text(f"CREATE DATABASE plain {options}"))
    url = make_url(postgres_server).set(database="plain").render_as_string(hide_password=False)
    for use in (exists, lambda url: open_store(url, study="s")):
        with pytest.raises(StorageError, match=r"SQL_ASCII.*createdb --encoding UTF8"):
            use(url)
    with server.connect() as connection:
        connection.execute(text("DROP DATABASE plain WITH (FORCE)"))
    server.dispose()


class _Recovering:
    """A file whose log another process takes back after a crash: SQLite refuses it once, without waiting."""

    def __init__(self, code: int) -> None:
        self.refusals = [code]

    def execute(self, _: str) -> None:
        if self.refusals:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = self.refusals.pop()
            raise error


def test_a_log_that_another_process_recovers_is_waited_for() -> None:
    found = _Recovering(sqlite3.SQLITE_BUSY_RECOVERY)
    _switch_to_wal(found)  # type: ignore[arg-type]
    assert found.refusals == []
    with pytest.raises(sqlite3.OperationalError):
        _switch_to_wal(_Recovering(sqlite3.SQLITE_READONLY))  # type: ignore[arg-type]
