"""Audio in: any file, rate or sample type becomes blocks of mono float32 at one rate."""

import logging
import math
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from asr.audio_file import open_audio
from asr.errors import AudioError

SAMPLE_RATE = 16_000
EDGE_SILENCE_SECONDS = 0.25  # before and after every utterance and stream: short words need frames
LOWEST_RATE, HIGHEST_RATE = 8_000, 192_000  # Hz

_MOST_CHANNELS = 32
_LOUDEST_FLOAT = 32.0  # float samples past +30 dB of full scale are integers that nobody scaled
_RUN_UP_SECONDS, _PERIOD_SECONDS = 0.1, 1.0  # of a resampler's streams: soxr forgets, and lags, by less than 0.1 s

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
    with closing(open_audio(path)) as source:
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
