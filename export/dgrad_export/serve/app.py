"""The routes of a server: the page, the Open Inference Protocol and metrics, with limits on a body."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from dgrad import __version__
from dgrad_export.page.html import policy
from dgrad_export.serve.batching import Batcher, InferenceRequest
from dgrad_export.serve.metrics import Metrics
from dgrad_export.serve.protocol import HEADER_LENGTH, describe
from dgrad_export.serve.served_model import Served

MEBIBYTE = 2**20
PAGE_HEADERS = {
    "cache-control": "no-cache",  # another model may be served at the same address
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(HTTPException):
    """A request that is not answered, with the status that says why."""


class Endpoints:
    """What answers each route.

    Args:
        body_limit: bytes that a body may have.
        body_seconds: how long a client may take to send one.
    """

    def __init__(self, models: Mapping[str, Served], html: str, *, body_limit: int, body_seconds: float) -> None:
        self.models = models
        self.html = html
        self.page_headers = {**PAGE_HEADERS, "content-security-policy": f"{policy(html)}; frame-ancestors 'none'"}
        self.body_limit = body_limit
        self.body_seconds = body_seconds
        self.metrics = Metrics(list(models))
        self.batcher = Batcher()

    def app(self) -> Starlette:
        """The ASGI application."""
        routes: list[Route] = []
        extensions = ["binary_tensor_data", "model_repository"]
        index = [{"name": name, "version": "1", "state": "READY", "reason": ""} for name in self.models]
        for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            routes += [
                Route(f"{path}/infer", self.infer, methods=["POST"]),
                Route(f"{path}/ready", self.model_ready),
                Route(path, self.model_metadata),
            ]
        routes += [
            Route("/", self.page),
            Route("/v2", _always({"name": "dgrad", "version": __version__, "extensions": extensions})),
            Route("/v2/health/live", _always({"live": True})),
            # The models are open before the first connection is taken.
            Route("/v2/health/ready", _always({"ready": True})),
            Route("/v2/repository/index", _always(index), methods=["POST"]),
            Route("/metrics", self.show_metrics),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _error})

    async def page(self, request: Request) -> Response:
        """`GET /`."""
        return HTMLResponse(self.html, headers=self.page_headers)

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
        """`POST /v2/models/{model}/infer`."""
        model = self._model(request)
        try:
            body = await self._body(request)
        except HTTPException as error:
            self.metrics.failed(model.name, error.status_code)
            raise
        start = time.perf_counter()
        answer = await self.batcher.answer(InferenceRequest(model, body, request.headers.get(HEADER_LENGTH)))
        if answer.status == 200:
            self.metrics.answered(model.name, answer.examples, time.perf_counter() - start)
        else:
            self.metrics.failed(model.name, answer.status)
        if answer.json_length is None:
            return Response(answer.body, answer.status, media_type="application/json")
        headers = {HEADER_LENGTH: str(answer.json_length)}
        return Response(answer.body, answer.status, headers, media_type="application/octet-stream")

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
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.body_seconds):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    if size > self.body_limit:
                        raise self._too_large(f"more than {self.body_limit} bytes")
        except TimeoutError:
            message = f"the body took longer than {self.body_seconds:g} seconds; expected all of it by then"
            raise Refused(408, f"{message}: send fewer examples", headers={"connection": "close"}) from None
        except ClientDisconnect:
            raise Refused(400, "the client went away") from None
        return b"".join(chunks)

    def _too_large(self, size: str) -> Refused:
        limit = f"{self.body_limit} ({self.body_limit / MEBIBYTE:g} MiB)"
        return Refused(413, f"the body has {size}; expected at most {limit}: send fewer examples")


def _always(value: Any) -> Callable[[Request], Awaitable[Response]]:
    """What answers a route with the same JSON every time."""

    async def answer(request: Request) -> Response:
        return JSONResponse(value)

    return answer


async def _error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if not isinstance(error, Refused):  # starlette's own words for a route that does not exist
        route = f"{request.method} {request.url.path[:80]}"
        message = f"{route}: {message.lower()}; expected a route of the Open Inference Protocol v2, or / for a page"
    return JSONResponse({"error": message}, error.status_code, headers=error.headers)
