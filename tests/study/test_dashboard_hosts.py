"""Who may ask for the dashboard: its own addresses, and pages that came from them."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from tuner.study.dashboard import OwnPagesOnly, allowed_hosts


def asked(host: str, by: str, *, origin: str | None = None, allow: tuple[str, ...] = ()) -> str:
    """The status of a request to a dashboard that listens on `host`."""
    statuses: list[str] = []

    def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b""]

    guarded = OwnPagesOnly(application, host=host, allowed=allowed_hosts(host, allow))
    environ = {"HTTP_HOST": by} | ({} if origin is None else {"HTTP_ORIGIN": origin})
    guarded(environ, lambda status, headers: statuses.append(status))
    return statuses[0][:3]


@pytest.mark.parametrize("by", ["127.0.0.1:8080", "localhost:8080", "LOCALHOST", "[::1]:8080", "localhost."])
def test_this_machine_by_its_names(by: str) -> None:
    assert asked("127.0.0.1", by) == "200"


@pytest.mark.parametrize(
    "by", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1", "", "a@b", "[::"]
)
def test_a_name_that_somebody_else_has_resolve_to_it(by: str) -> None:
    assert asked("127.0.0.1", by) == "403"


def test_a_foreign_page_that_posts_to_it() -> None:
    for origin in ("http://evil.example", "null", "http://10.0.0.1:8080", "http://[::"):
        assert asked("127.0.0.1", "127.0.0.1:8080", origin=origin) == "403"
    assert asked("127.0.0.1", "127.0.0.1:8080", origin="http://127.0.0.1:8080") == "200"


def test_other_machines_by_address_and_name_where_it_listens_for_them() -> None:
    for by in ("10.0.0.1:8080", socket.gethostname(), "127.0.0.1"):
        assert asked("0.0.0.0", by) == "200"
    assert asked("0.0.0.0", "evil.example") == "403"
    assert asked("0.0.0.0", "lab.example", allow=("lab.example",)) == "200"
