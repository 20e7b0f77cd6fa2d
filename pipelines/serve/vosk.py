"""The protocol of vosk-server's websocket: one reply to each message of audio."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from starlette.websockets import WebSocket

from asr.decoding import Word
from asr.recognizer import Segment
from pipelines.serve.limits import Refused
from pipelines.serve.native import parse_object
from pipelines.serve.pcm import PcmReader
from pipelines.serve.session import Channel, Live

if TYPE_CHECKING:
    from pipelines.serve.service import Service

_DEFAULT_RATE = 8_000  # Hz; what vosk-server takes where nothing is said


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a client may ask for. `phrase_list` and `model` of the original are accepted and have no effect."""

    sample_rate: int = _DEFAULT_RATE
    words: bool = True
    partial_words: bool = False
    max_alternatives: int = 0


def parse(message: str | bytes) -> dict[str, Any] | Literal["eof", "reset"] | bytes:
    """Tell what a message is: settings (those of Config that it names), the end, a new beginning, or audio.

    Some clients send their JSON in binary messages: what is a JSON object with one of the three keys is taken
    for one. As audio it would be some milliseconds of noise.

    Raises:
        Refused: a text that is none of them.
    """
    if isinstance(message, bytes) and not (len(message) < 4096 and message.lstrip()[:1] == b"{"):
        return message
    try:
        given = parse_object(message)
    except Refused:
        if isinstance(message, bytes):
            return message
        raise
    if "config" in given:
        return _settings(given["config"])
    if given.get("eof"):
        return "eof"
    if given.get("reset"):
        return "reset"
    if isinstance(message, bytes):
        return message
    raise Refused("text messages are config, reset or eof", code="bad_message", close=1007)


def _settings(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise Refused("config must be an object", code="bad_message", close=1007)
    named = {name: value for name, value in given.items() if value is not None}
    numbers = {name: _whole(name, named[name]) for name in ("sample_rate", "max_alternatives") if name in named}
    return numbers | {name: bool(named[name]) for name in ("words", "partial_words") if name in named}


def _whole(name: str, value: Any) -> int:
    """A whole number as clients write it: 16000, 16000.0 or "16000"."""
    try:
        number = float(value)
        if number.is_integer():
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise Refused(f"config.{name} must be a whole number", code="bad_message", close=1007)


async def talk(channel: Channel, service: "Service", websocket: WebSocket) -> None:
    """Serve one client until it says eof.

    Raises:
        Refused: it broke a rule.
        ClientGone: it left.
    """
    config = Config()
    reader = PcmReader("s16le")
    with service.session(channel, "vosk", websocket) as live:
        while (message := await channel.receive()) is not None:
            said = parse(message)
            if isinstance(said, dict):
                changed = replace(config, **said)
                if changed.sample_rate != config.sample_rate and live.is_open:
                    told = "sample_rate must be set before audio comes, or after reset"
                    raise Refused(told, code="bad_settings")
                config = changed
            elif said == "reset":
                await channel.send(result(await live.finish(), config))
                reader = PcmReader("s16le")
            elif said == "eof":
                break
            else:
                await channel.send(await _hear(live, reader, said, config))
        await channel.send(result(await live.finish(), config))


async def _hear(live: Live, reader: PcmReader, audio: bytes, config: Config) -> dict[str, Any]:
    if not live.is_open:
        live.open(config.sample_rate)
    update = await live.feed(reader.read(audio))
    if update.final:
        return result(update.final, config)
    partial = {"partial": update.partial}
    return partial | {"partial_result": _words(update.words)} if config.partial_words and update.words else partial


def result(segments: Sequence[Segment], config: Config) -> dict[str, Any]:
    """A final result; of several segments, as one message of audio may end them, one for all."""
    if config.max_alternatives > 0:
        return {"alternatives": _alternatives(segments, config)}
    text = " ".join(segment.text for segment in segments)
    return {"result": _words(_said(segments)), "text": text} if config.words and text else {"text": text}


def _alternatives(segments: Sequence[Segment], config: Config) -> list[dict[str, Any]]:
    if len(segments) == 1 and segments[0].alternatives:
        found = [{"text": a.text, "confidence": a.score} for a in segments[0].alternatives[: config.max_alternatives]]
    else:
        confidences = [word.confidence for word in _said(segments)]
        mean = sum(confidences) / len(confidences) if confidences else 1.0
        found = [{"text": " ".join(segment.text for segment in segments), "confidence": mean}]
    if config.words and segments:
        found[0]["result"] = _words(_said(segments))
    return found


def _said(segments: Sequence[Segment]) -> list[Word]:
    return [word for segment in segments for word in segment.words]


def _words(words: Sequence[Word]) -> list[dict[str, Any]]:
    return [
        {"conf": round(word.confidence, 6), "end": round(word.end, 6), "start": round(word.start, 6), "word": word.text}
        for word in words
    ]
