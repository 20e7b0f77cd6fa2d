"""`asr stream`: live audio from a file or a microphone."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
import soundfile
from toy_model import RATE, TOKENIZER, ToyEngine, ToyOptions, spell, toy_recognizer, write

from asr.errors import AsrError
from asr.metrics import count_errors
from asr.recognizer import Network, Recognizer, Segment
from pipelines.cli import main
from pipelines.stream import Block, FileSource, MicrophoneSource, PipeSource, Timing, stream

NEVER = threading.Event()


class Recorded:
    """A screen that remembers."""

    def __init__(self) -> None:
        self.partials: list[str] = []
        self.finals: list[str] = []
        self.notes: list[str] = []

    def partial(self, text: str, timing: Timing) -> None:
        self.partials.append(text)

    def final(self, segment: Segment) -> None:
        self.finals.append(segment.text)

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

    def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
        for number, start in enumerate(range(0, len(self._audio), 1600)):
            late = self._late[number] if number < len(self._late) else 0.0
            yield Block(samples=self._audio[start : start + 1600], captured=time.monotonic() - late)
            if stop.is_set():
                return
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


def test_json_lines_are_the_messages_of_the_server(
    two_segments: Path, toy: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(two_segments, "--json") == 0
    messages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    finals = [message for message in messages if message["type"] == "final"]
    assert [message["text"] for message in finals] == ["one two", "three"]
    assert [word["word"] for word in finals[0]["words"]] == ["one", "two"]
    assert finals[0]["start"] <= finals[0]["words"][0]["start"] < finals[0]["words"][0]["end"] < finals[1]["start"]
    partials = [message for message in messages if message["type"] == "partial"]
    assert "one t" in [message["text"] for message in partials]
    assert [message["time"] for message in partials] == sorted({message["time"] for message in partials})


@pytest.fixture
def offline_shouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline network reads z where the streaming one reads e."""

    class Other(ToyEngine):
        def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            swap = np.arange(len(TOKENIZER))
            e, z = TOKENIZER.encode("ez")
            swap[[e, z]] = z, e
            return [values[:, swap] for values in super().log_probs(batch)]

    networks = {"streaming": Network(TOKENIZER, ToyEngine), "offline": Network(TOKENIZER, Other)}
    monkeypatch.setattr(Recognizer, "load", lambda *_, **chosen: Recognizer(networks, endpoint=chosen["endpoint"]))


def test_two_pass_finals_are_the_offline_networks(
    two_segments: Path, offline_shouts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(two_segments, "--two-pass") == 0
    out, err = capsys.readouterr()
    assert out == "onz two\nthrzz\n"
    assert "... one tw\n" in err


def test_the_second_network_is_there_before_the_first_sound() -> None:
    loaded: list[str] = []

    class Late(Played):
        def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
            loaded.append("sound")
            yield from super().blocks(stop)

    def open_offline() -> ToyEngine:
        loaded.append("offline")
        return ToyEngine()

    networks = {"streaming": Network(TOKENIZER, ToyEngine), "offline": Network(TOKENIZER, open_offline)}
    options: Any = SimpleNamespace(load=lambda: Recognizer(networks))
    transcript, _, _ = stream(Late(spell("words")), options, Recorded(), two_pass=True)
    assert loaded == ["offline", "sound"]
    assert transcript.text == "words"


def test_rules_say_when_a_segment_ends(
    two_segments: Path, offline_shouts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(two_segments, "--rule", "trailing_silence=2.5", "--rule", "blanks=false") == 0
    assert capsys.readouterr().out == "one twothree\n"  # uncut, and no space was said
    assert run(two_segments, "--rule", "trailing=2.5") == 2
    assert "there is no rule 'trailing'; there are trailing_silence, leading_silence" in capsys.readouterr().err
    assert run(two_segments, "--rule", "max_segment=long") == 2
    assert "max_segment must be a number of seconds" in capsys.readouterr().err


def test_samples_from_a_pipe_are_those_of_a_file(two_segments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, rate = soundfile.read(two_segments, dtype="int16")
    data = samples.astype("<i2").tobytes()
    with pipe_of(data + b"\0", ends=True) as pipe:  # half a sample more
        transcript, timing, _ = stream(PipeSource(rate, pipe), ToyOptions(), Recorded())
    assert transcript.text == stream(FileSource(two_segments), ToyOptions(), Recorded())[0].text
    assert timing.audio_seconds == pytest.approx(len(samples) / rate)
    with pipe_of(b"", ends=True) as pipe, pytest.raises(AsrError, match="no sample came through the pipe"):
        stream(PipeSource(rate, pipe), ToyOptions(), Recorded())
    with pipe_of(two_segments.read_bytes(), ends=True) as pipe, pytest.raises(AsrError, match=r"'RIFF': a file, not"):
        stream(PipeSource(rate, pipe), ToyOptions(), Recorded())
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(AsrError, match="-: there is no standard input"):
        PipeSource(rate)


def test_ctrl_c_ends_a_pipe_through_which_nothing_comes() -> None:
    said = (spell("a long sentence") * 32_767).astype("<i2").tobytes()
    stopper = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    with pipe_of(said, ends=False) as pipe:
        stopper.start()
        transcript, _, interrupted = stream(PipeSource(16_000, pipe), ToyOptions(), Recorded())
    assert interrupted
    assert transcript.text == "a long sentence"


class Impatient(Recorded):
    """Ctrl-C at the first block."""

    def partial(self, text: str, timing: Timing) -> None:
        if not self.partials:
            os.kill(os.getpid(), signal.SIGINT)
        super().partial(text, timing)


def test_what_was_captured_before_ctrl_c_is_still_read(card: "FakeSounddevice") -> None:
    with pipe_of(bytes(2 * 24_000), ends=False) as pipe:
        time.sleep(0.2)  # all of it is in the pipe
        _, timing, interrupted = stream(PipeSource(16_000, pipe), ToyOptions(), Impatient())
    assert (interrupted, round(timing.audio_seconds, 3)) == (True, 1.5)
    _, timing, interrupted = stream(MicrophoneSource(), ToyOptions(), Impatient())
    assert (interrupted, round(timing.audio_seconds, 3)) == (True, 1.0)


def test_a_pipe_that_never_rests_is_left_after_ctrl_c() -> None:
    with pipe_of(bytes(32_000 * 60), ends=False) as pipe:
        _, timing, interrupted = stream(PipeSource(16_000, pipe), ToyOptions(), Impatient())
    assert interrupted
    assert timing.audio_seconds < 3


@contextmanager
def pipe_of(data: bytes, *, ends: bool) -> Iterator[BinaryIO]:
    """The end of a pipe into which `data` is written, and which `ends` then, or stays open."""
    theirs, ours = os.pipe()
    done = threading.Event()

    def write_all() -> None:
        with suppress(BrokenPipeError), open(ours, "wb") as file:  # it may be left before its end
            file.write(data)
            file.flush()
            if not ends:
                done.wait(60)

    writer = threading.Thread(target=write_all)
    writer.start()
    with open(theirs, "rb") as file:
        yield file
    done.set()
    writer.join()


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
        def blocks(self, stop: threading.Event) -> Generator[Block, None, None]:
            for number, block in enumerate(super().blocks(stop)):
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
        self.mono = True  # whether it can be opened with one channel
        self.active = False  # after the last block the device is gone
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

    def check_input_settings(self, device: object, *, samplerate: float, channels: int, **_: object) -> None:
        if samplerate != 44100 or (channels == 1 and not self.mono):
            raise PortAudioError("Invalid sample rate")

    def InputStream(self, *, callback: Any, blocksize: int, **chosen: Any) -> "FakeSounddevice":
        self.opened = chosen | {"blocksize": blocksize}
        for number, start in enumerate(range(0, len(self.audio), blocksize)):
            data = self.audio[start : start + blocksize, None] * np.array([1.0, 0.5], np.float32)[: chosen["channels"]]
            callback(data, len(data), None, SimpleNamespace(input_overflow=number == 2))
        return self

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


def test_a_microphone_that_is_stereo_alone_is_mixed_down(card: FakeSounddevice) -> None:
    card.mono = False
    source = MicrophoneSource()
    heard: list[np.ndarray] = []
    with pytest.raises(AsrError, match="microphone stopped"):
        heard.extend(block.samples for block in source.blocks(NEVER))
    assert card.opened["channels"] == 2
    assert np.concatenate(heard) == pytest.approx(np.full(44_100, 0.075))


def test_a_microphone_that_falls_silent_is_told(card: FakeSounddevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.stream._DEAD_SECONDS", 0.1)
    card.active = True  # so it says, but no more audio comes
    with pytest.raises(AsrError, match="still plugged in"):
        list(MicrophoneSource().blocks(NEVER))


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


# ---- a microphone that really is one to PortAudio: what is played into a PulseAudio sink comes out of its monitor


class Room:
    """A PulseAudio server of its own, whose one microphone hears what `play` plays."""

    def __init__(self, folder: Path) -> None:
        self._address = f"unix:{folder / 'native'}"
        settings = f'type pulse server "{self._address}" device "room.monitor"'
        (folder / "alsa.conf").write_text(
            f"pcm.room {{ {settings} hint {{ show on }} }}\npcm.!default {{ {settings} }}"
        )
        homes = {name: str(folder) for name in ("HOME", "XDG_RUNTIME_DIR", "PULSE_RUNTIME_PATH")}
        self.environment = os.environ | homes | {"ALSA_CONFIG_PATH": str(folder / "alsa.conf")}
        modules = [
            f"module-native-protocol-unix socket={folder / 'native'} auth-anonymous=1",
            "module-null-sink sink_name=room rate=16000 channels=1",
        ]
        options = ["-n", "--daemonize=no", "--use-pid-file=no", "--exit-idle-time=-1", "--realtime=no", "--disable-shm"]
        self.log = folder / "log"
        self._server = subprocess.Popen(
            ["pulseaudio", *options, *(part for module in modules for part in ("-L", module))],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=self.log.open("w"),
        )  # fmt: skip

    def listeners(self) -> int | None:
        """How many programs listen; None where nobody answers."""
        asked = subprocess.run(
            ["pactl", "-s", self._address, "list", "short", "source-outputs"],
            capture_output=True, text=True, env=self.environment, timeout=60,
        )  # fmt: skip
        return asked.stdout.count("\n") if asked.returncode == 0 else None

    def play(self, audio: Path) -> None:
        subprocess.run(
            ["paplay", f"--server={self._address}", "--device=room", audio],
            env=self.environment, check=True, timeout=60,
        )  # fmt: skip

    def pull_the_plug(self) -> None:
        self._server.kill()
        self._server.wait()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    try:
        import sounddevice  # noqa: F401
    except (ImportError, OSError) as error:
        pytest.skip(f"needs the extra [mic] and PortAudio: {error}")
    plugins = list(Path("/usr/lib").glob("*/alsa-lib/libasound_module_pcm_pulse.so"))
    if not (plugins and all(shutil.which(program) for program in ("pulseaudio", "pactl", "paplay"))):
        pytest.skip("needs PulseAudio (Debian: pulseaudio, pulseaudio-utils, libasound2-plugins)")
    room = Room(tmp_path)
    try:
        if not within(20, lambda: room.listeners() is not None):
            pytest.skip(f"PulseAudio could not be started: {room.log.read_text()[-300:]}")
        yield room
    finally:
        room.pull_the_plug()


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_a_real_microphone_is_heard_until_ctrl_c_or_until_it_is_unplugged(room: Room) -> None:
    sample = Path(__file__).parents[1] / "scripts" / "samples" / "audio" / "00003.flac"
    command = [sys.executable, "-m", "pipelines.cli", "stream", "--device", "room", "--decoding", "beam"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    listening = [subprocess.Popen(command, env=room.environment, **pipes) for _ in range(2)]
    try:
        assert within(90, lambda: room.listeners() == 2)
        room.play(sample)
        time.sleep(2)
        listening[0].send_signal(signal.SIGINT)
        heard, told = listening[0].communicate(timeout=30)
        room.pull_the_plug()
        heard_too, told_too = listening[1].communicate(timeout=30)
    finally:
        for process in listening:
            process.kill()
    assert (listening[0].returncode, listening[1].returncode) == (0, 1)
    assert "the microphone stopped; is it still plugged in?" in told_too
    if "blocks lost" in told + told_too:
        pytest.skip("the computer was too busy to hear everything")
    # It is not the same audio: it starts elsewhere in a block, after another silence.
    file = Recognizer.load(decoding="beam").transcribe(sample, network="streaming").text
    assert len(file.split()) == 7
    assert count_errors(file, heard).wer <= 2 / 7
    assert count_errors(file, heard_too).wer <= 2 / 7
