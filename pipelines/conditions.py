"""What rooms, microphones and lines do to speech: accuracy on recordings as they are, and made quiet, noisy, far."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import soxr
import torch

from asr.audio import SAMPLE_RATE
from asr.augment import filter_audio, room_response
from asr.errors import Problem
from pipelines.evaluate import Score, evaluate, total
from pipelines.transcribe import RecognizerOptions

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # (n,) at 16 kHz to as many samples

QUIET_DB = 26.0
NOISE_DB = 10.0
_LINE_RATE = 8_000


def quiet(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As of a microphone that is far away, or turned down."""
    return samples * np.float32(10 ** (-QUIET_DB / 20))


def telephone(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As through a line of 8 kHz."""
    there = soxr.resample(samples, SAMPLE_RATE, _LINE_RATE)
    return _fit(soxr.resample(there, _LINE_RATE, SAMPLE_RATE), len(samples))


def noisy(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """With pink noise, as of a fan or a street; both by their mean power."""
    noise = coloured_noise(len(samples), pink=True, rng=rng)
    powers = [float(np.mean(np.square(x))) for x in (samples, noise)]
    return samples + noise * np.sqrt(powers[0] / max(powers[1], 1e-20) * 10 ** (-NOISE_DB / 10))


def room(samples: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As in a room, drawn as training draws them."""
    return filter_audio(torch.from_numpy(samples), room_response(rng), None).numpy()


def coloured_noise(samples: int, *, pink: bool, rng: np.random.Generator) -> np.ndarray:
    """White noise, or pink (equal power in each octave): (samples,) float32, within -0.5 and 0.5."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    if pink:
        spectrum[1:] /= np.sqrt(np.arange(1, len(spectrum)))
        spectrum[0] = 0
    noise = np.fft.irfft(spectrum, samples)
    return (noise * (0.5 / max(float(np.abs(noise).max()), 1e-9))).astype(np.float32)


CONDITIONS: Mapping[str, Change | None] = {
    "as recorded": None,
    "quiet": quiet,
    "noisy": noisy,
    "room": room,
    "telephone": telephone,
}


def evaluate_conditions(
    manifests: Sequence[Path], options: RecognizerOptions, network: str
) -> tuple[dict[str, list[Score]], list[Problem]]:
    """Score every manifest in each condition; the same recording is changed in the same way each time.

    Raises:
        ModelError: the model cannot be loaded, or lacks the network.
    """
    recognizer = options.load(endpoint=False)
    found = {
        name: evaluate(manifests, options, network=network, change=_seeded(change), recognizer=recognizer)
        for name, change in CONDITIONS.items()
    }
    return {name: scores for name, (scores, _) in found.items()}, found["as recorded"][1]


def conditions_table(scores: Mapping[str, Sequence[Score]]) -> str:
    """WER in percent, a line for each manifest and one for all of several."""
    shown = {name: [*s, total(s)] if len(s) > 1 else list(s) for name, s in scores.items()}
    rows = list(zip(*shown.values(), strict=True))
    width = max((len(row[0].manifest) for row in rows), default=0)
    lines = [" " * width + "".join(f"  {name:>11}" for name in shown) + "   (WER %)"]
    lines += [f"{row[0].manifest:<{width}}" + "".join(f"  {100 * s.errors.wer:>11.2f}" for s in row) for row in rows]
    return "\n".join(lines) + "\n"


def _seeded(change: Change | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """A change that the samples themselves seed."""
    if change is None:
        return None

    def changed(samples: np.ndarray) -> np.ndarray:
        if not len(samples):
            return samples
        rng = np.random.default_rng(zlib.crc32(samples.tobytes()))
        return np.clip(change(samples, rng), -1.0, 1.0).astype(np.float32)

    return changed


def _fit(samples: np.ndarray, length: int) -> np.ndarray:
    return np.pad(samples[:length], (0, max(length - len(samples), 0)))
