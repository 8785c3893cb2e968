"""Whether the Hub can be asked at all: without a network its client would try for most of a minute."""

from __future__ import annotations

import functools
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PAUSES_SECONDS = (0.0, 1.0, 2.0)
"""Before each question for the address of the Hub: one that goes unanswered may be a hiccup."""


def where_to_look(path: str) -> dict[str, Any]:
    """What `from_pretrained` is told besides: the local cache alone, where the Hub is out of reach."""
    return {"local_files_only": True} if is_out_of_reach(path) else {}


def is_out_of_reach(path: str) -> bool:
    """Whether this names something of the Hub, which does not answer."""
    from huggingface_hub import constants

    is_here = Path(path).is_dir() or constants.HF_HUB_OFFLINE
    return not (is_here or can_be_resolved(constants.ENDPOINT))


@functools.cache
def can_be_resolved(endpoint: str) -> bool:
    """Whether the server's name has an address, as far as this machine can know.

    Behind a proxy that is the proxy's business. Connections that are slow, or fail later, are left to the
    client, which tries again for longer.
    """
    if {"http", "https", "all"} & urllib.request.getproxies().keys():
        return True
    for pause in _PAUSES_SECONDS:
        time.sleep(pause)
        try:
            socket.getaddrinfo(urlsplit(endpoint).hostname, None)
        except socket.gaierror:
            continue
        return True
    return False
