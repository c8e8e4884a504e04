"""An exported model behind HTTP: its page, the Open Inference Protocol's routes, limits on what a client may take, an orderly end.

May import starlette, uvicorn (extra `serve`), numpy, onnxruntime and dgrad.errors; never torch or onnx.
"""

from __future__ import annotations

import asyncio
import ctypes
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dgrad import __version__
from dgrad.errors import InputError
from dgrad_export.codec.manifest import read_manifest
from dgrad_export.page.html import model_facts, page, policy
from dgrad_export.serve.batching import Answer, Asked, answer_all, refusal
from dgrad_export.serve.connection import SECONDS_FOR_A_REQUEST, Connection, headers
from dgrad_export.serve.helper_threads import Helpers
from dgrad_export.serve.metrics import Metrics
from dgrad_export.serve.protocol import HEADER_LENGTH, describe
from dgrad_export.serve.served_model import Served, open_models

MEBIBYTE = 2**20
BODY_LIMIT = 64 * MEBIBYTE
SECONDS_TO_END = 10.0
"""How long running requests may take after SIGTERM."""
AT_ONCE = 0.005
"""Seconds of work that are done in a turn of the event loop, for which everybody else waits."""
THREADS = 4
"""That share a large batch, where there are as many cores; more were not tried."""
KEPT_MEMORY = 32 * MEBIBYTE
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's numbers of these options."""
NOTE = "Every picture is this server's own answer, by the Open Inference Protocol: POST /v2/models/decoder/infer."
PAGE_HEADERS = {
    "cache-control": "no-cache",  # another model may be served at the same address
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(HTTPException):
    """A request that is not answered, with the status that says why."""


class Server:
    """The routes, and who is answered when."""

    def __init__(self, models: dict[str, Served], html: str, *, body_limit: int, seconds: float) -> None:
        self.models = models
        self.html = html
        self.page_headers = {**PAGE_HEADERS, "content-security-policy": f"{policy(html)}; frame-ancestors 'none'"}
        self.body_limit = body_limit
        self.seconds = seconds
        self.metrics = Metrics(list(models))
        self.threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="model")
        self._seconds: dict[tuple[str, bool, int], float] = {}  # that the last request of a kind took
        self._waiting: list[tuple[Asked, float, Callable[[Answer], None]]] = []
        self._load = 0.0  # seconds that those will take

    def app(self) -> Starlette:
        """The ASGI application."""
        model = "/v2/models/{model}"
        routes = [
            Route("/", self.page),
            Route("/v2", self.server_metadata),
            Route("/v2/health/live", self.live),
            Route("/v2/health/ready", self.ready),
            Route("/v2/repository/index", self.index, methods=["POST"]),
            Route("/metrics", self.show_metrics),
        ]
        for path in (model, f"{model}/versions/{{version}}"):
            routes += [
                Route(path, self.model_metadata),
                Route(f"{path}/ready", self.model_ready),
                Route(f"{path}/infer", self.infer, methods=["POST"]),
            ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _error})

    async def page(self, request: Request) -> Response:
        """`GET /`."""
        return HTMLResponse(self.html, headers=self.page_headers)

    async def server_metadata(self, request: Request) -> Response:
        """`GET /v2`."""
        extensions = ["binary_tensor_data", "model_repository"]
        return JSONResponse({"name": "dgrad", "version": __version__, "extensions": extensions})

    async def live(self, request: Request) -> Response:
        """`GET /v2/health/live`."""
        return JSONResponse({"live": True})

    async def ready(self, request: Request) -> Response:
        """`GET /v2/health/ready`: the models are open before the first connection is taken."""
        return JSONResponse({"ready": True})

    async def index(self, request: Request) -> Response:
        """`POST /v2/repository/index`."""
        return JSONResponse([{"name": name, "version": "1", "state": "READY", "reason": ""} for name in self.models])

    async def show_metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def model_metadata(self, request: Request) -> Response:
        """`GET /v2/models/{model}`."""
        return JSONResponse(describe(self._model(request)))

    async def model_ready(self, request: Request) -> Response:
        """`GET /v2/models/{model}/ready`."""
        return JSONResponse({"name": self._model(request).name, "ready": True})

    async def infer(self, request: Request) -> Response:
        """`POST /v2/models/{model}/infer` where the connection leaves it to uvicorn: in chunks, or to be refused."""
        model = self._model(request)
        try:
            body = await self._body(request)
        except HTTPException as error:
            self.metrics.failed(model.name, error.status_code)
            raise
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asked = Asked(model, body, request.headers.get(HEADER_LENGTH))
        self.answer(asked, lambda answer: None if answered.done() else answered.set_result(answer))
        answer = await answered
        return Response(b"".join(answer.pieces), answer.status, headers(answer))

    def answer(self, asked: Asked, send: Callable[[Answer], None]) -> None:
        """Have `send` called with the answer.

        What takes long is done in a thread, so that it holds up nobody else. The rest is not worth a thread's waking up: it is
        done after this turn of the event loop, together with all that came in it.
        """

        def done(work: asyncio.Future[list[Answer]]) -> None:
            if not work.cancelled():
                send(self._counted(asked, start, *work.result()))

        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        seconds = self._seconds.get(_kind(asked), math.inf)
        if self._load + seconds > AT_ONCE:
            loop.run_in_executor(self.threads, answer_all, [asked]).add_done_callback(done)
            return
        if not self._waiting:
            loop.call_soon(self._answer_waiting)
        self._load += seconds
        self._waiting.append((asked, start, send))

    def too_slow(self, model: Served) -> Answer:
        """The answer to a request whose body did not come in time."""
        self.metrics.failed(model.name, 408)
        return refusal(408, self._too_slow())

    def _answer_waiting(self) -> None:
        waiting, self._waiting, self._load = self._waiting, [], 0.0
        answers = answer_all([asked for asked, _, _ in waiting])
        for (asked, start, send), answer in zip(waiting, answers, strict=True):
            send(self._counted(asked, start, answer))

    def _counted(self, asked: Asked, start: float, answer: Answer) -> Answer:
        name, kind = asked.model.name, _kind(asked)
        if answer.status == 200 or answer.seconds > self._seconds.get(kind, math.inf):
            self._seconds[kind] = answer.seconds
        if answer.status == 200:
            self.metrics.answered(name, answer.examples, time.perf_counter() - start)
        else:
            self.metrics.failed(name, answer.status)
        return answer

    def _model(self, request: Request) -> Served:
        name, version = request.path_params["model"], request.path_params.get("version", "1")
        if name not in self.models:
            raise Refused(404, f"unknown model {name[:80]!r}; expected {' or '.join(self.models)}")
        if version != "1":
            raise Refused(404, f"model {name} has no version {version[:80]!r}; expected 1")
        return self.models[name]

    async def _body(self, request: Request) -> bytes:
        if encoding := request.headers.get("content-encoding"):
            raise Refused(
                415, f"the body is encoded as {encoding[:80]!r}; expected it as it is: switch compression off"
            )
        announced = request.headers.get("content-length", "0")
        if announced.isdigit() and int(announced) > self.body_limit:
            raise self._too_large(f"{announced} bytes")
        body = bytearray()
        try:
            async with asyncio.timeout(self.seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.body_limit:
                        raise self._too_large(f"more than {self.body_limit} bytes")
        except TimeoutError:
            raise Refused(408, self._too_slow(), headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise Refused(400, "the client went away") from None
        return bytes(body)

    def _too_slow(self) -> str:
        return f"the body took longer than {self.seconds:g} seconds; expected all of it by then: send fewer examples"

    def _too_large(self, size: str) -> Refused:
        limit = self.body_limit / MEBIBYTE
        return Refused(
            413, f"the body has {size}; expected at most {self.body_limit} ({limit:g} MiB): send fewer examples"
        )


def _kind(asked: Asked) -> tuple[str, bool, int]:
    """Requests of a kind take about the same time."""
    return asked.model.name, asked.json_length is None, len(asked.body).bit_length()


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if not isinstance(error, Refused):  # starlette's own words for a route that there is not
        message = f"{request.method} {request.url.path[:80]}: {message.lower()}; expected a route of the Open Inference Protocol v2, or / for a page"
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)


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
    seconds: float = SECONDS_FOR_A_REQUEST,
    listening: Callable[[str], None] = lambda address: None,
) -> None:
    """Serve an export until SIGTERM or Ctrl-C; what is running then is finished.

    Args:
        directory: what `export_run` wrote.
        host: the address to listen at.
        port: the port; 0 for a free one.
        body_limit: bytes that a request's body may have.
        seconds: that a client may take to send a body.
        listening: called with the server's address once connections are taken.

    Raises:
        InputError: there is no export, a file of it is not what was written, or the address cannot be used.
    """
    _keep_freed_memory()
    models = open_models(directory, Helpers(min(THREADS, os.cpu_count() or 1) - 1))
    facts = model_facts(read_manifest(directory), models["decoder"].settings)
    server = Server(models, page({**facts, "note": NOTE}), body_limit=body_limit, seconds=seconds)
    with _listen(host, port) as listener:
        config = uvicorn.Config(
            server.app(),
            http=partial(Connection, server),  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(SECONDS_TO_END),
        )
        listening(_address(listener))
        _Uvicorn(config).run(sockets=[listener])


def _keep_freed_memory() -> None:
    """Have glibc keep up to 32 MiB of what is freed, for the next request.

    As it is set, it gives the memory of a batch back to the system and fetches it anew, page by page, for the next one: up to 0.3 of 1.8 ms for
    256 images, depending on what lies beside them.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(M_TRIM_THRESHOLD, KEPT_MEMORY)
        mallopt(M_MMAP_THRESHOLD, KEPT_MEMORY)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen at {host}, port {port}: {reason}; choose another --host or --port") from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
