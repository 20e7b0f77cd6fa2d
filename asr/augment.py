"""Augmentation: what may happen to an utterance's waveform, and which parts of its features are hidden.

All of it is drawn from a generator that the caller seeds, so that a run can be repeated and resumed.
"""

import numpy as np
import torch
import torchaudio

from asr.config import AugmentConfig

SAMPLE_RATE = 16_000
SPEED_STEPS = 160  # to a speed of 1: with finer ones the resampler's filter gets long
# What is drawn evenly between two bounds, here and in asr.training.device:
LIMIT_HZ = (3_000, 7_000)  # above which a band limit cuts
T60_SECONDS = (0.1, 0.7)  # of a room
GAP_SECONDS = (0.001, 0.01)  # from the direct sound to the reverberation
DIRECT_DB = (3, 15)  # of the direct sound above the reverberation
BACKGROUND_DB = (-70, -20)  # full scale


def changes_waveform(config: AugmentConfig) -> bool:
    """Whether anything but masks of the features is asked for."""
    chances = (
        config.noise_probability,
        config.reverberation_probability,
        config.low_pass_probability,
        config.silence_probability,
        config.lead_seconds,
    )
    return config.speeds != (1.0,) or config.gain_db != 0 or config.quiet_db != 0 or any(chances)


def draw_speeds(count: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """The speed at which each of so many utterances will be played: (count,) float64."""
    return rng.choice([playable(speed) for speed in config.speeds], count)


def playable(speed: float) -> float:
    """The speed at which `change_speed` plays where it is asked for `speed`."""
    return round(speed * SPEED_STEPS) / SPEED_STEPS


def change_speed(audio: torch.Tensor, speed: float) -> torch.Tensor:
    """Play (samples,) faster or slower; pitch changes with it (Ko et al. 2015)."""
    if speed == 1.0:
        return audio
    return torchaudio.functional.resample(audio, round(speed * SPEED_STEPS), SPEED_STEPS)


def draw_leads(count: int, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """How many samples of silence each of so many utterances begins with, every other one with some: (count,) int64."""
    longest = round(config.lead_seconds * SAMPLE_RATE)
    return rng.integers(longest + 1, size=count) * (rng.random(count) < 0.5)


def add_noise(audio: torch.Tensor, noise: torch.Tensor, snr_db: float, lead: int = 0) -> torch.Tensor:
    """Mix noise (any length; repeated or cut to fit) into audio at a signal-to-noise ratio of the mean powers.

    Of the audio's, `lead` samples of silence before it are left out.
    """
    if not len(noise) or not len(audio):
        return audio
    noise = repeat(noise, len(audio))
    power, noise_power = audio.square().sum() / max(len(audio) - lead, 1), noise.square().mean()
    if noise_power <= 0:
        return audio
    return audio + noise * torch.sqrt(power / noise_power * 10 ** (-snr_db / 10))


def room_response(rng: np.random.Generator) -> torch.Tensor:
    """A synthetic room impulse response: (samples,), the direct sound, then noise that decays by 60 dB in T60.

    T60 is 0.1 to 0.7 s, the reverberation 3 to 15 dB below the direct sound in energy.
    """
    t60 = rng.uniform(*T60_SECONDS)
    time = np.arange(int(t60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / t60)
    tail[: int(rng.uniform(*GAP_SECONDS) * SAMPLE_RATE)] = 0.0
    tail *= np.sqrt(10 ** (-rng.uniform(*DIRECT_DB) / 10) / (np.square(tail).sum() + 1e-12))
    tail[0] = 1.0
    return torch.from_numpy(tail.astype(np.float32))


def filter_audio(audio: torch.Tensor, response: torch.Tensor | None, low_pass_hz: float | None) -> torch.Tensor:
    """Convolve (samples,) with an impulse response and cut what lies above a frequency, in one transform."""
    size = len(audio) + (len(response) if response is not None else 0)
    size = 1 << max(size - 1, 1).bit_length()
    spectrum = torch.fft.rfft(audio, size)
    if response is not None:
        spectrum = spectrum * torch.fft.rfft(response, size)
    if low_pass_hz is not None:
        edge = int(low_pass_hz / SAMPLE_RATE * size)
        spectrum[edge:] = 0.0
    return torch.fft.irfft(spectrum, size)[: len(audio)]


def augment_audio(
    audio: torch.Tensor,
    config: AugmentConfig,
    rng: np.random.Generator,
    noise: torch.Tensor | None = None,
    lead: int = 0,
) -> torch.Tensor:
    """Reverberation, band limit, noise and gain, each as the configuration's chances have it: (samples,) float32.

    The audio begins with `lead` samples of silence.
    """
    response = room_response(rng) if rng.random() < config.reverberation_probability else None
    limit = float(rng.uniform(*LIMIT_HZ)) if rng.random() < config.low_pass_probability else None
    if response is not None or limit is not None:
        audio = filter_audio(audio, response, limit)
    if noise is not None:
        low, high = config.noise_snr_db
        audio = add_noise(audio, noise, float(rng.uniform(low, high)), lead)
    gain_db = rng.uniform(-config.gain_db, config.gain_db)
    if config.quiet_db and rng.random() < 0.5:
        gain_db -= rng.uniform(0.0, config.quiet_db)
    return (audio * 10 ** (gain_db / 20)).clamp(-1.0, 1.0)


def background(samples: int, noise: torch.Tensor | None, rng: np.random.Generator) -> torch.Tensor:
    """What a room sounds like while nobody speaks: (samples,) noise at -70 to -20 dB full scale, or zeros."""
    if noise is None:
        return torch.zeros(samples)
    noise = repeat(noise, samples)
    level = 10 ** (rng.uniform(*BACKGROUND_DB) / 20)
    return noise * (level / noise.square().mean().sqrt().clamp(min=1e-5))


def repeat(audio: torch.Tensor, samples: int) -> torch.Tensor:
    """(any length above 0,) -> (samples,): again and again, or cut."""
    return audio.repeat(-(-samples // len(audio)))[:samples]


def draw_masks(
    frames: int, bands: int, config: AugmentConfig, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """SpecAugment (Park et al. 2019): which frames (frames,) and which bands (bands,) to hide, bool.

    A mask hides at most a tenth of the frames of a short utterance, `time_mask_frames` of a long one.
    """
    hidden_frames, hidden_bands = np.zeros(frames, bool), np.zeros(bands, bool)
    widest = min(config.time_mask_frames, frames // 10)
    for _ in range(config.time_masks):
        width = int(rng.integers(0, widest + 1))
        start = int(rng.integers(0, frames - width + 1))
        hidden_frames[start : start + width] = True
    for _ in range(config.band_masks):
        width = int(rng.integers(0, config.band_mask_bands + 1))
        start = int(rng.integers(0, bands - width + 1))
        hidden_bands[start : start + width] = True
    return hidden_frames, hidden_bands
