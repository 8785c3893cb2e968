"""Which cluster an address names, whether it answers, and whether it takes the token of this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

from tuner.errors import InputError

_CONNECT_SECONDS = 20.0
_CONNECT_PAUSE_SECONDS = 0.5


def address_of(written: str | None) -> str:
    """Return the address of the cluster to join. Raises InputError without one, or for one of Ray Client."""
    address = written or os.environ.get("RAY_ADDRESS")
    if not address or address == "auto":
        raise InputError(
            "engine ray: which cluster? Pass --ray-address HOST:6379, write run.ray_address, or set "
            "RAY_ADDRESS; `local` starts one on this machine"
        )
    if address.startswith("ray://"):
        raise InputError(
            f"ray address {address}: run tuner on a machine of the cluster and pass HOST:6379: a connection "
            "through Ray Client ends the round when it breaks"
        )
    return address


_ASK = """
import sys
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    ensure_token_if_auth_enabled(create_token_if_missing=False)
    GcsClient(address=sys.argv[1]).internal_kv_keys(b"", namespace=None, timeout=5)
except AuthenticationError:
    sys.exit(3)
"""
_REFUSED = 3
_TOKEN_HINT = "RAY_AUTH_TOKEN or ~/.ray/auth_token as on its head"


def refuse_unreachable(address: str, *, patience_seconds: float = _CONNECT_SECONDS) -> None:
    """Raise InputError if no cluster answers at an address, or not with this process's token.

    Ray itself would try for minutes. A head that is starting has `patience_seconds`.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"ray address {address}: write HOST:PORT, such as 10.0.0.1:6379")
    deadline = time.monotonic() + patience_seconds
    while (error := _unconnected(host.strip("[]"), int(port))) is not None:
        if time.monotonic() > deadline:
            raise InputError(
                f"ray address {address}: nothing answers there ({error}). Start the head with `ray start "
                "--head`, and pass the address that it prints"
            )
        time.sleep(_CONNECT_PAUSE_SECONDS)
    answers = answers_to(address, os.environ)
    if answers is None:
        raise InputError(
            f"ray address {address}: what answers there is not a Ray cluster, or one of another version. "
            "Pass the address that `ray start --head` prints"
        )
    if answers:
        return
    if _has_token():
        raise InputError(
            f"ray address {address}: this cluster refuses the token of this shell, or the shell has none. "
            f"Set {_TOKEN_HINT}"
        )
    raise InputError(
        f"ray address {address}: this cluster asks for a token. Set RAY_AUTH_MODE=token, and {_TOKEN_HINT}"
    )


def _unconnected(host: str, port: int) -> OSError | None:
    """Return why a port cannot be reached; None if it can."""
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return error
    return None


def warning_of_no_token(address: str) -> str | None:
    """Return what to say about a cluster that takes requests without a token; None if it refuses them.

    One that was joined without a token is such a cluster; another is asked without one.
    """
    answers = answers_to(address, _without_token()) if _has_token() else True
    if answers is None:
        return "warning: could not find out whether this cluster answers without a token"
    if not answers:
        return None
    return (
        "warning: this cluster answers without a token: whoever reaches its ports can run code on every "
        "node. Start it with RAY_AUTH_MODE=token; see docs/how-to/cluster.md"
    )


def _has_token() -> bool:
    return os.environ.get("RAY_AUTH_MODE") == "token"


def _without_token() -> Mapping[str, str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    return {**variables, "RAY_AUTH_MODE": "disabled"}


def answers_to(address: str, environment: Mapping[str, str]) -> bool | None:
    """Return whether a cluster answers a process with these variables; None if it gives no answer at all."""
    asked = [sys.executable, "-c", _ASK, address]
    try:
        code = subprocess.run(
            asked,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        ).returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return {0: True, _REFUSED: False}.get(code)
