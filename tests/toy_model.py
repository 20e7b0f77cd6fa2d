"""A recognizer with toy networks: audio that spells its text in loudness, read without a trained model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from asr.endpoint import EndpointConfig
from asr.recognizer import Network, Recognizer
from asr.runtime import State
from asr.text import Tokenizer
from pipelines.transcribe import RecognizerOptions

RATE = 16_000
FRAME = 640
TOKENIZER = Tokenizer.characters(["abcdefghijklmnopqrstuvwxyz"])
_ENDPOINT = EndpointConfig()
_STEP = 1 / (len(TOKENIZER) + 2)  # of loudness between two tokens


def spell(text: str) -> np.ndarray:
    """Audio (n,) float32 at 16 kHz: a character is two frames of a square wave, as loud as its index."""
    carrier = np.where(np.arange(2 * FRAME) // 8 % 2, -1.0, 1.0)
    parts = [np.concatenate([carrier * i * _STEP, np.zeros(2 * FRAME)]) for i in TOKENIZER.encode(text)]
    return np.concatenate([np.zeros(FRAME), *parts]).astype(np.float32)


def write(path: Path, text: str) -> Path:
    """A WAV file of `spell(text)`, and the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, spell(text), RATE)
    return path


class ToyEngine:
    """Both an offline and a streaming engine: reads what `spell` wrote, frame by frame."""

    samples_per_frame = FRAME
    latency_frames = 0
    vocab_size, phone_count, joint_size = len(TOKENIZER), 0, 0

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self._read(samples[: len(samples) // FRAME * FRAME]) for samples in batch]

    def initial_state(self, batch: int = 1) -> State:
        return (np.zeros((batch, 1), np.float32),)

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        return np.stack([self._read(row) for row in audio]), state

    def _read(self, samples: np.ndarray) -> np.ndarray:
        loudness = np.abs(samples.reshape(-1, FRAME))
        steady = loudness.max(axis=1, initial=0) - loudness.min(axis=1, initial=1) < _STEP / 4
        tokens = np.where(steady, np.rint(loudness.mean(axis=1) / _STEP), 0).astype(int)
        log_probs = np.full((len(tokens), self.vocab_size), -10.0, np.float32)
        log_probs[np.arange(len(tokens)), tokens] = np.log(0.9)
        return log_probs


def toy_recognizer(
    networks: Sequence[str] = ("offline", "streaming"), endpoint: EndpointConfig | None = _ENDPOINT
) -> Recognizer:
    """A real Recognizer over toy networks."""
    return Recognizer({name: Network(TOKENIZER, ToyEngine) for name in networks}, endpoint=endpoint, name="toy")


class ToyOptions(RecognizerOptions):
    """Options that load the toy, also in another process."""

    def load(self, *, endpoint: bool = True) -> Recognizer:
        return toy_recognizer(endpoint=self.rules if endpoint else None)
