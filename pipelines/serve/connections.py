"""uvicorn's connections with an end to their patience: for what never comes, and for clients that never read."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from pipelines.serve.limits import Limits

_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 5\r\n"
    b"content-length: 42\r\nconnection: close\r\n\r\nall connections are taken; try again later"
)


def connection_classes(limits: Limits) -> tuple[type[asyncio.Protocol], type[asyncio.Protocol]]:
    """The HTTP and the websocket protocol for uvicorn's `http` and `ws`, bound to these limits."""
    bound = {"limits": limits}
    return type("Http", (_Http,), bound), type("Websocket", (_Websocket,), bound)


class _CutsWhoDoNotRead:
    """Ends a connection whose client leaves what it was sent unread for `send_seconds`."""

    limits: Limits
    transport: asyncio.Transport
    _unread: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        loop = asyncio.get_running_loop()
        self._unread = loop.call_later(self.limits.send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._relax()
        super().resume_writing()  # type: ignore[misc]

    def connection_lost(self, exc: Exception | None) -> None:
        self._relax()
        super().connection_lost(exc)  # type: ignore[misc]

    def _relax(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


class _Websocket(_CutsWhoDoNotRead, WebSocketsSansIOProtocol):
    pass


class _Http(_CutsWhoDoNotRead, H11Protocol):
    """Also ends a connection that brings no complete head within `start_seconds`, and refuses one too many.

    Nor does it take longer for the rest of a body that was answered already.
    """

    _unfinished: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            transport.write(_FULL)
            transport.close()
        self._wait_for_client()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_client()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait_for_client(self) -> None:
        """While a head must come next, or a body that nobody reads, the time for it runs from its first byte."""
        unread = self.conn.our_state is h11.DONE and self.conn.their_state is h11.SEND_BODY
        if not unread and self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._unfinished is None:
            self._unfinished = self.loop.call_later(self.limits.start_seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._unfinished is not None:
            self._unfinished.cancel()
            self._unfinished = None
