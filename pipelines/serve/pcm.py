"""Samples out of bytes that arrive in pieces: raw PCM, and WAV files that are streamed as they lie on the disk."""

import struct
from typing import Literal

import numpy as np

from asr.errors import AudioError

Format = Literal["s16le", "f32le"]
FORMATS: tuple[Format, ...] = ("s16le", "f32le")

_DTYPES = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_MOST_HEADER = 1 << 16  # bytes: a WAV file's audio begins within them
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # WAVE format tags


class PcmReader:
    """Raw little-endian samples; pieces may cut a sample in two.

    Args:
        format: "s16le" or "f32le".
        channels: interleaved.
    """

    def __init__(self, format: Format, channels: int = 1) -> None:
        self._dtype, self._channels = _DTYPES[format], channels
        self._rest = b""

    def read(self, data: bytes) -> np.ndarray:
        """The whole samples so far: int16 or float32, (n,), or (n, channels) where there are several."""
        data = self._rest + data
        whole = len(data) - len(data) % (self._dtype.itemsize * self._channels)
        self._rest = data[whole:]
        samples = np.frombuffer(data, self._dtype, whole // self._dtype.itemsize)
        return samples if self._channels == 1 else samples.reshape(-1, self._channels)


class WavReader:
    """A WAV file of 16 bit integers or 32 bit floats."""

    def __init__(self) -> None:
        self.sample_rate: int | None = None  # Hz, known once the header has arrived
        self._head = b""
        self._pcm: PcmReader | None = None
        self._left = 0  # bytes of audio that the header declares and that have not come yet

    def read(self, data: bytes) -> np.ndarray:
        """The whole samples so far, as PcmReader gives them; none while the header is incomplete.

        Raises:
            AudioError: not a WAV file, or of a kind that is not read.
        """
        if self._pcm is None:
            self._head += data
            data = self._start()
            if self._pcm is None:
                return np.zeros(0, np.int16)
        data, self._left = data[: self._left], max(0, self._left - len(data))
        return self._pcm.read(data)

    def _start(self) -> bytes:
        """Read the header, if it is complete; return what follows it."""
        head = self._head
        if len(head) >= 12 and (head[:4] != b"RIFF" or head[8:12] != b"WAVE"):
            raise AudioError("not a WAV file: RIFF of another kind")
        at, kind = 12, b""
        while len(head) >= at + 8:
            name, length = head[at : at + 4], int.from_bytes(head[at + 4 : at + 8], "little")
            at += 8
            if name == b"data":
                self.sample_rate, self._pcm = _read_format(kind)
                # Writers into a pipe leave the length at 0 or at its most.
                self._left = length if 0 < length < 0x7FFF_F000 else 1 << 62
                self._head = b""
                return head[at:]
            if name == b"fmt ":
                kind = head[at : at + length]
            at += length + length % 2
        if max(at, len(head)) > _MOST_HEADER:
            raise AudioError("a WAV file whose audio does not begin in the first 64 KiB")
        return b""


def _read_format(kind: bytes) -> tuple[int, PcmReader]:
    """Sample rate and reader from a WAV file's chunk `fmt `."""
    if len(kind) < 16:
        raise AudioError("a WAV file that does not tell its format")
    tag, channels, rate, _, _, bits = struct.unpack("<HHIIHH", kind[:16])
    if tag == _EXTENSIBLE and len(kind) >= 26:
        tag = int.from_bytes(kind[24:26], "little")
    formats: dict[tuple[int, int], Format] = {(_PCM, 16): "s16le", (_FLOAT, 32): "f32le"}
    if (tag, bits) not in formats:
        raise AudioError(f"a WAV file of format {tag} with {bits} bits; 16 bit integers and 32 bit floats are read")
    if not 1 <= channels <= 32:
        raise AudioError(f"a WAV file of {channels} channels; 1 to 32 are read")
    return rate, PcmReader(formats[tag, bits], channels)
