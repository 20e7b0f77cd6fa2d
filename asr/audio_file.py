"""Audio files as they are: what libsndfile or ffmpeg reads from them, checked against what they declare."""

import math
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from asr.errors import AudioError

_LOST_SECONDS = 0.3  # MP3 may promise a frame or two (72 ms at 8 kHz) too many; more is a damaged file
_SEEK_LEAD_SECONDS = 1.0  # decoded and dropped before an offset: MP3 and Opus need what came before
_SPHERE_HEADER = 1024  # bytes
_LOST_BYTES = 64  # some writers count the header in the data chunk's size
_MOST_CHUNKS = 1000  # of a WAV file; one that was allocated and never written is zeros, which look like chunks
_UNKNOWN = 1 << 60  # frames or bytes: 2^63 - 1, or nearly, is declared where a header leaves them open
_DAMAGED = "{path}: truncated or damaged: decoding stopped after {seconds:.2f} s: {reason}"
_FFMPEG_HINT = "M4A, AAC, WebM and video need ffmpeg, which is not installed"
_FFMPEG_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,ogg,aac,asf,amr,mp3,flac,wav,avi,mpegts,flv,w64,caf,aiff,au,mpeg,wv,ac3"
)


def open_audio(path: str | Path) -> "_SoundFile | _Ffmpeg":
    """Open a file with the decoder that knows it; `close` it.

    Returns:
        What tells `rate` (Hz) and `channels`, and gives samples by `skip` and `read`.

    Raises:
        AudioError: it is not a file, not audio, or holds less than it declares.
    """
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
    """Compare what a file declares with the bytes that it has, where libsndfile does not.

    It does not of WAV, RF64, W64, AIFF, AU, SPHERE and Ogg. Returns `file`, or a view of it where a writer into a pipe
    left the size of the audio at 0.
    """
    file.seek(0)
    head = file.read(12).ljust(12, b"\0")
    kind, _, form = struct.unpack("4s4s4s", head)
    lost, view = 0, file
    if form in (b"WAVE", b"AIFF", b"AIFC"):
        start, length = _audio_chunk(file, size, header=">4sI" if kind in (b"FORM", b"RIFX") else "<4sI")
        there = size - start
        # Other such writers leave the most that 32 or 31 bits can hold; libsndfile understands them.
        if not (0xFFFF_F000 <= length <= 0xFFFF_FFFF or 0x7FFF_F000 <= length <= 0x7FFF_FFFF):
            lost = length - there if length - there > _LOST_BYTES else 0
        if kind == b"RIFF" and length == 0 and there > 0:
            file.seek(start)
            if not file.read(4).isalpha():  # letters: the next chunk, after no audio at all
                view = _WithDataSize(file, start - 4, there)
    elif kind == b"riff":  # Sony's Wave64: its chunks have GUIDs for names, and count their headers
        file.seek(40)
        start, length = _audio_chunk(file, size, header="<4s12xQ", counted=24, multiple=8)
        lost = start + length - size if length < _UNKNOWN else 0
    elif kind in (b".snd", b"dns."):
        start, length = struct.unpack(">4xII" if kind == b".snd" else "<4xII", head)
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


def _audio_chunk(file: FileIO, size: int, header: str, counted: int = 0, multiple: int = 2) -> tuple[int, int]:
    """Where the audio of a WAV, W64 or AIFF file begins, and how many bytes it declares; (0, 0): not found.

    Args:
        size: of the file, bytes.
        header: of a chunk, as of struct: its name and length.
        counted: bytes of the header that the length includes.
        multiple: of so many bytes each chunk is filled up to.
    """
    width = struct.calcsize(header)
    long_size = 1 << 63  # of RF64's data, from its ds64 chunk
    for _ in range(_MOST_CHUNKS):
        if len(chunk := file.read(width)) < width:
            break
        name, length = struct.unpack(header, chunk)
        start, length = file.tell(), max(length - counted, 0)
        if name == b"ds64":
            long_size = int.from_bytes(file.read(16)[8:], "little")
        if name in (b"data", b"SSND"):
            return start, long_size if length == 0xFFFF_FFFF and long_size < 1 << 63 else length
        file.seek(min(start + length + -length % multiple, size))
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
        self.frames = frames if frames < _UNKNOWN else None
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
