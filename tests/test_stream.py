"""`asr stream`: live audio from a file or a microphone."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from toy_model import RATE, ToyOptions, spell, toy_recognizer, write

from asr.errors import AsrError
from asr.recognizer import Recognizer
from pipelines.cli import main
from pipelines.stream import Block, FileSource, MicrophoneSource, Timing, stream


class Recorded:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.partials: list[str] = []
        self.finals: list[str] = []
        self.notes: list[str] = []

    def partial(self, text: str, timing: Timing) -> None:
        self.partials.append(text)

    def final(self, text: str) -> None:
        self.finals.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)


class Played:
    """A source that gives chosen blocks, each so many seconds after its sound."""

    def __init__(
        self, audio: np.ndarray, *, late: list[float] | None = None, then: BaseException | None = None
    ) -> None:
        self.sample_rate = RATE
        self.lost = 0
        self._audio, self._late, self._then = audio, late or [], then

    def blocks(self) -> Generator[Block, None, None]:
        for number, start in enumerate(range(0, len(self._audio), 1600)):
            late = self._late[number] if number < len(self._late) else 0.0
            yield Block(samples=self._audio[start : start + 1600], captured=time.monotonic() - late)
        if self._then is not None:
            raise self._then


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["stream", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: toy_recognizer())


@pytest.fixture
def two_segments(tmp_path: Path) -> Path:
    audio = np.concatenate([spell("one two"), np.zeros(2 * RATE), spell("three"), np.zeros(RATE // 2)])
    soundfile.write(tmp_path / "a.wav", audio, RATE)
    return tmp_path / "a.wav"


def test_partials_grow_into_finals(two_segments: Path) -> None:
    screen = Recorded()
    transcript, timing, interrupted = stream(FileSource(two_segments), ToyOptions(), screen)
    assert screen.finals == ["one two", "three"]
    assert transcript.text == toy_recognizer().transcribe(two_segments, network="streaming").text
    assert "one t" in screen.partials
    assert screen.partials.index("one t") < screen.partials.index("thre")
    assert timing.audio_seconds == pytest.approx(soundfile.info(two_segments).duration)
    assert 0 < timing.rtf < 10
    assert not interrupted


def test_finals_are_stdout_and_the_rest_is_stderr(
    two_segments: Path, toy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(two_segments) == 0
    out, err = capsys.readouterr()
    assert out == "one two\nthree\n"
    assert "... one t\n" in err
    assert len([line for line in err.splitlines() if line == "... one two"]) == 1  # a line a change
    assert "real-time factor" in err.splitlines()[-1]


def test_realtime_takes_as_long_as_the_speech(tmp_path: Path) -> None:
    start = time.monotonic()
    _, timing, _ = stream(FileSource(write(tmp_path / "a.wav", "hi"), realtime=True), ToyOptions(), Recorded())
    assert time.monotonic() - start >= timing.audio_seconds > 0.3
    assert 0 <= timing.lag < 1


def test_it_says_when_it_falls_behind_and_when_it_is_over() -> None:
    screen = Recorded()
    stream(Played(spell("words"), late=[0, 0, 1.5, 2.0, 0.8, 0.1]), ToyOptions(), screen)
    assert len(screen.notes) == 2
    assert screen.notes[0].startswith("falling behind: ")
    assert screen.notes[1] == "keeping up again"


def test_lost_audio_is_told() -> None:
    source = Played(spell("words"))
    source.lost = 3
    screen = Recorded()
    _, timing, _ = stream(source, ToyOptions(), screen)
    assert len(screen.notes) == 1
    assert "3 blocks" in screen.notes[0]
    assert "3 blocks lost" in str(timing)


def test_what_was_heard_is_shown_before_the_audio_breaks_off() -> None:
    screen = Recorded()
    with pytest.raises(AsrError, match="plugged"):
        stream(Played(spell("words"), then=AsrError("is it still plugged in?")), ToyOptions(), screen)
    assert screen.finals == ["words"]


def test_ctrl_c_ends_with_the_text_so_far() -> None:
    class Interrupted(Played):
        def blocks(self) -> Generator[Block, None, None]:
            for number, block in enumerate(super().blocks()):
                if number == 20:
                    os.kill(os.getpid(), signal.SIGINT)
                yield block

    before = signal.getsignal(signal.SIGINT)
    screen = Recorded()
    transcript, timing, interrupted = stream(Interrupted(spell("a long sentence")), ToyOptions(), screen)
    assert interrupted
    assert timing.audio_seconds == pytest.approx(2.1)
    assert screen.finals == [transcript.text]
    assert "a long sentence".startswith(transcript.text)
    assert len(transcript.text) > 5
    assert signal.getsignal(signal.SIGINT) is before


def test_a_missing_file_is_one_line(tmp_path: Path, toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none.wav") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path / 'none.wav'}: ")
    assert err.count("\n") == 1


def test_on_a_terminal_the_partial_is_redrawn_in_place(two_segments: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from toy_model import toy_recognizer; from asr.recognizer import Recognizer\n"
        "Recognizer.load = lambda *_, **__: toy_recognizer()\n"
        "from pipelines.cli import main; main(['stream', sys.argv[1], '--realtime'])"
    )
    screen, terminal = pty.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(two_segments)], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b"".join(iter(lambda: _read(screen), b"")).decode()
    assert process.wait(timeout=30) == 0
    assert "\x1b[2K" in shown  # a line erased
    assert shown.count("one two\r\n") == 1  # the finished line, once
    assert "three\r\n" in shown
    assert "one t" in shown[: shown.index("one two\r\n")]


def _read(file: int) -> bytes:
    try:
        return os.read(file, 65536)
    except OSError:  # how Linux tells that the other end is closed
        return b""


# ---- the microphone, with PortAudio played by a stand-in


class PortAudioError(Exception):
    pass


class FakeSounddevice:
    """A sound card that knows 44.1 kHz alone and plays `audio` into the callback, overflowing once."""

    PortAudioError = PortAudioError
    default = SimpleNamespace(device=(1, 0))

    def __init__(self, audio: np.ndarray) -> None:
        self.audio = audio
        self.opened: dict[str, Any] = {}

    def query_devices(self, device: object = None, kind: str | None = None) -> Any:
        found = [
            {"name": "speaker", "max_input_channels": 0, "default_samplerate": 48000.0},
            {"name": "USB mic", "max_input_channels": 2, "default_samplerate": 44100.0},
        ]
        if kind is None:
            return found
        if device in (None, 1, "USB"):
            return found[1]
        raise ValueError(f"No input device matching {device!r}")

    def check_input_settings(self, device: object, *, samplerate: float, **_: object) -> None:
        if samplerate != 44100:
            raise PortAudioError("Invalid sample rate")

    def InputStream(self, *, callback: Any, blocksize: int, **chosen: Any) -> "FakeSounddevice":
        self.opened = chosen | {"blocksize": blocksize}
        for number, start in enumerate(range(0, len(self.audio), blocksize)):
            data = self.audio[start : start + blocksize, None]
            callback(data, len(data), None, SimpleNamespace(input_overflow=number == 2))
        return self

    active = False  # after the last block the device is gone

    def __enter__(self) -> "FakeSounddevice":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSounddevice]:
    card = FakeSounddevice(np.full(44100, 0.1, np.float32))
    monkeypatch.setitem(sys.modules, "sounddevice", card)  # type: ignore[arg-type]
    yield card


def test_a_microphone_that_refuses_16_khz_is_opened_at_its_own_rate(card: FakeSounddevice) -> None:
    source = MicrophoneSource("USB")
    assert source.sample_rate == 44100
    screen = Recorded()
    with pytest.raises(AsrError, match="microphone stopped"):
        stream(source, ToyOptions(), screen)
    assert card.opened["samplerate"] == 44100
    assert card.opened["blocksize"] == 4410
    assert len(screen.partials) == 10  # every block arrived
    assert source.lost == 1
    assert "audio was lost" in screen.notes[0]


def test_an_unknown_microphone_is_named(card: FakeSounddevice) -> None:
    with pytest.raises(AsrError, match=r"'studio'.*--list-devices"):
        MicrophoneSource("studio")


def test_no_microphone_at_all(
    card: FakeSounddevice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "query_devices", lambda *_: [])
    assert run("--list-devices") == 1
    assert capsys.readouterr().err == "error: no microphone found\n"


def test_devices_are_listed_with_the_default_marked(card: FakeSounddevice, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--list-devices") == 0
    assert capsys.readouterr().out == "*  1  USB mic  (2 channels, 44100 Hz)\n"


def test_without_sounddevice_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert run() == 1
    assert "[mic]" in capsys.readouterr().err


def test_without_portaudio_the_debian_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')")
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert run("--list-devices") == 1
    assert "apt install libportaudio2" in capsys.readouterr().err
