"""What all connections of the server share: the recognizer, the limits, the counters and the log."""

import asyncio
import logging
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from starlette.websockets import WebSocket

from asr.endpoint import EndpointConfig
from asr.errors import AudioError, ConfigError, Overloaded
from asr.recognizer import Recognizer, Segment
from asr.streams import Stream, Streams
from pipelines.serve.access import Access
from pipelines.serve.limits import ClientGone, Limits, Refused, overloaded, stopping, too_long, unauthorized
from pipelines.serve.log import event
from pipelines.serve.metrics import Metrics
from pipelines.serve.session import Channel, Live


class Service:
    """The server without its sockets.

    Args:
        recognizer: with a streaming network.
        two_pass: for sessions that do not say.
        threads: of the live sessions together, a core each.
        log_text: write what is said into the log.

    Raises:
        ModelError: the model has no streaming network; or two passes, and no offline one.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        *,
        limits: Limits,
        access: Access,
        log: logging.Logger,
        two_pass: bool = False,
        threads: int = 1,
        log_text: bool = False,
    ) -> None:
        self.recognizer, self.limits, self.access, self.log = recognizer, limits, access, log
        self.metrics = Metrics()
        self.stopping = False
        rules = recognizer.stream(two_pass=two_pass).about["endpoint"]
        self.endpoint = EndpointConfig(**rules) if rules else EndpointConfig()  # for sessions that do not say
        self._streams = Streams(recognizer, max_streams=limits.sessions, threads=threads)
        self._two_pass, self._log_text = two_pass, log_text
        self._channels: set[Channel] = set()

    def __len__(self) -> int:
        """How many live sessions there are."""
        return len(self._channels)

    @contextmanager
    def session(self, channel: Channel, protocol: str, websocket: WebSocket) -> Iterator[Live]:
        """A place for a live client, counted and logged.

        Raises:
            Refused: the client is not let in, all places are taken, or the server is stopping.
        """
        if not websocket.state.known:
            raise unauthorized()
        if self.stopping:
            raise stopping()
        if len(self._channels) >= self.limits.sessions:
            raise overloaded()
        began, how = time.monotonic(), "failed"
        live = Live(self, channel, protocol)
        most = self.limits.audio_seconds
        lifetime = asyncio.get_running_loop().call_later(most, channel.end, too_long(most))
        self._channels.add(channel)
        self.metrics.sessions.labels(protocol).inc()
        try:
            yield live
            how = "done" if channel.ending is None else channel.ending.code
        except ClientGone:
            how = "gone"
            raise
        except Refused as error:
            how = error.code
            raise
        finally:
            lifetime.cancel()
            live.close()
            self._channels.discard(channel)
            self.metrics.sessions.labels(protocol).dec()
            self.metrics.ended.labels(protocol, how).inc()
            event(
                self.log,
                "session",
                session=secrets.token_hex(4),
                protocol=protocol,
                client=websocket.client and websocket.client.host,
                how=how,
                audio_seconds=round(live.seconds, 3),
                seconds=round(time.monotonic() - began, 3),
                slowest_reply=round(live.slowest, 3),
            )

    def open_stream(self, sample_rate: int, endpoint: EndpointConfig | None, two_pass: bool | None) -> Stream:
        """Open a stream of the engine; None means as the server was told.

        Raises:
            Refused: a setting that cannot be had.
        """
        both = self._two_pass if two_pass is None else two_pass
        if both and "offline" not in self.recognizer.networks:
            raise Refused("two_pass: the server's model has no offline network", code="bad_settings")
        try:
            return self._streams.open(
                sample_rate, endpoint=... if endpoint is None else endpoint, two_pass=both, keep_segments=False
            )
        except Overloaded:
            raise overloaded() from None
        except (AudioError, ConfigError) as error:
            raise Refused(str(error), code="bad_settings") from None

    def note_text(self, protocol: str, segments: Iterable[Segment]) -> None:
        """Log what was said, where that was asked for."""
        if self._log_text:
            for segment in segments:
                event(self.log, "text", protocol=protocol, text=segment.text, start=segment.start, end=segment.end)

    def stop(self) -> None:
        """Refuse new sessions, and let those that are here end with their finals."""
        self.stopping = True
        for channel in tuple(self._channels):
            channel.end(stopping())

    def close(self) -> None:
        """End the engine."""
        self._streams.close()
