"""A live client: its websocket with deadlines, and its audio through the engine."""

import asyncio
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketDisconnected

from asr.decoding import Word
from asr.endpoint import EndpointConfig
from asr.errors import AudioError
from asr.recognizer import Segment, Update
from asr.streams import Stream
from pipelines.serve.limits import ClientGone, Refused, too_long

if TYPE_CHECKING:
    from pipelines.serve.service import Service

_PIECE_SECONDS = 1.0  # a long message is read in such pieces, so that nobody waits behind it


class Channel:
    """The messages of one websocket. `ending` tells why no more are taken: idle, or asked to end."""

    def __init__(self, websocket: WebSocket, idle_seconds: float) -> None:
        self.ending: Refused | None = None
        self._websocket, self._idle_seconds = websocket, idle_seconds
        self._deadline: asyncio.Timeout | None = None

    async def receive(self, within: float | None = None) -> str | bytes | None:
        """The next message; None when no more are taken, and the client is to be given its finals.

        Args:
            within: seconds to wait; None: as long as a client may be idle.

        Raises:
            ClientGone: it closed the connection.
        """
        if self.ending is not None:
            return None
        seconds = self._idle_seconds if within is None else within
        try:
            async with asyncio.timeout(seconds) as self._deadline:
                message = await self._websocket.receive()
        except TimeoutError:
            self.ending = self.ending or Refused(f"nothing came for {seconds:g} s", code="idle")
            return None
        except WebSocketDisconnected:
            raise ClientGone from None
        finally:
            self._deadline = None
        if message["type"] == "websocket.disconnect":
            raise ClientGone
        text = message.get("text")
        return message["bytes"] if text is None else text

    def end(self, reason: Refused) -> None:
        """Take no more messages; a `receive` that waits ends at once."""
        self.ending = self.ending or reason
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(asyncio.get_running_loop().time())

    async def send(self, message: dict[str, Any] | str) -> None:
        """Send JSON, or a literal.

        Raises:
            ClientGone: it closed the connection.
        """
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        try:
            await self._websocket.send_text(text)
        except (WebSocketDisconnect, WebSocketDisconnected):
            raise ClientGone from None

    async def close(self, error: Refused | None = None) -> None:
        """End the connection; an error is told first, in one shape for all protocols."""
        try:
            if error is not None:
                await self.send({"type": "error", "code": error.code, "message": str(error)})
            await self._websocket.close(error.close if error else 1000, _short(str(error)) if error else "")
        except (ClientGone, WebSocketDisconnect, WebSocketDisconnected):
            pass


class Live:
    """The audio of one client. Finished, it may begin anew, and its clock goes on.

    Attributes:
        seconds: of audio so far.
        slowest: seconds from audio to text, at most.
    """

    def __init__(self, service: "Service", channel: Channel, protocol: str) -> None:
        self.seconds = self.slowest = 0.0
        self._service, self._channel, self._protocol = service, channel, protocol
        self._stream: Stream | None = None
        self._rate = 0
        self._began = 0.0  # seconds of audio before this stream

    def open(self, sample_rate: int, endpoint: EndpointConfig | None = None, two_pass: bool | None = None) -> None:
        """Begin a stream.

        Args:
            sample_rate: Hz.
            endpoint: None: as the server was told.
            two_pass: None: as the server was told.

        Raises:
            Refused: a setting that cannot be had.
        """
        self.close()
        self._stream = self._service.open_stream(sample_rate, endpoint, two_pass)
        self._rate, self._began = sample_rate, self.seconds

    @property
    def is_open(self) -> bool:
        """Whether there is a stream that takes audio."""
        return self._stream is not None

    async def feed(self, samples: np.ndarray) -> Update:
        """Read samples, (n,) or (n, channels); past the longest session allowed, what is over is left out.

        Raises:
            Refused: samples that are none.
        """
        assert self._stream is not None
        began = time.monotonic()
        limit = self._service.limits.audio_seconds
        room = max(0, round((limit - self.seconds) * self._rate))
        full, samples = len(samples) >= room, samples[:room]
        final: list[Segment] = []
        update = Update(partial="", final=())
        piece = round(_PIECE_SECONDS * self._rate)
        try:
            for start in range(0, max(1, len(samples)), piece):
                update = await asyncio.wrap_future(self._stream.feed(samples[start : start + piece]))
                final += update.final
        except AudioError as error:
            raise Refused(str(error), code="bad_audio", close=1007) from None
        self.seconds += len(samples) / self._rate
        if full:
            self._channel.end(too_long(limit))
        took = time.monotonic() - began
        self.slowest = max(self.slowest, took)
        self._service.metrics.reply.observe(took)
        self._service.metrics.heard(self._protocol, len(samples) / self._rate)
        self._service.note_text(self._protocol, final)
        segments = tuple(self._shifted(segment) for segment in final)
        return replace(update, final=segments, _tell_words=lambda: self._later(update.words))

    async def finish(self) -> tuple[Segment, ...]:
        """End the stream; return the segments that `feed` has not given."""
        if self._stream is None:
            return ()
        rest = (await asyncio.wrap_future(self._stream.finish())).segments
        self._stream = None
        self._service.note_text(self._protocol, rest)
        return tuple(self._shifted(segment) for segment in rest)

    def close(self) -> None:
        """Drop the stream, if one is open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _shifted(self, segment: Segment) -> Segment:
        if not self._began:
            return segment
        start, end = segment.start + self._began, segment.end + self._began
        return replace(segment, start=start, end=end, words=self._later(segment.words))

    def _later(self, words: tuple[Word, ...]) -> tuple[Word, ...]:
        return tuple(replace(word, start=word.start + self._began, end=word.end + self._began) for word in words)


def _short(reason: str) -> str:
    """A closing frame has room for 123 bytes."""
    return reason.encode()[:120].decode(errors="ignore")
