"""What the server allows a client, and how it says no."""

from dataclasses import dataclass, fields
from math import inf

from asr.errors import AsrError, ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on what clients may cost.

    Attributes:
        sessions: live ones at a time.
        audio_seconds: of audio in one session or recording, however small its file is; and of a session's life.
        idle_seconds: without a message from the client; then its finals are sent and it is closed.
        start_seconds: from connecting to the start message, from connecting to a complete HTTP head, and for the
            rest of a body that was answered already.
        send_seconds: that a client may take to read what it was sent.
        stop_seconds: that sessions and recordings may take to end when the server stops; the rest of it takes
            a second or two.
        message_bytes: of one websocket message.
        uploads: that wait or are read at a time; they are recognized one after the other.
        upload_bytes: of one upload.
        upload_patience: seconds that the transfer of one upload may take.
    """

    sessions: int = 256
    audio_seconds: float = 4 * 3600.0
    idle_seconds: float = 30.0
    start_seconds: float = 10.0
    send_seconds: float = 10.0
    stop_seconds: float = 8.0
    message_bytes: int = 1 << 20
    uploads: int = 8
    upload_bytes: int = 100 << 20
    upload_patience: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < inf:
                raise ConfigError(f"{field.name} = {getattr(self, field.name)!r}: must be above 0, and finite")

    @property
    def connections(self) -> int:
        """Open at a time, of any kind: the sessions, as many that come and go, and some for pages and uploads."""
        return 2 * self.sessions + 64


class Refused(AsrError):
    """A client gets no more; the message is for its user and tells nothing about the server's inside.

    Args:
        code: one word for programs.
        status: of an HTTP reply.
        close: code of a closed websocket (RFC 6455, section 7.4).
    """

    def __init__(self, message: str, *, code: str, status: int = 400, close: int = 1008) -> None:
        super().__init__(message)
        self.code, self.status, self.close = code, status, close


class ClientGone(Exception):
    """The client closed the connection, or does not read what it is sent."""


def overloaded(message: str = "all sessions are taken; try again later") -> Refused:
    """The refusal of a full server."""
    return Refused(message, code="overloaded", status=503, close=1013)


def stopping() -> Refused:
    """The refusal of a server that is about to end."""
    return Refused("the server is stopping", code="stopping", status=503, close=1012)


def too_long(seconds: float) -> Refused:
    """The end of a session that has lasted so long, or has had so much audio."""
    return Refused(f"a session ends after {seconds:g} s", code="too_long")


def unauthorized() -> Refused:
    """The refusal of a client that does not tell the token."""
    return Refused(
        "a token is needed: Authorization: Bearer TOKEN; websockets may also end in ?token=TOKEN",
        code="unauthorized",
        status=401,
    )
