"""The protocol of sherpa-onnx's streaming websocket servers: audio in, JSON out, `Done` and `Done!`."""

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import numpy as np
from starlette.websockets import WebSocket

from asr.audio import SAMPLE_RATE
from asr.errors import AudioError
from asr.recognizer import Segment
from pipelines.serve.limits import Refused
from pipelines.serve.pcm import PcmReader, WavReader
from pipelines.serve.session import Channel

if TYPE_CHECKING:
    from pipelines.serve.service import Service


class SherpaReader:
    """Samples out of what these clients send: 32 bit floats, or a WAV file as it is.

    The letters RIFF are no sound: as a float they are 12690.

    Args:
        sample_rate: of floats; a WAV file tells its own.
    """

    def __init__(self, sample_rate: int = SAMPLE_RATE) -> None:
        self.sample_rate: int | None = None  # known once audio has come
        self._float_rate = sample_rate
        self._reader: PcmReader | WavReader | None = None
        self._head = b""

    def read(self, data: bytes) -> np.ndarray:
        """The whole samples so far.

        Raises:
            AudioError: a WAV file of a kind that is not read.
        """
        if self._reader is None:
            data = self._head = self._head + data
            if len(data) < 4:
                return np.zeros(0, np.float32)
            self._reader = WavReader() if data[:4] == b"RIFF" else PcmReader("f32le")
        samples = self._reader.read(data)
        self.sample_rate = self._reader.sample_rate if isinstance(self._reader, WavReader) else self._float_rate
        return samples


def parse_rate(query: bytes) -> int:
    """The sample rate that a client put into its address, `?sample_rate=8000`; or the server's.

    Raises:
        Refused: it is no number.
    """
    given = parse_qs(query.decode("latin-1")).get("sample_rate", [str(SAMPLE_RATE)])[0]
    if not (given.isascii() and given.isdecimal() and len(given) < 8):
        raise Refused("sample_rate must be a whole number", code="bad_message", close=1007)
    return int(given)


async def talk(channel: Channel, service: "Service", websocket: WebSocket) -> None:
    """Serve one client until it says `Done`.

    Raises:
        Refused: it broke a rule.
        ClientGone: it left.
    """
    reader = SherpaReader(parse_rate(websocket.scope["query_string"]))
    shown, segment_number, start = "", 0, 0.0
    with service.session(channel, "sherpa", websocket) as live:
        while (message := await channel.receive()) is not None:
            if isinstance(message, str):
                if message.strip() != "Done":
                    raise Refused("text messages are Done", code="bad_message", close=1007)
                break
            try:
                samples = reader.read(message)
            except AudioError as error:
                raise Refused(str(error), code="bad_audio", close=1007) from None
            if reader.sample_rate is None:
                continue
            if not live.is_open:
                live.open(reader.sample_rate)
            update = await live.feed(samples)
            for segment in update.final:
                await channel.send(final(segment, segment_number))
                segment_number, start, shown = segment_number + 1, segment.end, ""
            if update.partial != shown:
                shown = update.partial
                await channel.send(partial(shown, segment_number, start))
        rest = await live.finish()
        for number, segment in enumerate(rest, start=segment_number):
            await channel.send(final(segment, number, is_eof=number == segment_number + len(rest) - 1))
        await channel.send("Done!")


def partial(text: str, number: int, start: float) -> dict[str, Any]:
    """The open segment as a message."""
    return _message(text, number, start, [], [], is_final=False, is_eof=False)


def final(segment: Segment, number: int, is_eof: bool = False) -> dict[str, Any]:
    """A finished segment as a message; `timestamps` count from its `start_time`."""
    timestamps = [round(word.start - segment.start, 3) for word in segment.words]
    words = [f" {word.text}" for word in segment.words]  # tokens joined are the text
    return _message(segment.text, number, segment.start, words, timestamps, is_final=True, is_eof=is_eof)


def _message(
    text: str, number: int, start: float, tokens: list[str], timestamps: list[float], *, is_final: bool, is_eof: bool
) -> dict[str, Any]:
    return {
        "text": text,
        "tokens": tokens,
        "timestamps": timestamps,
        "segment": number,
        "start_time": round(start, 3),
        "is_final": is_final,
        "is_eof": is_eof,
    }
