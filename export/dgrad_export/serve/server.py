"""An exported model behind HTTP: uvicorn, where it listens and how it ends."""

from __future__ import annotations

import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from dgrad.errors import InputError
from dgrad_export.codec.manifest import read_manifest
from dgrad_export.page.html import model_facts, page
from dgrad_export.serve.app import MEBIBYTE, Endpoints
from dgrad_export.serve.connection import HEAD_SECONDS, Connection
from dgrad_export.serve.served_model import open_models

BODY_LIMIT = 64 * MEBIBYTE
BODY_SECONDS = 30.0
END_SECONDS = 10
"""How long running requests may take after SIGTERM."""
NOTE = "Every picture is this server's own answer, by the Open Inference Protocol: POST /v2/models/decoder/infer."


class _Uvicorn(uvicorn.Server):
    """Ends with a return on SIGTERM and Ctrl-C, where uvicorn would raise the signal again."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ask the server to end on either signal."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(
    directory: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    body_limit: int = BODY_LIMIT,
    seconds: float = BODY_SECONDS,
    listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve an export until SIGTERM or Ctrl-C. Requests that run then are finished.

    Args:
        directory: what `export_run` wrote.
        host: the address to listen at.
        port: the port, 0 for a free one.
        body_limit: bytes that a request's body may have.
        seconds: how long a client may take to send a body.
        listening: called with the server's address once it takes connections.

    Raises:
        InputError: there is no export, a file of it is not what was written, or the address cannot be used.
    """
    models = open_models(directory)
    facts = model_facts(read_manifest(directory), models["decoder"].settings)
    endpoints = Endpoints(models, page({**facts, "note": NOTE}), body_limit=body_limit, body_seconds=seconds)
    with _listen(host, port) as listener:
        config = uvicorn.Config(
            endpoints.app(),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(HEAD_SECONDS),
            timeout_graceful_shutdown=END_SECONDS,
        )
        listening(_address(listener))
        _Uvicorn(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port") from None
    # Connections inherit it. Without it a second piece waits 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
