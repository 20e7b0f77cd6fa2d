"""Where an utterance ends: cuts in a stream of samples."""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import log10

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.decoding.sound import frame_energies
from asr.errors import ConfigError
from asr.vad import FRAME, UNIT, UNIT_FRAMES, VADS, open_detector

_NOTHING = np.zeros(0, np.float32)
_SEARCH = 5 * SAMPLE_RATE  # samples: a forced cut falls into so much audio before the limit


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """When a segment ends. Times in seconds, in steps of 0.1 s; docs/live.md shows what each rule does.

    Attributes:
        trailing_silence: of a pause after speech; the cut falls into the middle half of so much silence.
        leading_silence: of a segment in which nothing was said yet; what follows then starts a new one.
        max_segment: no segment is longer; such a cut falls on the quietest 10 ms of the last 5 s, and, live, between
            two words.
        vad: what tells speech from silence: "energy", or "silero" (extra [vad]).
        blanks: whether the streaming network takes part, live. It must have written nothing where a pause is cut;
            and where it has written nothing for twice as long as a pause, it is one, whatever sounds there.
        reset: whether the streaming network forgets voice and room in a pause that it cuts. Kept, they help with
            sentences; networks that were trained on single words read those better without.
    """

    trailing_silence: float = 0.8
    leading_silence: float = 5.0
    max_segment: float = 30.0
    vad: str = "energy"
    blanks: bool = True
    reset: bool = False

    def __post_init__(self) -> None:
        if not 0.2 <= self.trailing_silence <= 10:
            raise ConfigError(f"trailing_silence = {self.trailing_silence!r}: must be 0.2 to 10 s")
        if not self.trailing_silence <= self.leading_silence <= 3600:
            raise ConfigError(f"leading_silence = {self.leading_silence!r}: must be trailing_silence to 3600 s")
        if not max(2.0, self.trailing_silence) <= self.max_segment <= 300:
            raise ConfigError(f"max_segment = {self.max_segment!r}: must be 2 to 300 s and at least trailing_silence")
        if self.vad not in VADS:
            raise ConfigError(f"vad = {self.vad!r}: must be {' or '.join(VADS)}")


class Endpointer:
    """Cuts a stream into segments; the cuts do not depend on how the samples were handed in.

    Memory is constant.

    Raises:
        ConfigError: the voice activity detector is not installed.
    """

    def __init__(self, config: EndpointConfig | None = None) -> None:
        config = config or EndpointConfig()
        self._trailing = max(2, round(config.trailing_silence * SAMPLE_RATE / UNIT))  # units
        self._leading = round(config.leading_silence * SAMPLE_RATE)
        self._max = round(config.max_segment * SAMPLE_RATE)
        self._search = min(_SEARCH, self._max // 2)
        self._kept = self.lookback // UNIT  # units
        self._detector = open_detector(config.vad, self._trailing)
        self._blanks = config.blanks
        self.paused = False  # whether there was a pause when it was last decided, so also at the last cut
        self._rest = _NOTHING  # samples of an unfinished unit
        self._energies: list[float] = []  # of its frames, where they were given
        self._levels: deque[array[float]] = deque()  # dB of the frames that a cut may fall on, unit by unit
        self._now = 0  # samples judged
        self._last_cut = 0
        self._spoken = False  # since the last cut

    @property
    def lookback(self) -> int:
        """A cut lies at most so many samples before the end of what was accepted when it is found."""
        return max(self._search, self._trailing * UNIT) + 2 * UNIT

    def accept(
        self, samples: np.ndarray, written: int | None = None, energies: Sequence[float] | None = None
    ) -> list[int]:
        """Take float32 (n,) at 16 kHz, also n = 0; return new cuts as positions in the stream, in samples.

        Cuts ascend; each is above 0 and at most at the end of what was accepted.

        Args:
            samples: what follows; with `written` to the end of a unit of 100 ms at most.
            written: where the last thing that the streaming network wrote so far ends, in samples; None: without.
            energies: of the frames of 10 ms that end in these samples, from a caller who always has them.
        """
        if len(self._rest):
            samples = np.concatenate([self._rest, samples])
        whole = len(samples) // UNIT * UNIT
        self._rest = samples[whole:].copy() if whole < len(samples) else _NOTHING
        self._energies += frame_energies(samples[:whole]).tolist() if energies is None else energies
        cuts: list[int] = []
        for start in range(0, whole, UNIT):
            self._now += UNIT
            levels = [10 * log10(energy / FRAME + 1e-9) for energy in self._energies[:UNIT_FRAMES]]
            del self._energies[:UNIT_FRAMES]
            self._levels.append(array("d", levels))
            if len(self._levels) > self._kept:
                self._levels.popleft()
            span = self._judge(self._detector.accept(samples[start : start + UNIT], levels), written)
            if span is not None:
                self._last_cut = self._quietest(*span)
                self._spoken = False
                cuts.append(self._last_cut)
        return cuts

    def _quietest(self, start: int, end: int) -> int:
        """The middle of the quietest frame between two positions, in samples."""
        levels = list(chain.from_iterable(self._levels))
        first = self._now // FRAME - len(levels)  # frame number of levels[0]
        frames = range(start // FRAME, end // FRAME)
        return min(frames, key=lambda frame: levels[frame - first]) * FRAME + FRAME // 2

    def _judge(self, quiet: int, written: int | None) -> tuple[int, int] | None:
        """Apply the rules after `quiet` units without voice; return the span of samples to cut in, if one ends here."""
        self._spoken |= quiet == 0
        length = self._now - self._last_cut
        silence = self._trailing * UNIT
        self.paused, spoken = quiet >= self._trailing, self._spoken
        if written is not None and self._blanks:
            blank = self._now - max(written, self._last_cut)
            if self.paused:
                self.paused = blank >= silence * 3 // 4
            else:
                self.paused, spoken = blank >= 2 * silence, written > self._last_cut
        if self.paused and length >= silence and (spoken or length >= self._leading):
            return self._now - silence * 3 // 4, self._now - silence // 4
        if length + UNIT > self._max:  # else what follows might be too long before it is judged, or end there
            return self._now - self._search, self._now
        return None
