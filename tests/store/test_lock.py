from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.store import processes
from tuner.errors import StorageError, StudyTaken
from tuner.store import hold_study, is_held, open_store
from tuner.store.lock import _holder_here, is_dead


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    with ExitStack() as stack:

        def begin(*arguments: object) -> subprocess.Popen[str]:
            process = processes.start(*map(str, arguments))
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        yield begin


def said(process: subprocess.Popen[str]) -> int:
    """The number at the end of the process's next line."""
    assert process.stdout is not None
    return int(process.stdout.readline().split()[1])


def becomes_free(directory: Path, url: str) -> bool:
    until = time.monotonic() + 60
    while is_held(directory, url, "study") and time.monotonic() < until:
        time.sleep(0.02)
    return not is_held(directory, url, "study")


def test_is_held_while_held(url: str, tmp_path: Path) -> None:
    assert not is_held(tmp_path, url, "study")
    with hold_study(tmp_path, url, "study"):
        assert is_held(tmp_path, url, "study")
    assert not is_held(tmp_path, url, "study")
    with hold_study(tmp_path, url, "study"):
        pass


def test_asking_creates_nothing(tmp_path: Path) -> None:
    assert not is_held(tmp_path, f"sqlite:///{tmp_path}/tuner.db", "study")
    assert not is_held(tmp_path, f"sqlite:///{tmp_path}/nowhere/tuner.db", "study")
    assert list(tmp_path.iterdir()) == []


def test_letting_go_leaves_no_file(tmp_path: Path) -> None:
    with hold_study(tmp_path, f"sqlite:///{tmp_path}/tuner.db", "study"):
        assert [path.name for path in tmp_path.iterdir()] == ["tuner.db.lock"]
    assert list(tmp_path.iterdir()) == []


def test_the_second_is_told_who_holds_it(
    url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = said(start("hold", tmp_path, url))
    with (
        pytest.raises(StorageError, match=rf"{tmp_path}: the study study .* process {holder} on ") as raised,
        hold_study(tmp_path, url, "study"),
    ):
        pytest.fail("two processes hold the study")
    assert raised.value.exit_code == 2
    assert is_held(tmp_path, url, "study")


def test_one_process_holds_it_once(url: str, tmp_path: Path) -> None:
    with (
        hold_study(tmp_path, url, "study"),
        pytest.raises(StorageError, match=f"process {os.getpid()} "),
        hold_study(tmp_path, url, "study"),
    ):
        pytest.fail("held twice")
    assert not is_held(tmp_path, url, "study")


def test_errors_of_the_block_pass_unchanged(url: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="of the block"), hold_study(tmp_path, url, "study"):
        raise OSError("of the block")
    assert not is_held(tmp_path, url, "study")


def test_a_kill_lets_go(url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    process = start("hold", tmp_path, url)
    os.kill(said(process), signal.SIGKILL)
    process.wait()
    with hold_study(tmp_path, url, "study"):  # at once: the next command need not wait
        assert is_held(tmp_path, url, "study")


class Tunnel:
    """Carries a server's socket to another place, and keeps its connections open when a client is gone."""

    def __init__(self, server: Path, place: Path) -> None:
        self._server, self._kept = server, []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(place))
        self._listening.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                here, _ = self._listening.accept()
                there = socket.socket(socket.AF_UNIX)
                there.connect(str(self._server))
                self._kept += [here, there]
                for source, target in ((here, there), (there, here)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while content := source.recv(65536):
                target.sendall(content)

    def close(self) -> None:
        for each in (self._listening, *self._kept):
            each.close()


def test_a_kill_lets_go_although_a_tunnel_keeps_the_connection(
    postgres_url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    url = make_url(postgres_url)
    place = Path(tempfile.mkdtemp(prefix="tunnel-")) / ".s.PGSQL.5432"
    tunnel = Tunnel(Path(str(url.query["host"])) / ".s.PGSQL.5432", place)
    try:
        through = url.update_query_dict({"host": str(place.parent)}).render_as_string(hide_password=False)
        process = start("hold", tmp_path, through)
        holder = said(process)
        with pytest.raises(StorageError, match=rf"is being run by process {holder} on \S+; wait"):
            hold_study(tmp_path, postgres_url, "study").__enter__()
        os.kill(holder, signal.SIGKILL)
        process.wait()
        assert is_held(tmp_path, postgres_url, "study")  # as far as the server knows
        with hold_study(tmp_path, postgres_url, "study") as hold:
            assert not hold.is_lost
    finally:
        tunnel.close()
        shutil.rmtree(place.parent)


def test_a_holder_is_dead_only_if_it_ran_here_and_is_gone() -> None:
    me = _holder_here()
    assert len(me) <= 63
    assert not is_dead(me)
    started = me.rpartition(".")[2]
    assert is_dead(me.removesuffix(started) + f"{int(started, 16) + 1:x}")  # its number is another process's
    head, machine = me.rsplit(" ", 1)
    other = f"{int(machine[:8], 16) ^ 1:08x}{machine[8:]}0"
    assert not is_dead(f"{head} {other}")
    assert not is_dead(head)
    assert not is_dead("psql")


def test_a_lock_whose_file_was_deleted_is_known_to_be_lost(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    with hold_study(tmp_path, url, "study") as first:
        assert not first.is_lost
        (tmp_path / "tuner.db.lock").unlink()
        assert first.is_lost
        with hold_study(tmp_path, url, "study"):
            with pytest.raises(StudyTaken, match=f"process {os.getpid()}"):
                first.renew()
            assert is_held(tmp_path, url, "study")
        first.renew()
        assert not first.is_lost
        assert is_held(tmp_path, url, "study")
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_directory_was_deleted_is_not_said_to_be_taken(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    with hold_study(folder, f"sqlite:///{folder}/tuner.db", "study") as hold:
        shutil.rmtree(folder)
        assert hold.is_lost
        with pytest.raises(StorageError, match=f"there is no directory {folder}") as refused:
            hold.renew()
    assert not isinstance(refused.value, StudyTaken)


def test_a_forked_child_does_not_hold_it(
    url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start("hold", tmp_path, url, "study", "fork")
    assert process.stdout is not None
    pids = dict(process.stdout.readline().split() for _ in range(2))
    try:
        assert is_held(tmp_path, url, "study")
        os.kill(int(pids["held"]), signal.SIGKILL)
        assert becomes_free(tmp_path, url)
        os.kill(int(pids["child"]), 0)
    finally:
        os.kill(int(pids["child"]), signal.SIGKILL)


def test_a_child_that_leaves_the_block_does_not_let_go(url: str, tmp_path: Path) -> None:
    child = -1
    try:
        with hold_study(tmp_path, url, "study"):
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == 0
                assert is_held(tmp_path, url, "study")
    finally:
        if child == 0:
            os._exit(0)


def test_a_program_started_meanwhile_does_not_hold_it(url: str, tmp_path: Path) -> None:
    with hold_study(tmp_path, url, "study"):
        sleeper = subprocess.Popen(["sleep", "60"])
    try:
        assert not is_held(tmp_path, url, "study")
    finally:
        sleeper.kill()
        sleeper.wait()


def test_asking_at_the_wrong_moment_keeps_nobody_out(tmp_path: Path) -> None:
    asker = os.open(tmp_path / "tuner.db.lock", os.O_RDONLY | os.O_CREAT)
    fcntl.flock(asker, fcntl.LOCK_SH)
    done_asking = threading.Timer(0.15, os.close, [asker])
    began = time.monotonic()
    done_asking.start()
    with hold_study(tmp_path, f"sqlite:///{tmp_path}/tuner.db", "study"):
        assert time.monotonic() - began > 0.1
    done_asking.join()


def test_only_one_of_many_gets_in(tmp_path: Path) -> None:
    url, inside, most, entries = f"sqlite:///{tmp_path}/tuner.db", 0, 0, 0
    counting = threading.Lock()

    def enter() -> None:
        nonlocal inside, most, entries
        for _ in range(30):
            try:
                with hold_study(tmp_path, url, "study"):
                    with counting:
                        inside, entries = inside + 1, entries + 1
                        most = max(most, inside)
                    time.sleep(0.001)
                    with counting:
                        inside -= 1
            except StorageError:
                continue

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entries > 30


def test_studies_of_one_server_do_not_meet(
    postgres_url: str, tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    said(start("hold", tmp_path, postgres_url, "one"))
    assert not is_held(tmp_path, postgres_url, "two")
    with hold_study(tmp_path, postgres_url, "two"):
        assert is_held(tmp_path, postgres_url, "one")
        assert is_held(tmp_path, postgres_url, "two")
    assert is_held(tmp_path, postgres_url, "one")


def test_a_file_has_one_writer_whatever_the_study(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    url = f"sqlite:///{tmp_path}/tuner.db"
    holder = said(start("hold", tmp_path, url, "one"))
    expected = (
        rf"{tmp_path}: the study two .* process {holder} on .* study one .* {tmp_path}/tuner.db, .* Postgre"
    )
    with pytest.raises(StorageError, match=expected), hold_study(tmp_path, url, "two"):
        pytest.fail("two processes write one file")
    assert is_held(tmp_path, url, "one")
    assert not is_held(tmp_path, url, "two")


def test_the_holder_reads_and_writes(url: str, tmp_path: Path) -> None:
    with hold_study(tmp_path, url, "study"):
        store = open_store(url, study="study")
        store.record(*processes.beginning())
        assert len(store.trials("round1")) == 1
        store.close()
        assert is_held(tmp_path, url, "study")


def test_a_study_nowhere_cannot_be_held(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=f"no directory {tmp_path}/nowhere"),
        hold_study(tmp_path, f"sqlite:///{tmp_path}/nowhere/tuner.db", "study"),
    ):
        pytest.fail("held")
