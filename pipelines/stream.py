"""`asr stream`: live audio, from a microphone, a pipe, or a file fed as if it were one, with its text."""

import json
import os
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np

from asr.audio import SAMPLE_RATE, audio_blocks, to_float
from asr.errors import AsrError
from pipelines.formats import final_message, partial_message
from pipelines.transcribe import RecognizerOptions

if TYPE_CHECKING:
    from asr.recognizer import Segment, Transcript

_BLOCK_SECONDS = 0.1
_BEHIND_SECONDS = 1.0  # lag that is told; below half of it, that it is over
_QUEUE_SECONDS = 30.0  # audio that may wait for a slow recognizer before it is dropped and counted
_FILES = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3")  # how recordings in files begin
_PIPE_BYTES = 65_536  # what a pipe holds (Linux), and so at the most what is in one when it is asked to stop
_DEAD_SECONDS = 5.0  # without any audio: not even a quiet room is so silent


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some audio: float32 `samples` (n,), and when the last one was captured (`time.monotonic`)."""

    samples: np.ndarray
    captured: float


class Source(Protocol):
    """Where live audio comes from."""

    sample_rate: int
    lost: int  # blocks that were lost so far, because nobody took them in time

    def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
        """The audio as it arrives; once `stop` is set, what has been captured by then, and no more."""
        ...


class FileSource:
    """A recording fed in blocks: as fast as they are taken, or at the pace at which it was spoken."""

    def __init__(self, path: Path, *, realtime: bool = False) -> None:
        self.sample_rate = SAMPLE_RATE
        self.lost = 0
        self._path = path
        self._realtime = realtime

    def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
        """Blocks of a tenth of a second.

        Raises:
            AudioError: the file cannot be read.
        """
        start = time.monotonic()
        position = 0
        for samples in audio_blocks(self._path, block_seconds=_BLOCK_SECONDS):
            position += len(samples)
            captured = time.monotonic()
            if self._realtime:
                due = start + position / SAMPLE_RATE
                time.sleep(max(0.0, due - captured))
                captured = due
            yield Block(samples=samples, captured=captured)
            if stop.is_set():
                return


def standard_input() -> BinaryIO:
    """The bytes that come through standard input.

    Raises:
        AsrError: there is none.
    """
    if sys.stdin is None:
        raise AsrError("-: there is no standard input")
    return sys.stdin.buffer


class PipeSource:
    """Samples from a pipe (standard input): 16 bits, little-endian, mono, as `arecord -t raw -f S16_LE` gives them."""

    def __init__(self, sample_rate: int, pipe: BinaryIO | None = None) -> None:
        self.sample_rate = sample_rate
        self.lost = 0
        self._pipe = pipe or standard_input()

    def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
        """Blocks of a tenth of a second, until the pipe ends; empty ones while nothing comes.

        Raises:
            AsrError: it ends before the first sample, or begins as a file does.
        """
        size, held, heard, ended = 2 * round(_BLOCK_SECONDS * self.sample_rate), b"", False, False
        left = _PIPE_BYTES  # to be read after `stop`
        while not ended:
            stopping = stop.is_set()
            if select.select([self._pipe], [], [], 0.0 if stopping else _BLOCK_SECONDS)[0]:
                data = os.read(self._pipe.fileno(), size - len(held))
                left -= len(data) if stopping else 0
                held, ended = held + data, not data or left <= 0
            elif stopping:
                ended = True
            else:
                yield Block(samples=np.zeros(0, np.float32), captured=time.monotonic())
            if not heard and held.startswith(_FILES):
                raise AsrError(
                    f"what comes through the pipe begins with {held[:4].decode()!r}: a file, not samples; name the "
                    "file, or send it as samples (ffmpeg -i FILE -f s16le -ac 1 -ar 16000 -)"
                )
            if len(held) == size or (ended and len(held) > 1):
                samples, held, heard = np.frombuffer(held, "<i2", len(held) // 2), b"", True
                yield Block(samples=to_float(samples.astype(np.int16)), captured=time.monotonic())
        if not heard and not stop.is_set():
            raise AsrError("no sample came through the pipe; did what feeds it start?")


class MicrophoneSource:
    """A microphone through PortAudio: at 16 kHz and mono, or at its own rate and channels where it refuses that.

    Args:
        device: number or part of the name, as `devices()` lists them; None: the system's default.

    Raises:
        AsrError: sounddevice or PortAudio is missing, or there is no such microphone.
    """

    def __init__(self, device: int | str | None = None) -> None:
        self._sounddevice = _load_sounddevice()
        self._device = device
        self.lost = 0
        try:
            own = self._sounddevice.query_devices(device, "input")
        except (ValueError, self._sounddevice.PortAudioError) as error:
            if device is None:
                raise AsrError(f"no microphone found ({error})") from error
            raise AsrError(
                f"no microphone {device!r} ({error}); `asr stream --list-devices` shows what there is"
            ) from error
        rate = int(own["default_samplerate"])
        # where it takes none of them, opening it with the last one tells why
        for self.sample_rate, self._channels in ((SAMPLE_RATE, 1), (rate, 1), (rate, own["max_input_channels"])):
            try:
                self._sounddevice.check_input_settings(
                    device, channels=self._channels, samplerate=self.sample_rate, dtype="float32"
                )
                break
            except self._sounddevice.PortAudioError:
                continue

    def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
        """Blocks of a tenth of a second, until the device stops.

        Raises:
            AsrError: the device cannot be opened, or stops by itself, or gives nothing for 5 s.
        """
        waiting: queue.Queue[Block] = queue.Queue(maxsize=round(_QUEUE_SECONDS / _BLOCK_SECONDS))

        def captured(data: np.ndarray, frames: int, clock: object, status: Any) -> None:
            if status.input_overflow:
                self.lost += 1
            try:
                waiting.put_nowait(Block(samples=data.mean(axis=1), captured=time.monotonic()))
            except queue.Full:
                self.lost += 1

        try:
            with self._sounddevice.InputStream(
                samplerate=self.sample_rate,
                blocksize=round(_BLOCK_SECONDS * self.sample_rate),
                device=self._device,
                channels=self._channels,
                dtype="float32",
                callback=captured,
            ) as stream:
                heard = time.monotonic()
                while not stop.is_set():
                    try:
                        yield waiting.get(timeout=min(1.0, _DEAD_SECONDS))
                        heard = time.monotonic()
                    except queue.Empty:
                        if not stream.active or time.monotonic() - heard > _DEAD_SECONDS:
                            raise AsrError("the microphone stopped; is it still plugged in?") from None
            while not waiting.empty():
                yield waiting.get_nowait()
        except self._sounddevice.PortAudioError as error:
            raise AsrError(f"the microphone cannot be opened at {self.sample_rate} Hz: {error}") from error


def devices() -> str:
    """The microphones as lines to read: number, name, channels, rate; `*` marks the default.

    Raises:
        AsrError: sounddevice or PortAudio is missing, or there is no microphone.
    """
    sounddevice = _load_sounddevice()
    default = sounddevice.default.device[0]
    lines = "".join(
        f"{'*' if number == default else ' '}{number:3}  {device['name']}  "
        f"({device['max_input_channels']} channels, {device['default_samplerate']:.0f} Hz)\n"
        for number, device in enumerate(sounddevice.query_devices())
        if device["max_input_channels"] > 0
    )
    if not lines:
        raise AsrError("no microphone found")
    return lines


@dataclass(kw_only=True)
class Timing:
    """How a stream keeps up: seconds of audio, of recognizing, and from a sound's arrival to its text."""

    audio_seconds: float = 0.0
    processing_seconds: float = 0.0
    lag: float = 0.0
    largest_lag: float = 0.0
    lost: int = 0

    def add(self, block: Block, sample_rate: int, start: float) -> None:
        """Count a block whose recognition began at `start` and ends now."""
        now = time.monotonic()
        self.audio_seconds += len(block.samples) / sample_rate
        self.processing_seconds += now - start
        self.lag = now - block.captured
        self.largest_lag = max(self.largest_lag, self.lag)

    @property
    def rtf(self) -> float:
        """Real-time factor: seconds of recognizing for a second of audio."""
        return self.processing_seconds / self.audio_seconds if self.audio_seconds else 0.0

    def __str__(self) -> str:
        lost = f", {self.lost} blocks lost" if self.lost else ""
        return (
            f"{self.audio_seconds:.1f} s of audio, real-time factor {self.rtf:.3f}, "
            f"lag {self.lag:.2f} s (at most {self.largest_lag:.2f} s){lost}"
        )


class Screen(Protocol):
    """Where the text of a stream is shown."""

    def partial(self, text: str, timing: Timing) -> None:
        """The unfinished end of the text, which may still change."""
        ...

    def final(self, segment: "Segment") -> None:
        """A finished segment."""
        ...

    def note(self, text: str) -> None:
        """Something beside the text that the user should know."""
        ...


def stream(
    source: Source, options: RecognizerOptions, screen: Screen, *, two_pass: bool = False
) -> tuple["Transcript", Timing, bool]:
    """Recognize `source` until it ends, or until Ctrl-C, and show its text as it comes.

    With `two_pass` the offline network reads every finished segment again.

    Returns:
        The whole transcript, how it kept up, and whether Ctrl-C ended it.

    Raises:
        AsrError: the model cannot be loaded or has no streaming network; or the audio broke off, and what was
            heard until then has been shown.
    """
    recognizer = options.load()
    session = recognizer.stream(source.sample_rate, two_pass=two_pass)
    if two_pass:
        recognizer.transcribe(np.zeros(SAMPLE_RATE, np.float32))  # what it reads with is loaded now, not in a pause
    timing = Timing()
    behind = False
    shown = 0
    failure: AsrError | None = None

    with _stop_on_interrupt() as stop, closing(source.blocks(stop)) as blocks:
        try:
            for block in blocks:
                start = time.monotonic()
                update = session.feed(block.samples)
                timing.add(block, source.sample_rate, start)
                for segment in update.final:
                    screen.final(segment)
                    shown += 1
                screen.partial(update.partial, timing)
                if source.lost > timing.lost:
                    timing.lost = source.lost
                    screen.note(f"audio was lost, {timing.lost} blocks so far: the computer is too busy")
                if not behind and timing.lag > _BEHIND_SECONDS:
                    behind = True
                    screen.note(f"falling behind: text is {timing.lag:.1f} s late, real-time factor {timing.rtf:.2f}")
                elif behind and timing.lag < _BEHIND_SECONDS / 2:
                    behind = False
                    screen.note("keeping up again")
        except AsrError as error:
            failure = error
    if failure is not None and not timing.audio_seconds:
        raise failure
    start = time.monotonic()
    transcript = session.finish()
    timing.processing_seconds += time.monotonic() - start
    for segment in transcript.segments[shown:]:
        screen.final(segment)
    if failure is not None:
        raise failure
    return transcript, timing, stop.is_set()


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no audio is left half done; the second one interrupts as usual."""
    stop = threading.Event()

    def ask(number: int, frame: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield stop
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def terminal(*, json_lines: bool = False) -> Iterator[Screen]:
    """The screen of this terminal: finished text on stdout, the rest on stderr; or both as JSON on stdout.

    On a terminal the partial text and the timing are redrawn in place; elsewhere each change is a line.
    """
    if json_lines:
        yield _JsonLines()
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.live import Live

    with Live(refresh_per_second=12, transient=True, console=_console(), redirect_stdout=sys.stdout.isatty()) as live:
        yield _Redrawn(live)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


class _Lines:
    """Partials as lines on stderr, each once."""

    def __init__(self) -> None:
        self._last = ""

    def partial(self, text: str, timing: Timing) -> None:
        if text != self._last:
            self._last = text
            self._changed(text, timing)

    def _changed(self, text: str, timing: Timing) -> None:
        if text:
            print(f"... {text}", file=sys.stderr, flush=True)

    def final(self, segment: "Segment") -> None:
        if segment.text:
            print(segment.text, flush=True)

    def note(self, text: str) -> None:
        print(f"note: {text}", file=sys.stderr, flush=True)


class _JsonLines(_Lines):
    """Partials, each once, and finals as JSON objects on stdout, a line each: the messages of `asr serve`."""

    def _changed(self, text: str, timing: Timing) -> None:
        self._write(partial_message(text, timing.audio_seconds))

    def final(self, segment: "Segment") -> None:
        self._write(final_message(segment))

    def _write(self, message: dict[str, Any]) -> None:
        print(json.dumps(message, ensure_ascii=False), flush=True)


class _Redrawn:
    """Partials and timing at the bottom of the terminal, redrawn; finished text scrolls above them."""

    def __init__(self, live: Any) -> None:
        self._live = live

    def partial(self, text: str, timing: Timing) -> None:
        from rich.console import Group
        from rich.text import Text

        self._live.update(Group(Text(f"{text} ▌", style="italic"), Text(str(timing), style="dim")))

    def final(self, segment: "Segment") -> None:
        if segment.text:
            print(segment.text, flush=True)

    def note(self, text: str) -> None:
        self._live.console.print(f"note: {text}", style="yellow")


def _load_sounddevice() -> Any:
    try:
        import sounddevice
    except ImportError as error:
        raise AsrError("the microphone needs the extra [mic]: pip install 'streaming-asr[mic]'") from error
    except OSError as error:  # the Python package is there, the library under it is not
        raise AsrError(
            f"the microphone needs the library PortAudio ({error}); on Debian: apt install libportaudio2"
        ) from error
    return sounddevice
