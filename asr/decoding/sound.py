"""Where sound begins and ends in a recording: what the times of words are moved to."""

import math

import numpy as np

from asr.audio import SAMPLE_RATE

FRAME_SECONDS = 0.01
_FRAME = round(FRAME_SECONDS * SAMPLE_RATE)  # samples
_NOTHING = np.zeros(0, np.float32)
_PARTS = 64  # of a stream's energies: more are joined, or blocks of 10 ms would be kept as an array each
_ABOVE_NOISE, _BELOW_PEAK = 8.0, 32.0  # dB: sound is so far above the noise and no further below the peak
_CLEAR = 15.0  # dB from noise to peak: with less, its borders are not known
# smoothed frames: no shorter silence parts sounds (plosives have them within), no shorter sound counts
_PAUSE, _CLICK = 12, 5


class Levels:
    """How loud a stream is, in dB, every 10 ms; the same however its samples are handed in."""

    def __init__(self) -> None:
        self._rest = _NOTHING  # samples that fill no frame yet
        self._energies: list[np.ndarray] = []

    def accept(self, samples: np.ndarray) -> np.ndarray:
        """Take the next samples, float32 (n,) at 16 kHz; return the energies of the frames that end in them."""
        if len(self._rest):
            samples = np.concatenate([self._rest, samples])
        whole = len(samples) // _FRAME * _FRAME
        self._rest = samples[whole:].copy() if whole < len(samples) else _NOTHING
        energies = frame_energies(samples[:whole])
        self._energies.append(energies)
        if len(self._energies) > _PARTS:
            self._energies = [np.concatenate(self._energies)]
        return energies

    def take(self, seconds: float) -> np.ndarray:
        """The levels of the next `seconds`, (frames,); what follows is kept."""
        energies = np.concatenate([_NOTHING, *self._energies])
        frames = round(seconds / FRAME_SECONDS)
        self._energies = [energies[frames:].copy()]
        return 10 * np.log10(energies[:frames] * np.float32(1 / _FRAME) + np.float32(1e-10))


def frame_energies(samples: np.ndarray) -> np.ndarray:
    """The sum of squares of every 10 ms, without a microphone's offset: float32 (n,) at 16 kHz -> float32 (frames,)."""
    frames = samples.reshape(-1, _FRAME)
    sums = np.add.reduce(frames, axis=1)  # thrice as fast as `mean`
    return np.maximum(np.add.reduce(np.square(frames), axis=1) - np.square(sums) * np.float32(1 / _FRAME), 0)


def levels_of(samples: np.ndarray) -> np.ndarray:
    """The levels of a recording, (n,) at 16 kHz -> (frames,) in dB."""
    levels = Levels()
    levels.accept(samples)
    return levels.take(len(samples) / SAMPLE_RATE)


def smooth(levels: np.ndarray) -> np.ndarray:
    """The mean of each level, (frames,) in dB, and its neighbours."""
    if len(levels) < 3:
        return levels
    around = np.concatenate([levels[:1], levels, levels[-1:]], dtype=np.float64)
    return (around[:-2] + around[1:-1] + around[2:]) / 3


def sounds(smoothed: np.ndarray) -> tuple[list[float], list[float]]:
    """When sounds that are parted by pauses begin, and when they end, in seconds, of smoothed levels (frames,).

    A sound without a beginning or end in these levels has NaN for it; none where noise is nearly as loud as all else.
    """
    frames = len(smoothed)
    if frames < _PAUSE:
        return [], []
    ranked = np.sort(smoothed)
    noise, peak = _percentile(ranked, 0.10), _percentile(ranked, 0.98)
    if peak - noise < _CLEAR:
        return [], []
    loud = smoothed > max(noise + _ABOVE_NOISE, peak - _BELOW_PEAK)
    edges = (np.flatnonzero(loud[1:] != loud[:-1]) + 1).tolist()
    edges = [*([0] if loud[0] else []), *edges, *([frames] if loud[-1] else [])]
    joined: list[list[int]] = []
    for first, after in zip(edges[::2], edges[1::2], strict=True):
        if joined and first - joined[-1][1] < _PAUSE:
            joined[-1][1] = after
        else:
            joined.append([first, after])
    kept = [(first, after) for first, after in joined if after - first >= _CLICK]
    starts = [first * FRAME_SECONDS if first else math.nan for first, _ in kept]
    ends = [after * FRAME_SECONDS if after < frames else math.nan for _, after in kept]
    return starts, ends


def _percentile(ranked: np.ndarray, part: float) -> float:
    """The value below which so great a part lies, of ascending (n,): numpy's, at a tenth of the cost."""
    position = part * (len(ranked) - 1)
    below = int(position)
    low, high, share = float(ranked[below]), float(ranked[min(below + 1, len(ranked) - 1)]), position - below
    return high - (high - low) * (1 - share) if share >= 0.5 else low + (high - low) * share
