"""`study dashboard`: optuna-dashboard on this study's rounds, served by this process to this machine."""

from __future__ import annotations

from collections.abc import Callable
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna_dashboard import wsgi

from tuner.errors import InputError
from tuner.study.sampling import StudyStorage

HOST = "127.0.0.1"
"""Unless told otherwise the dashboard is for this machine alone: it asks for no password, and can delete."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Requests are not worth a line each."""


def serve_dashboard(
    storage: str, study: str, *, port: int, announce: Callable[[str], None], host: str = HOST
) -> None:
    """Serve the rounds of one study until interrupted; `announce` gets the address once it answers.

    Raises InputError when the port is taken, or the host is none of this machine's.
    """
    application = wsgi(StudyStorage(storage, study))
    try:
        server = make_server(host, port, application, server_class=_Server, handler_class=_QuietHandler)
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another") from error
    with server:
        announce(f"http://{host}:{server.server_port}/dashboard")
        server.serve_forever()
