"""Recordings for tests: tones and noise in any format, and what reading them says."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.audio import audio_blocks, read_audio
from asr.errors import AudioError

FORMATS = [
    ("wav", "PCM_16", 60),
    ("wav", "PCM_U8", 25),
    ("wav", "PCM_24", 100),
    ("wav", "FLOAT", 120),
    ("wav", "ULAW", 20),
    ("flac", "PCM_16", 60),
    ("aiff", "PCM_16", 60),
    ("rf64", "PCM_16", 60),
    ("mp3", "MPEG_LAYER_III", 20),
    ("ogg", "VORBIS", 15),
    ("opus", "OPUS", 10),
]


def tone(seconds: float, rate: int = 16_000, hertz: float = 440.0) -> np.ndarray:
    """A tone of 0.4 with a slow swell, float64 (n,): it can be computed at any rate."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.3 + 0.1 * np.sin(2 * np.pi * 3 * t)) * np.sin(2 * np.pi * hertz * t)


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(7).normal(0, 0.1, (round(seconds * rate), channels)).clip(-1, 1)


def write(path: Path, samples: np.ndarray, rate: int = 16_000, subtype: str | None = None, **options) -> Path:
    kind = {".opus": "OGG", ".rf64": "RF64"}.get(path.suffix, path.suffix[1:].upper())
    soundfile.write(path, samples, rate, format=kind, subtype=subtype, **options)
    return path


@contextmanager
def unprivileged() -> Iterator[None]:
    """As a user who may not read everything, where root runs the tests."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65_534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def joined(path: Path, **options) -> np.ndarray:
    return np.concatenate(list(audio_blocks(path, **options)))


def decibels(signal: np.ndarray, reference: np.ndarray) -> float:
    return 10 * np.log10(np.sum(reference**2) / np.sum((signal - reference) ** 2))


def refusal(path: Path | str) -> str:
    with pytest.raises(AudioError) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")
