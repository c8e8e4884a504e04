"""An exported model behind HTTP: the Open Inference Protocol's routes, limits on what a client may take, an orderly end.

May import starlette, uvicorn (extra `serve`), numpy, onnxruntime and dgrad.errors; never torch or onnx.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
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
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dgrad import __version__
from dgrad.errors import InputError, RunError
from dgrad_export._connection import SECONDS_FOR_A_REQUEST, Answer, Connection
from dgrad_export._metrics import Metrics
from dgrad_export._protocol import HEADER_LENGTH, describe, read_request, write_response
from dgrad_export._served import Served, open_models

MEBIBYTE = 2**20
BODY_LIMIT = 64 * MEBIBYTE
SECONDS_TO_END = 10.0
"""How long running requests may take after SIGTERM."""
AT_ONCE = 0.002
"""Seconds of work for which nobody else need be kept waiting less: a thread would take longer to wake up."""
THREADS = 4
"""That a model uses inside an operator, where there are as many cores."""


class Refused(HTTPException):
    """A request that is not answered, with the status that says why."""


class Server:
    """The routes. What takes long is run in threads, so that a large request holds up nobody else's small one."""

    def __init__(self, models: dict[str, Served], *, body_limit: int, seconds: float) -> None:
        self.models = models
        self.body_limit = body_limit
        self.seconds = seconds
        self.metrics = Metrics(list(models))
        self.threads = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="model")
        self._seconds: dict[tuple[str, int], float] = {}  # that the last body of about this length took

    def app(self) -> Starlette:
        """The ASGI application."""
        model = "/v2/models/{model}"
        routes = [
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
        start = time.perf_counter()
        work = self._in_a_thread(model, body, request.headers.get(HEADER_LENGTH))
        answer = self._counted(model, body, start, await work)
        return Response(b"".join(answer.pieces), answer.status, answer.headers)

    def answer(
        self, model: Served, body: memoryview, json_length: str | None, later: Callable[[Answer], None]
    ) -> Answer | None:
        """The answer at once, where one to a body of its size was quick; or None, and `later` is called with it."""

        def done(work: asyncio.Future[Answer]) -> None:
            if not work.cancelled():
                later(self._counted(model, body, start, work.result()))

        start = time.perf_counter()
        if self._seconds.get((model.name, len(body).bit_length()), math.inf) <= AT_ONCE:
            return self._counted(model, body, start, _infer(model, body, json_length))
        self._in_a_thread(model, body, json_length).add_done_callback(done)
        return None

    def too_slow(self, model: Served) -> Answer:
        """The answer to a request whose body did not come in time."""
        self.metrics.failed(model.name, 408)
        return _refusal(408, self._too_slow())

    def _in_a_thread(self, model: Served, body: bytes | memoryview, json_length: str | None) -> asyncio.Future[Answer]:
        return asyncio.get_running_loop().run_in_executor(self.threads, _infer, model, body, json_length)

    def _counted(self, model: Served, body: bytes | memoryview, start: float, answer: Answer) -> Answer:
        if answer.status == 200:
            self._seconds[model.name, len(body).bit_length()] = answer.seconds
            self.metrics.answered(model.name, answer.examples, time.perf_counter() - start)
        else:
            self.metrics.failed(model.name, answer.status)
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


def _infer(model: Served, body: bytes | memoryview, json_length: str | None) -> Answer:
    start = time.perf_counter()
    try:
        inference = read_request(model, body, json_length)
        results = model.infer(inference.values, [name for name, _ in inference.outputs])
        pieces, length = write_response(model, inference, results)
    except InputError as error:
        return _refusal(400, str(error))
    except RunError as error:
        return _refusal(500, str(error))
    except MemoryError:
        return _refusal(500, "not enough memory for this request; send fewer examples")
    except Exception:  # a bug; without an answer the client would wait for ever
        logging.getLogger("dgrad").exception("a request to %s failed", model.name)
        return _refusal(500, "the server failed; its error output says how")
    return Answer(200, pieces, length, len(results[0]), time.perf_counter() - start)


def _refusal(status: int, message: str) -> Answer:
    return Answer(status, [JSONResponse({"error": message}).body])


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if not isinstance(error, Refused):  # starlette's own words for a route that there is not
        message = f"{request.method} {request.url.path[:80]}: {message.lower()}; expected a route of the Open Inference Protocol v2"
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
    server = Server(open_models(directory, min(THREADS, os.cpu_count() or 1)), body_limit=body_limit, seconds=seconds)
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
