"""Audio in: any file, rate or sample type becomes blocks of mono float32 at one rate."""

import logging
import math
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import closing
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from asr.errors import AudioError

SAMPLE_RATE = 16_000
EDGE_SILENCE_SECONDS = 0.25  # before and after every utterance and stream: short words need frames
LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000  # Hz

_MOST_CHANNELS = 32
_LOUDEST_FLOAT = 32.0  # float samples past +30 dB of full scale are integers that nobody scaled
_LOST_SECONDS = 0.3  # MP3 may promise a frame or two (72 ms at 8 kHz) too many; more is a damaged file
_SEEK_LEAD_SECONDS = 1.0  # decoded and dropped before an offset: MP3 and Opus need what came before
_SPHERE_HEADER = 1024  # bytes
_LOST_BYTES = 64  # some writers count the header in the data chunk's size
_MOST_CHUNKS = 1000  # of a WAV file; one that was allocated and never written is zeros, which look like chunks
_UNKNOWN_FRAMES = 1 << 60  # libsndfile declares 2^63 - 1 frames where a header leaves them open
_RUN_UP_SECONDS, _PERIOD_SECONDS = 0.1, 1.0  # of a resampler's streams: soxr forgets, and lags, by less than 0.1 s
_DAMAGED = "{path}: truncated or damaged: decoding stopped after {seconds:.2f} s: {reason}"
_FFMPEG_HINT = "M4A, AAC, WebM and video need ffmpeg, which is not installed"

_log = logging.getLogger("asr")
_said_mixed_down = False


def to_float(samples: np.ndarray) -> np.ndarray:
    """Return `samples` as mono float32 (n,) in [-1, 1]; those that are so already, uncopied.

    Args:
        samples: int16, float32 or float64, (n,) or (n, channels); channels are averaged, floats are clipped.

    Raises:
        AudioError: another type or shape, NaN or infinity, or floats that were never scaled to [-1, 1].
    """
    samples = np.asarray(samples)
    if samples.dtype.type not in (np.int16, np.float32, np.float64):
        raise AudioError(f"samples are {samples.dtype}; give int16, or float32 in [-1, 1]")
    if samples.ndim not in (1, 2) or (samples.ndim == 2 and not 1 <= samples.shape[1] <= _MOST_CHANNELS):
        raise AudioError(f"samples have shape {samples.shape}; give (n,) or (n, channels)")
    if samples.dtype.type is np.int16:
        peak = 1.0
        floats = np.multiply(samples, np.float32(2**-15), dtype=np.float32)
    else:
        peak = float(np.maximum.reduce(np.abs(samples), axis=None, initial=0))
        if not math.isfinite(peak):
            raise AudioError("samples hold NaN or infinity")
        if peak > _LOUDEST_FLOAT:
            raise AudioError(f"float samples reach {peak:g}; scale them to [-1, 1], or give int16")
        floats = samples.astype(np.float32, copy=False)
    if floats.ndim == 2:
        floats = floats.mean(axis=1, dtype=np.float32)
    return np.clip(floats, -1, 1) if peak > 1 else floats


class Resampler:
    """Changes the rate of a stream; blocks of any size give the same samples as the whole at once.

    Output is clipped to [-1, 1] and lags the input by less than 0.1 s until `finish`. What soxr knows of a stream
    cannot be copied. So each stream of soxr reads a few seconds, and the next one takes over with a run-up:
    the blocks since then are all the state there is (see asr.snapshot).

    Args:
        source_rate: of what goes in, 8000 to 192000 Hz.
        target_rate: of what comes out, within the same limits; equal rates pass samples through.

    Raises:
        AudioError: a rate outside the limits.
    """

    shared = ("_stream",)

    def __init__(self, source_rate: int, target_rate: int = SAMPLE_RATE) -> None:
        for rate in (source_rate, target_rate):
            if not LOWEST_RATE <= rate <= HIGHEST_RATE or rate % 1:
                raise AudioError(f"sample rate {rate} Hz; {LOWEST_RATE} to {HIGHEST_RATE} Hz can be read")
        self._rates = (int(source_rate), int(target_rate))
        units = math.gcd(*self._rates)  # a second; a unit holds a whole number of samples of both rates
        self._unit = [rate // units for rate in self._rates]
        self._run_up, self._period = (math.ceil(s * units) for s in (_RUN_UP_SECONDS, _PERIOD_SECONDS))
        self._stream: Any = None
        self._given: list[np.ndarray] = []  # blocks that the present stream was given
        self._came = 0  # samples that came from it
        self._from, self._until = 0, self._period * self._unit[1]  # those of them that are handed out
        self._next = (self._period - self._run_up) * self._unit[0]  # in what was given: the next stream's first sample

    def process(self, samples: np.ndarray) -> np.ndarray:
        """Take float32 (n,), also n = 0, and return what is ready, float32 (m,)."""
        if self._rates[0] == self._rates[1]:
            return samples
        size = self._run_up * self._unit[0]  # no more at once, so that a stream reads little past its end
        return self._joined([self._push(samples[start : start + size]) for start in range(0, len(samples), size)])

    def finish(self) -> np.ndarray:
        """Return the rest, float32 (m,); the stream is over then."""
        if self._rates[0] == self._rates[1]:
            return np.zeros(0, np.float32)
        nothing = np.zeros(0, np.float32)
        ready = [self._hand_out(self._soxr().resample_chunk(nothing, last=True))]
        while self._came > self._until:
            ready += [self._take_over(), self._hand_out(self._soxr().resample_chunk(nothing, last=True))]
        return self._joined(ready)

    def _push(self, block: np.ndarray) -> np.ndarray:
        ready = self._hand_out(self._soxr().resample_chunk(block))
        self._given.append(block)
        return self._joined([ready, self._take_over()]) if self._came >= self._until else ready

    def _hand_out(self, output: np.ndarray) -> np.ndarray:
        first, self._came = self._came, self._came + len(output)
        return output[max(0, self._from - first) : max(0, self._until - first)]

    def _take_over(self) -> np.ndarray:
        """Go on with a new stream; its first output is that of its run-up, and not handed out."""
        run_up = np.concatenate(self._given)[self._next :]
        self._stream, self._given, self._came = None, [], 0
        self._from = self._run_up * self._unit[1]
        self._until = self._from + self._period * self._unit[1]
        self._next = self._period * self._unit[0]
        return self._push(run_up)

    def _soxr(self) -> Any:
        """The present stream; one that was lost on the way through bytes is given its blocks again."""
        if self._stream is None:
            import soxr

            self._stream = soxr.ResampleStream(*self._rates, 1, dtype="float32")
            for block in self._given:
                self._stream.resample_chunk(block)
        return self._stream

    @staticmethod
    def _joined(ready: list[np.ndarray]) -> np.ndarray:
        joined = ready[0] if len(ready) == 1 else np.concatenate([np.zeros(0, np.float32), *ready])
        return np.clip(joined, -1, 1)


def audio_blocks(
    path: str | Path,
    *,
    sample_rate: int = SAMPLE_RATE,
    block_seconds: float = 10.0,
    offset: float = 0.0,
    duration: float | None = None,
) -> Generator[np.ndarray, None, None]:
    """Yield a file as blocks of mono float32 (n,) in [-1, 1], in constant memory for a file of any length.

    The blocks joined are the same samples whatever `block_seconds` is. Closing the generator closes the file.

    Args:
        path: any format that libsndfile reads, or ffmpeg where it is installed.
        sample_rate: of the blocks, Hz.
        block_seconds: length decoded at a time; a block may be somewhat longer or shorter.
        offset: where to start, seconds.
        duration: how much to read, seconds; None, or past the end, reads to the end.

    Raises:
        AudioError: names the file and what is wrong with it.
    """
    if not 0 <= offset < math.inf or (duration is not None and not duration > 0):
        raise AudioError(f"{path}: cannot read {duration} s from second {offset}")
    with closing(_open(path)) as source:
        rate = source.rate
        try:
            resampler = Resampler(rate, sample_rate)
        except AudioError as error:
            raise AudioError(f"{path}: {error}") from None
        if source.channels > 1:
            _say_mixed_down(path, source.channels)
        position = first = round(offset * rate)
        stop = math.inf if duration in (None, math.inf) else first + max(1, round(duration * rate))
        source.skip(first)
        while position < stop:
            block = source.read(int(min(max(1, round(block_seconds * rate)), stop - position)))
            if not len(block):
                break
            try:
                mono = to_float(block)
            except AudioError as error:
                raise AudioError(f"{path}: {error}, near {position / rate:.2f} s") from None
            position += len(block)
            resampled = resampler.process(mono)
            if len(resampled):
                yield resampled
        if position == first:
            raise AudioError(f"{path}: " + (f"ends before {offset:g} s" if first else "holds no samples"))
        rest = resampler.finish()
        if len(rest):
            yield rest


def read_audio(
    path: str | Path, *, sample_rate: int = SAMPLE_RATE, offset: float = 0.0, duration: float | None = None
) -> np.ndarray:
    """Return a file, or a part of it, as mono float32 (n,): exactly what `audio_blocks` yields, joined."""
    blocks = audio_blocks(path, sample_rate=sample_rate, offset=offset, duration=duration)
    return np.concatenate([np.zeros(0, np.float32), *blocks])  # a few samples may come to none at another rate


def _say_mixed_down(path: str | Path, channels: int) -> None:
    global _said_mixed_down
    if not _said_mixed_down:
        _said_mixed_down = True
        _log.warning("%s: %d channels mixed down to one; said once, for all files", path, channels)


def _open(path: str | Path) -> "_SoundFile | _Ffmpeg":
    """Open `path` with the decoder that knows it."""
    if "://" in str(path):
        raise AudioError(f"{path}: a URL; download it and give the file")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise AudioError(f"{path}: is a folder, not a recording")
        if not stat.S_ISREG(status.st_mode):
            raise AudioError(f"{path}: not a regular file")
        if status.st_size == 0:
            raise AudioError(f"{path}: empty, 0 bytes")
        # Unbuffered, because libsndfile reads the same descriptor.
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the decoder closes it)
    except FileNotFoundError:
        raise AudioError(f"{path}: no such file") from None
    except PermissionError:
        raise AudioError(f"{path}: no permission to read it") from None
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot be opened: {error}") from None
    try:
        head = file.read(16)
        view = _checked(path, file, status.st_size)
        try:
            return _SoundFile(path, file, view)
        except AudioError:
            if head[8:12] in (b"WAVE", b"AIFF", b"AIFC") or head[:4] in (b"fLaC", b"caff"):
                raise  # libsndfile knows the format: ffmpeg would only hide the damage
        file.close()
        return _Ffmpeg(path)
    except BaseException:
        file.close()
        raise


def _checked(path: str | Path, file: FileIO, size: int) -> FileIO:
    """Compare what a WAV, RF64, AIFF, AU, SPHERE or Ogg file declares with the bytes that it has; libsndfile does not.

    Returns `file`, or a view of it where a writer into a pipe left the size of the audio at 0.
    """
    file.seek(0)
    head = file.read(12).ljust(12, b"\0")
    kind, _, form = struct.unpack("4s4s4s", head)
    lost, view = 0, file
    if form in (b"WAVE", b"AIFF", b"AIFC"):
        start, length = _audio_chunk(file, header=">4sI" if kind == b"FORM" else "<4sI")
        there = size - start
        # Other such writers leave the most that 32 or 31 bits can hold; libsndfile understands them.
        if not (0xFFFF_F000 <= length <= 0xFFFF_FFFF or 0x7FFF_F000 <= length <= 0x7FFF_FFFF):
            lost = length - there if length - there > _LOST_BYTES else 0
        if kind == b"RIFF" and length == 0 and there > 0:
            file.seek(start)
            if not file.read(4).isalpha():  # letters: the next chunk, after no audio at all
                view = _WithDataSize(file, start - 4, there)
    elif kind == b".snd":
        start, length = struct.unpack(">4xII", head)
        lost = start + length - size if length != 0xFFFF_FFFF else 0
    elif head.startswith(b"NIST_1A"):
        file.seek(0)
        told = {key: int(n) for key, n in re.findall(rb"^(\w+) -i (\d+)$", file.read(4096), re.MULTILINE)}
        values = [told.get(name, 0) for name in (b"sample_count", b"channel_count", b"sample_n_bytes")]
        lost = _SPHERE_HEADER + math.prod(values) - size
    elif kind == b"OggS":
        lost = _bytes_lost_of_page(file, size)
    if lost > 0:
        raise AudioError(f"{path}: truncated: {lost} bytes are missing; copy or download it again")
    view.seek(0)
    return view


def _audio_chunk(file: FileIO, header: str) -> tuple[int, int]:
    """Where the audio of a WAV or AIFF file begins, and how many bytes it declares; (0, 0): not found."""
    long_size = 1 << 63  # of RF64's data, from its ds64 chunk
    for _ in range(_MOST_CHUNKS):
        if len(chunk := file.read(8)) < 8:
            break
        name, length = struct.unpack(header, chunk)
        start = file.tell()
        if name == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if name in (b"data", b"SSND"):
            return start, long_size if length == 0xFFFF_FFFF and long_size < 1 << 63 else length
        file.seek(start + length + length % 2)
    return 0, 0


class _WithDataSize(FileIO):
    """A WAV file read as if its header, at byte `at`, told how much audio follows."""

    def __init__(self, file: FileIO, at: int, size: int) -> None:
        super().__init__(file.fileno(), closefd=False)
        self._at, self._size = at, struct.pack("<I", min(size, 0xFFFF_FFFF))

    def readinto(self, buffer: Any) -> int:
        start = self.tell()
        count = super().readinto(buffer) or 0
        for place, byte in enumerate(self._size, self._at - start):
            if 0 <= place < count:
                memoryview(buffer).cast("B")[place] = byte
        return count


def _bytes_lost_of_page(file: FileIO, size: int) -> int:
    """How much of an Ogg file's last page is cut off."""
    file.seek(max(0, size - 65_307))  # the longest page
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    segments = page[26] if len(page) > 26 else 0
    return 27 + segments + sum(page[27 : 27 + segments]) - len(page)


class _SoundFile:
    """A file that libsndfile decodes."""

    def __init__(self, path: str | Path, file: FileIO, view: FileIO) -> None:
        import soundfile

        self._path, self._file, self._error = path, file, soundfile.LibsndfileError
        try:
            # By descriptor: by name, libsndfile takes any .raw, .vox or .gsm file for headerless audio.
            self._sound = soundfile.SoundFile(file.fileno() if view is file else view, closefd=False)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{path}: not audio, or damaged: {error.error_string}") from None
        self._seekable = self._sound.seekable()  # GSM and ADPCM are not
        # soundfile would seek after each read: it fails in FLAC of unknown length and clicks in VBR MP3.
        self._sound.seekable = lambda: False
        self.rate, self.channels = self._sound.samplerate, self._sound.channels
        frames = self._sound.frames
        self.frames = frames if frames < _UNKNOWN_FRAMES else None
        self._position = 0

    def skip(self, frames: int) -> None:
        """Go to frame `frames`; past the end, to the end."""
        # libsndfile lands a window off in Vorbis (its issue 885): what comes before is decoded and dropped.
        if frames and self.frames is not None and self._seekable and self._sound.subtype != "VORBIS":
            seek = max(0, min(frames, self.frames) - round(_SEEK_LEAD_SECONDS * self.rate))
            try:
                self._position = self._sound.seek(seek)
            except self._error as error:
                raise self._damaged(error.error_string) from None
        while self._position < frames and len(self.read(min(frames - self._position, self.rate))):
            pass

    def read(self, frames: int) -> np.ndarray:
        """Return the next float32 (n, channels), n <= frames; n = 0 at the end."""
        if self.frames is not None and self._sound.format == "FLAC":
            frames = min(frames, self.frames - self._position)  # behind them may be a tag, which is no FLAC
        try:
            block = self._sound.read(frames, dtype="float32", always_2d=True)
        except self._error as error:
            raise self._damaged(error.error_string) from None
        self._position += len(block)
        lost = 0 if self.frames is None else self.frames - self._position
        if len(block) < frames and lost > _LOST_SECONDS * self.rate:
            raise self._damaged(f"the file declares {lost / self.rate:.2f} s more")
        return block

    def close(self) -> None:
        self._sound.close()
        self._file.close()

    def _damaged(self, reason: str) -> AudioError:
        return AudioError(_DAMAGED.format(path=self._path, seconds=self._position / self.rate, reason=reason))


_FFMPEG_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,aac,asf,amr,mp3,flac,wav,avi,mpegts,flv,w64,caf,aiff,au,mpeg,wv,ac3"
)


class _Ffmpeg:
    """A file that an ffmpeg process decodes into a pipe, at its own rate and with its own channels."""

    frames = None  # unknown until the end

    def __init__(self, path: str | Path) -> None:
        program = shutil.which("ffmpeg")
        if program is None:
            raise AudioError(f"{path}: not audio, or of a kind that libsndfile does not read: {_FFMPEG_HINT}")
        self._path = path
        # Not a pipe, which could fill up and stop the process.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        # Sun AU is the simplest header that tells rate and channels. The name goes in as "file:", so that no
        # name is taken for an option or an address, and nothing that names other files (a playlist) is opened.
        allowed = ["-protocol_whitelist", "file", "-format_whitelist", _FFMPEG_FORMATS]
        source = ["-nostdin", "-v", "error", "-xerror", *allowed, "-i", f"file:{path}"]
        target = ["-map", "0:a:0", "-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
        self._process = subprocess.Popen(
            [program, *source, *target],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._messages,
        )
        assert self._process.stdout is not None
        self._pipe = self._process.stdout
        self._position = 0
        header = self._pipe.read(24)
        if len(header) < 24:
            reason = self._message()
            self.close()
            raise AudioError(f"{path}: not audio, or damaged; ffmpeg says: {reason}")
        _, start, _, _, self.rate, self.channels = struct.unpack(">6I", header)
        self._pipe.read(start - 24)

    def skip(self, frames: int) -> None:
        """Go to frame `frames`; past the end, to the end."""
        while self._position < frames and len(self.read(min(frames - self._position, self.rate))):
            pass

    def read(self, frames: int) -> np.ndarray:
        """Return the next float32 (n, channels), n <= frames; n = 0 at the end."""
        frame_bytes = 4 * self.channels
        data = self._pipe.read(frames * frame_bytes)
        block = np.frombuffer(data, ">f4", len(data) // frame_bytes * self.channels)
        self._position += len(block) // self.channels
        if len(data) < frames * frame_bytes:
            message = self._message()
            # Of a Matroska file cut short, ffmpeg complains with status 0.
            if self._process.returncode != 0 or "prematurely" in message:
                seconds, reason = self._position / self.rate, f"ffmpeg says: {message}"
                raise AudioError(_DAMAGED.format(path=self._path, seconds=seconds, reason=reason))
        return block.astype(np.float32).reshape(-1, self.channels)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._messages.close()

    def _message(self) -> str:
        """What the process, once it ended, complained of first."""
        self._process.wait()
        self._messages.seek(0)
        first = self._messages.readline().decode(errors="replace").strip()
        return "it holds no audio" if "matches no streams" in first else re.sub(r"^(\[[^]]*\] ?)+", "", first)
