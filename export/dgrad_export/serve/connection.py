"""A server's connections: inference requests are read into one buffer and answered here, all other requests are uvicorn's.

uvicorn parses a body piece by piece and hands it over in copies, which takes longer than the models. What is taken here is a
request of the usual form, with a length; anything else about HTTP is left to uvicorn. May import uvicorn, h11, numpy.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol

import h11
import numpy as np
from uvicorn.protocols.http.h11_impl import H11Protocol

from dgrad_export.serve.batching import Answer, Asked
from dgrad_export.serve.protocol import HEADER_LENGTH
from dgrad_export.serve.served_model import Served

SECONDS_FOR_A_REQUEST = 30.0
"""How long a client may take to send its headers, and how long its body; a connection without a request is closed then."""
ONE_WRITE = 2**16
"""Bytes below which an answer is copied together: it takes less time than another call to the system."""
START = 2**14
"""Bytes for what is read before it is known what it is: headers, small bodies, requests that follow."""


def headers(answer: Answer) -> dict[str, str]:
    """The HTTP headers that belong to an answer's body."""
    length = {"content-length": str(sum(map(len, answer.pieces)))}
    if answer.json_length is None:
        return length | {"content-type": "application/json"}
    return length | {"content-type": "application/octet-stream", HEADER_LENGTH: str(answer.json_length)}


class Answering(Protocol):
    """What a connection needs of the server."""

    models: Mapping[str, Served]
    body_limit: int
    seconds: float

    def answer(self, asked: Asked, send: Callable[[Answer], None]) -> None:
        """Have `send` called with the answer, after this returns."""

    def too_slow(self, model: Served) -> Answer:
        """The answer to a request whose body did not come in time."""


@dataclass(frozen=True)
class Head:
    """What the first lines of an inference request say."""

    model: str
    length: int
    json_length: str | None


FIRST_LINE = re.compile(rb"POST /v2/models/([\w-]+)(?:/versions/1)?/infer HTTP/1\.1")
FIELD = re.compile(rb"([\w!#$%&'*+.^`|~-]+):[ \t]*([\x20-\x7e]*)", re.ASCII)
UNUSUAL = {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade"}


@lru_cache(64)  # a client's requests mostly begin alike
def read_head(lines: bytes) -> Head | None:
    """What is said in the lines before the empty one; None where it is for uvicorn to say what is to be done.

    >>> read_head(b"POST /v2/models/decoder/infer HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 7")
    Head(model='decoder', length=7, json_length=None)
    >>> read_head(b"GET /v2 HTTP/1.1\\r\\nHost: x")
    """
    first, *rest = lines.split(b"\r\n")
    target = FIRST_LINE.fullmatch(first)
    if target is None:
        return None
    fields: dict[bytes, bytes] = {}
    for line in rest:
        field = FIELD.fullmatch(line)
        if field is None or (name := field[1].lower()) in fields:
            return None
        fields[name] = field[2].strip()
    if b"host" not in fields or UNUSUAL & fields.keys():
        return None
    if fields.get(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    length = fields.get(b"content-length", b"")
    if not length.isdigit() or len(length) > 15:
        return None
    json_length = fields.get(HEADER_LENGTH.encode())
    return Head(target[1].decode(), int(length), None if json_length is None else json_length.decode())


class _Others(H11Protocol):
    """uvicorn's side of a connection."""

    def timeout_keep_alive_handler(self) -> None:
        """Nothing: the whole connection is watched, not this side of it."""

    @property
    def idle(self) -> bool:
        """Whether it has neither begun a request nor read more than one."""
        answered = self.cycle is None or self.cycle.response_complete
        states = {self.conn.our_state, self.conn.their_state}
        return answered and states == {h11.IDLE} and not self.conn.trailing_data[0]


class Connection(asyncio.BufferedProtocol):
    """One client's connection. Requests are answered one after the other, in the order of their coming."""

    def __init__(self, server: Answering, **uvicorn: Any) -> None:
        self._server = server
        self._others = _Others(**uvicorn)
        self._peers: set[Any] = uvicorn["server_state"].connections
        self._loop = asyncio.get_running_loop()
        self._start = bytearray(START)
        self._filled = 0
        self._head: Head | None = None  # of the inference request that is read or answered
        self._body = memoryview(b"")
        self._received = 0
        self._full = self._paused = self._ending = False
        self._limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to watch it."""
        self._transport = transport
        self._others.connection_made(transport)
        self._peers.discard(self._others)  # at the end uvicorn asks this to finish, not a side of it
        self._peers.add(self)
        # An answer is written in several pieces: without this the second waits for the client to acknowledge the first,
        # 40 ms. asyncio sets it only on sockets whose protocol number is given.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._since = self._loop.time()
        self._watch_handle = self._loop.call_later(SECONDS_FOR_A_REQUEST, self._watch)

    def connection_lost(self, error: Exception | None) -> None:
        """Let go of it."""
        self._peers.discard(self)
        self._watch_handle.cancel()
        self._stop_limit()
        self._others.connection_lost(error)
        self._start = bytearray()

    def _watch(self) -> None:
        """Close a connection that has been without a request for too long."""
        now = self._loop.time()
        if self._head or not self._others.idle:
            self._since = now
        if now - self._since >= SECONDS_FOR_A_REQUEST:
            self._transport.close()
        else:
            self._watch_handle = self._loop.call_at(self._since + SECONDS_FOR_A_REQUEST, self._watch)

    def shutdown(self) -> None:
        """End after the request that is under way; called by uvicorn."""
        self._ending = True
        if self._head is None:
            self._others.shutdown()

    def pause_writing(self) -> None:
        """Begin no other request: the client is slow to take what it gets."""
        self._full = True
        self._others.pause_writing()

    def resume_writing(self) -> None:
        """Go on."""
        self._full = False
        self._others.resume_writing()
        self._advance()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go: straight into the body that is waited for."""
        if self._received < len(self._body):
            return self._body[self._received :]
        return memoryview(self._start)[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take what came."""
        if self._received < len(self._body):
            self._received += nbytes
            if self._received == len(self._body):
                self._answer()
        else:
            self._filled += nbytes
        self._advance()
        if self._filled == START and not self._paused:  # of requests that wait for the one that is under way
            self._paused = True
            self._transport.pause_reading()

    def _advance(self) -> None:
        """Go on with what came, as far as nothing else is under way."""
        while self._filled and self._head is None and not self._full and not self._transport.is_closing():
            end = self._start.find(b"\r\n\r\n", 0, self._filled) if self._others.idle else 0
            if end < 0 and self._filled < START:
                break
            head = read_head(bytes(self._start[:end])) if end > 0 else None
            if head is None or head.model not in self._server.models or head.length > self._server.body_limit:
                self._others.data_received(self._take(self._filled))
            else:
                self._take(end + 4)
                self._begin(head)

    def _take(self, count: int) -> bytes:
        """The first bytes of what came."""
        taken = bytes(self._start[:count])
        rest = self._filled - count
        self._start[:rest] = self._start[count : self._filled]
        self._filled = rest
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        return taken

    def _begin(self, head: Head) -> None:
        self._head = head
        # Tensors start after the JSON: numpy is slower where their numbers are not aligned.
        shift = -int(head.json_length) % 8 if head.json_length and head.json_length.isdigit() else 0
        self._body = np.empty(head.length + shift, np.uint8).data[shift:]
        self._received = min(head.length, self._filled)
        self._body[: self._received] = self._take(self._received)
        if self._received == head.length:
            self._answer()
        else:
            self._limit = self._loop.call_later(self._server.seconds, self._too_slow)

    def _answer(self) -> None:
        assert self._head is not None
        self._stop_limit()
        model = self._server.models[self._head.model]
        self._server.answer(Asked(model, self._body, self._head.json_length), self._send)

    def _too_slow(self) -> None:
        assert self._head is not None
        self._ending = True
        self._send(self._server.too_slow(self._server.models[self._head.model]))

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None

    def _send(self, answer: Answer) -> None:
        self._head, self._body, self._received = None, memoryview(b""), 0
        self._since = self._loop.time()
        if self._transport.is_closing():
            return
        lines = [b"HTTP/1.1 %d %s" % (answer.status, HTTPStatus(answer.status).phrase.encode())]
        lines += [b"%s: %s" % field for field in self._others.server_state.default_headers]
        lines += [f"{name}: {value}".encode() for name, value in headers(answer).items()]
        if self._ending:
            lines.append(b"connection: close")
        first, *rest = answer.pieces
        pieces = [b"\r\n".join([*lines, b"", bytes(first)]), *rest]
        if sum(map(len, rest)) < ONE_WRITE:
            pieces = [b"".join(pieces)]
        for piece in pieces:
            self._transport.write(piece)
        if self._ending:
            self._transport.close()
        self._advance()
