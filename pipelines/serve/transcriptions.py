"""OpenAI's transcription endpoint: recordings in, text out, in the formats that its clients know."""

import asyncio
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar, get_args

from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from asr.audio import SAMPLE_RATE, audio_blocks
from asr.errors import AudioError
from asr.recognizer import Recognizer, Segment, Transcript
from pipelines.formats import render, whisper_result
from pipelines.serve.limits import Refused, overloaded, stopping
from pipelines.serve.log import event
from pipelines.serve.replies import refusal

if TYPE_CHECKING:
    from pipelines.serve.service import Service

T = TypeVar("T")
Format = Literal["json", "text", "srt", "verbose_json", "vtt"]
MODEL_PREFIX = "asr-"
# What clients written for OpenAI ask for where their user cannot choose: the best network that there is.
_ALIASES = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe")
_MOST_FIELD = 1 << 16  # bytes of a form's field
_BLOCK_SECONDS = 0.1  # decoded at a time while the length is checked: files may have 255 channels


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a client asks for beside its file. `language`, `prompt` and `temperature` have no effect here."""

    network: str
    format: Format = "json"
    words: bool = False
    segments: bool = True
    stream: bool = False


def parse_order(fields: Iterable[tuple[str, Any]], networks: tuple[str, ...]) -> Order:
    """Read a form's fields, its file aside.

    Raises:
        Refused: names what is wrong.
    """
    texts = [(name, value) for name, value in fields if isinstance(value, str)]
    given = dict(texts)
    format = next((f for f in get_args(Format) if f == given.get("response_format", "json")), None)
    if format is None:
        raise _wrong(f"response_format must be one of {', '.join(get_args(Format))}")
    wanted = {value for name, value in texts if name in ("timestamp_granularities[]", "timestamp_granularities")}
    if wanted - {"word", "segment"}:
        raise _wrong("timestamp_granularities must be word or segment")
    if wanted and format != "verbose_json":
        raise _wrong("timestamp_granularities need response_format verbose_json")
    stream = given.get("stream", "false").lower()
    if stream not in ("true", "false", "1", "0", ""):
        raise _wrong("stream must be true or false")
    if stream in ("true", "1") and format not in ("json", "text"):
        raise _wrong("stream: only with response_format json or text")
    return Order(
        network=_network(given.get("model", _ALIASES[0]), networks),
        format=format,
        words="word" in wanted,
        segments="segment" in wanted or not wanted,
        stream=stream in ("true", "1"),
    )


def _network(model: str, networks: tuple[str, ...]) -> str:
    if model in _ALIASES:
        return "offline" if "offline" in networks else networks[0]
    name = model.removeprefix(MODEL_PREFIX)
    if model.startswith(MODEL_PREFIX) and name in networks:
        return name
    there = ", ".join(MODEL_PREFIX + name for name in networks)
    raise Refused(f"there is no such model; there are {there}", code="model_not_found", status=404)


class Transcriptions:
    """`POST /v1/audio/transcriptions`, as an ASGI application.

    Recordings are recognized one after the other, beside the live sessions, in a thread of their own.

    Attributes:
        is_busy: the thread is at work. What it does cannot be stopped, only left.
    """

    def __init__(self, service: "Service") -> None:
        self._service = service
        self._thread = ThreadPoolExecutor(1, "uploads")
        self._present = self._reading = 0
        self.is_busy = self._ended = False
        self._waits: set[asyncio.Timeout] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        metrics = self._service.metrics
        began = time.monotonic()
        status, code, order, reply = 500, "internal", None, None
        try:
            with self._place(), ExitStack() as opened:
                form = await self._receive(Request(scope, receive))
                order = parse_order(form.multi_items(), self._service.recognizer.networks)
                path = opened.enter_context(_as_path(_file(form)))
                opened.callback(os.truncate, path, 0)  # who reads it yet, for a client that left, comes to its end
                opened.enter_context(self._counted_as_read())
                gone = asyncio.create_task(_leaving(receive))
                opened.callback(gone.cancel)
                seconds = await self._in_thread(gone, _check_length, path, self._service.limits.audio_seconds)
                metrics.heard("upload", seconds)
                reply = self._streamed(gone, path, order) if order.stream else await self._whole(gone, path, order)
                await reply(scope, _nothing, send)
            status, code = 200, None
        except Refused as error:
            status, code = error.status, error.code
            metrics.dropped.labels(code).inc()
            refused = refusal(error)
            if reply is None:
                await refused(scope, receive, send)
            else:  # a stream, whose head has gone out: the error is its last event
                await send({"type": "http.response.body", "body": b"data: %b\n\n" % bytes(refused.body)})
        finally:
            metrics.uploads.labels(status).inc()
            event(
                self._service.log,
                "upload",
                client=scope["client"][0] if scope.get("client") else None,
                status=status,
                code=code,
                network=order and order.network,
                seconds=round(time.monotonic() - began, 3),
            )

    def __len__(self) -> int:
        """How many recordings are being read, or wait for it."""
        return self._reading

    def end(self) -> None:
        """Refuse all recordings that are here: the server has no more time for them."""
        self._ended = True
        for wait in self._waits:
            wait.reschedule(0)

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._service.stopping:
            raise stopping()
        if self._present >= self._service.limits.uploads:
            raise overloaded("too many recordings wait; try again later")
        self._present += 1
        try:
            yield
        finally:
            self._present -= 1

    @contextmanager
    def _counted_as_read(self) -> Iterator[None]:
        self._reading += 1
        try:
            yield
        finally:
            self._reading -= 1

    @asynccontextmanager
    async def _until_the_end(self) -> AsyncIterator[None]:
        """Wait for something, but no longer than until `end`.

        Raises:
            Refused: it was called.
        """
        try:
            async with asyncio.timeout(0 if self._ended else None) as wait:
                self._waits.add(wait)
                try:
                    yield
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            raise stopping() from None

    async def _receive(self, request: Request) -> FormData:
        """The form, once all of it has come.

        Raises:
            Refused: it is none, or too large, or comes too slowly; or the server ends.
        """
        limits = self._service.limits
        bounded = Request(request.scope, _bounded(request.receive, limits.upload_bytes))
        try:
            async with asyncio.timeout(limits.upload_patience), self._until_the_end():
                return await bounded.form(max_files=1, max_fields=32, max_part_size=_MOST_FIELD)
        except TimeoutError:
            message = f"the file did not come within {limits.upload_patience:g} s"
            raise Refused(message, code="too_slow", status=408) from None
        except HTTPException as error:
            raise _wrong(str(error.detail)) from None
        except ValueError:  # such as a charset that decodes nothing
            raise _wrong("not a form that can be read") from None
        except ClientDisconnect:
            raise _left() from None

    async def _whole(self, gone: asyncio.Task[None], path: Path, order: Order) -> Response:
        transcript = await self._in_thread(gone, self._service.recognizer.transcribe, path, None, order.network)
        self._service.note_text("upload", transcript.segments)
        return reply_to(transcript, order)

    def _streamed(self, gone: asyncio.Task[None], path: Path, order: Order) -> Response:
        return StreamingResponse(self._events(gone, path, order), media_type="text/event-stream")

    async def _events(self, gone: asyncio.Task[None], path: Path, order: Order) -> AsyncIterator[str]:
        """Server-sent events: a delta for each finished segment, then the whole text."""
        texts: list[str] = []
        segments = _segments(self._service.recognizer, path, order.network)
        try:
            while (segment := await self._in_thread(gone, lambda: next(segments, None))) is not None:
                self._service.note_text("upload", [segment])
                delta = segment.text if not texts else f" {segment.text}"
                texts.append(segment.text)
                yield _event({"type": "transcript.text.delta", "delta": delta})
            yield _event({"type": "transcript.text.done", "text": " ".join(texts)})
        finally:
            self._thread.submit(segments.close)

    async def _in_thread(self, gone: asyncio.Task[None], work: Callable[..., T], *arguments: Any) -> T:
        """Run it after what waits already, unless the client is gone before.

        Raises:
            Refused: the recording cannot be read, the client left, or the server ends.
        """

        def watched() -> T:
            self.is_busy = True
            try:
                return work(*arguments)
            finally:
                self.is_busy = False

        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, watched)
            try:
                async with self._until_the_end():
                    await asyncio.wait((running, gone), return_when=asyncio.FIRST_COMPLETED)
            finally:
                running.cancel()  # unless it is done
            if running.cancelled():
                raise _left()
            return running.result()
        except AudioError as error:
            raise Refused(_public(str(error)), code="bad_audio") from None
        except RuntimeError:  # the thread has ended
            if self._service.stopping:
                raise stopping() from None
            raise


def reply_to(transcript: Transcript, order: Order) -> Response:
    """The transcript in the format asked for."""
    if order.format == "text":
        return PlainTextResponse(f"{transcript.text}\n")
    if order.format in ("srt", "vtt"):
        return PlainTextResponse(render(transcript, order.format, "upload"))
    if order.format == "json":
        return JSONResponse({"text": transcript.text})
    segments = whisper_result(transcript)["segments"]
    words = [
        {"word": word["word"].strip(), "start": word["start"], "end": word["end"]}
        for segment in segments
        for word in segment.pop("words")
    ]
    return JSONResponse(
        {
            "task": "transcribe",
            "language": "unknown",
            "duration": transcript.duration,
            "text": transcript.text,
            **({"segments": segments} if order.segments else {}),
            **({"words": words} if order.words else {}),
        }
    )


def listed_models(networks: Iterable[str]) -> list[dict[str, Any]]:
    """The networks as OpenAI lists models."""
    return [
        {"id": MODEL_PREFIX + name, "object": "model", "created": 0, "owned_by": "streaming-asr"} for name in networks
    ]


def _segments(recognizer: Recognizer, path: Path, network: str) -> Generator[Segment, None, None]:
    """The segments of a file as they are finished; the offline network finishes all at once."""
    if network == "offline":
        yield from recognizer.transcribe(path, network=network).segments
        return
    session = recognizer.stream()
    given = 0
    with closing(audio_blocks(path, block_seconds=1.0)) as blocks:
        for block in blocks:
            final = session.feed(block).final
            given += len(final)
            yield from final
    yield from session.finish().segments[given:]


def _check_length(path: Path, most: float) -> float:
    """Decode a recording once, in little memory, to know that it can be read; return its seconds.

    What a file declares is no measure: a megabyte may unpack to days of silence.

    Raises:
        AudioError: it cannot be read.
        Refused: it is too long, or of a kind that is not read.
    """
    _check_kind(path)
    samples = 0
    with closing(audio_blocks(path, block_seconds=_BLOCK_SECONDS)) as blocks:
        for block in blocks:
            samples += len(block)
            if samples > most * SAMPLE_RATE:
                raise Refused(f"longer than the {most:g} s allowed", code="too_long", status=413)
    return samples / SAMPLE_RATE


def _check_kind(path: Path) -> None:
    """Let in what begins like a recording: a playlist would make ffmpeg open other files of this machine.

    Raises:
        Refused: it begins like none.
    """
    with open(path, "rb") as file:
        head = file.read(16)
        while head[:3] == b"ID3" and len(head) >= 10:  # a tag; what follows it counts
            size = head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]
            file.seek(file.tell() - len(head) + 10 + size)
            head = file.read(16)
    known = (
        head.startswith((b"RIFF", b"RF64", b"FORM", b"fLaC", b"OggS", b"caff", b".snd", b"\x1aE\xdf\xa3", b"#!AMR"))
        or (head[:1] == b"\0" and head[4:8] == b"ftyp")
        or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0)  # MPEG audio, AAC
    )
    if not known:
        raise Refused("not a recording of a kind that is read: WAV, FLAC, MP3, Ogg, M4A, WebM ...", code="bad_audio")


async def _leaving(receive: Receive) -> None:
    """Wait until the client leaves; its form has come."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    """What a reply receives: `_leaving` alone tells that the client has left."""
    return await asyncio.get_running_loop().create_future()


def _file(form: FormData) -> BinaryIO:
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise _wrong("file is missing: send the recording as multipart/form-data")
    return file.file


@contextmanager
def _as_path(file: BinaryIO) -> Iterator[Path]:
    """An upload under a path, for decoders that open by name; it is gone afterwards, however the server ends.

    On Linux the file has no name: the path leads through this process.
    """
    with file:
        if isinstance(file, tempfile.SpooledTemporaryFile):
            file.rollover()
        file.flush()
        path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        if path.exists():
            yield path
            return
        file.seek(0)
        with tempfile.NamedTemporaryFile() as named:
            shutil.copyfileobj(file, named)
            named.flush()
            yield Path(named.name)


def _bounded(receive: Receive, most: int) -> Receive:
    """Messages of a request until its body has more than `most` bytes; then Refused is raised."""
    total = 0

    async def bounded() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > most:
            raise Refused(f"larger than the {most} bytes allowed", code="too_large", status=413)
        return message

    return bounded


def _public(message: str) -> str:
    """A decoder's complaint without the path of the upload."""
    return re.sub(r"(file:)?/\S+?(?=[:\s]|$)", "the file", message)[:300]


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _wrong(message: str) -> Refused:
    return Refused(message, code="bad_request")


def _left() -> Refused:
    return Refused("the client left", code="gone")
