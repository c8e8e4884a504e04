"""A connection of uvicorn with limits on the head of a request: its size and how long it may take."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_LIMIT = 2**16
"""Bytes that a head may have."""
HEAD_SECONDS = 30.0
"""How long a connection may be without the whole head of a request."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection, closed where a head is too large or takes too long.

    uvicorn limits the wait for the first byte of the next request. It limits neither a silent client nor a head.
    """

    _in_head = True
    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first head."""
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count what belongs to a head."""
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > HEAD_LIMIT and not self.transport.is_closing():
            self.send_400_response(f"The head of the request has more than {HEAD_LIMIT} bytes.")

    def on_headers_complete(self) -> None:
        """Go on without limits: the application limits the body."""
        self._in_head, self._head_bytes = False, 0
        self._stop_deadline()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Expect the next head."""
        self._in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next head, unless it is here already."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._start_deadline()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
