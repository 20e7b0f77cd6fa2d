"""Where an utterance ends: cuts in a stream of samples, from energy alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.errors import ConfigError

_FRAME = SAMPLE_RATE // 100  # samples: levels are measured over 10 ms
_UNIT_FRAMES = 10
_UNIT = _UNIT_FRAMES * _FRAME  # samples: every 100 ms it is decided whether to cut
_MEMORY = 100  # units: noise floor and speech level are those of the last 10 s
_SEARCH = 5 * SAMPLE_RATE  # samples: a forced cut falls into so much audio before the limit
_MARGIN = 5.0  # dB: speech is at least so far above the noise, and its loudest at least twice so far


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """When a segment ends. All in seconds; steps of 0.1 s.

    Attributes:
        trailing_silence: of a pause after speech; the cut falls into the middle half of so much silence.
        leading_silence: of a segment in which nothing was said yet; what follows then starts a new one.
        max_segment: no segment is longer; such a cut falls on the quietest 10 ms of the last 5 s.
    """

    trailing_silence: float = 0.8
    leading_silence: float = 5.0
    max_segment: float = 30.0

    def __post_init__(self) -> None:
        if not 0.2 <= self.trailing_silence <= 10:
            raise ConfigError(f"trailing_silence = {self.trailing_silence!r}: must be 0.2 to 10 s")
        if not self.trailing_silence <= self.leading_silence:
            raise ConfigError(f"leading_silence = {self.leading_silence!r}: must be at least trailing_silence")
        if not max(2.0, self.trailing_silence) <= self.max_segment <= 300:
            raise ConfigError(f"max_segment = {self.max_segment!r}: must be 2 to 300 s and at least trailing_silence")


class Endpointer:
    """Cuts a stream into segments; the cuts do not depend on how the samples were handed in.

    Silence is judged relative to the recording: a unit of 100 ms is quiet when it stays close to the noise
    floor, which is a low quantile over 10 s or, where a pause has a steady noise of its own, the level of the
    pause itself, and well below the speech. Memory is constant.
    """

    def __init__(self, config: EndpointConfig | None = None) -> None:
        config = config or EndpointConfig()
        self._trailing = max(2, round(config.trailing_silence * SAMPLE_RATE / _UNIT))  # units
        self._leading = round(config.leading_silence * SAMPLE_RATE)
        self._max = round(config.max_segment * SAMPLE_RATE)
        self._search = min(_SEARCH, self._max // 2)
        self._rest = np.zeros(0, np.float32)  # samples of an unfinished unit
        self._levels = np.zeros(0, np.float32)  # dB of the frames that a cut may fall on
        self._now = 0  # samples judged
        self._last_cut = 0
        self._spoken = False  # since the last cut
        self._lows: list[float] = []  # dB of the last units
        self._highs: list[float] = []

    @property
    def lookback(self) -> int:
        """A cut lies at most so many samples before the end of what was accepted when it is found."""
        return max(self._search, self._trailing * _UNIT) + 2 * _UNIT

    def accept(self, samples: np.ndarray) -> list[int]:
        """Take float32 (n,) at 16 kHz, also n = 0; return new cuts as positions in the stream, in samples.

        Cuts ascend; each is above 0 and at most at the end of what was accepted.
        """
        samples = np.concatenate([self._rest, samples])
        units = len(samples) // _UNIT
        self._rest = samples[units * _UNIT :].copy()
        if not units:
            return []
        frames = samples[: units * _UNIT].reshape(-1, _FRAME)
        levels = 10 * np.log10(np.square(frames).mean(axis=1) + np.float32(1e-9))
        # Single frames count for nothing: neither a click in a pause nor the gap of a plosive.
        ranked = np.sort(levels.reshape(units, _UNIT_FRAMES), axis=1)
        self._levels = np.concatenate([self._levels, levels])
        first = (self._now // _FRAME) - (len(self._levels) - len(levels))  # frame number of _levels[0]
        cuts: list[int] = []
        for low, high in zip(ranked[:, 2].tolist(), ranked[:, 7].tolist(), strict=True):
            self._now += _UNIT
            span = self._judge(low, high)
            if span is not None:
                start, end = (position // _FRAME - first for position in span)
                quietest = first + start + int(np.argmin(self._levels[start:end]))
                self._last_cut = quietest * _FRAME + _FRAME // 2
                self._spoken = False
                cuts.append(self._last_cut)
        self._levels = self._levels[-(self.lookback // _FRAME) :].copy()
        return cuts

    def _judge(self, low: float, high: float) -> tuple[int, int] | None:
        """Take the levels of a unit; return the span of samples to cut in, if one ends here."""
        self._lows = [*self._lows[-_MEMORY + 1 :], low]
        self._highs = [*self._highs[-_MEMORY + 1 :], high]
        threshold = _threshold(self._lows, self._highs, self._trailing)
        self._spoken |= high >= threshold
        length = self._now - self._last_cut
        silence = self._trailing * _UNIT
        quiet = length >= silence and max(self._highs[-self._trailing :]) < threshold
        if quiet and (self._spoken or length >= self._leading):
            return self._now - silence * 3 // 4, self._now - silence // 4
        if length >= self._max:
            latest = self._last_cut + self._max
            return latest - self._search, latest
        return None


def _threshold(lows: Sequence[float], highs: Sequence[float], pause: int) -> float:
    """The level in dB from which a unit counts as speech; `pause` is how many units a pause takes."""
    floor = sorted(lows)[len(lows) // 10]
    speech = sorted(highs)[-2:][0]  # the second loudest: one slammed door is not the speech level
    if speech - floor < 2 * _MARGIN:
        return np.inf  # steady noise and nothing else
    pause_low, pause_high = min(lows[-pause:]), max(highs[-pause:])
    if pause_high - pause_low < _MARGIN:  # steadier than any speech: noise that came up in a pause
        floor = max(floor, pause_low)
    return min(floor, speech - 2 * _MARGIN) + _MARGIN
