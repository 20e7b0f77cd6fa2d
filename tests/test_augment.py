"""Augmentation: repeatable, within its bounds, and doing what its names say."""

import dataclasses

import numpy as np
import torch

from asr.augment import (
    add_noise,
    augment_audio,
    background,
    change_speed,
    changes_waveform,
    draw_masks,
    filter_audio,
    room_response,
)
from asr.config import AugmentConfig

BUSY = AugmentConfig(noise="n", noise_probability=1.0, reverberation_probability=1.0, low_pass_probability=1.0)


def tone(hertz: float, seconds: float = 1.0) -> torch.Tensor:
    return 0.3 * torch.sin(2 * torch.pi * hertz * torch.arange(int(16_000 * seconds)) / 16_000)


def strongest_hertz(audio: torch.Tensor) -> float:
    return float(torch.fft.rfft(audio).abs().argmax()) * 16_000 / len(audio)


def test_the_same_seed_gives_the_same_audio() -> None:
    one, again, other = (
        augment_audio(tone(300), BUSY, np.random.default_rng(seed), torch.randn(500, generator=torch.Generator()))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (16_000,)
    assert float(one.abs().max()) <= 1.0


def test_speed_changes_length_and_pitch() -> None:
    fast = change_speed(tone(1_000), 1.1)
    assert abs(len(fast) - 16_000 / 1.1) <= 1
    assert abs(strongest_hertz(fast) - 1_100) < 3


def test_noise_is_mixed_at_the_ratio_asked_for() -> None:
    clean, noise = tone(500), torch.randn(3_000, generator=torch.Generator().manual_seed(0))
    added = add_noise(clean, noise, 10.0) - clean
    ratio = 10 * torch.log10(clean.square().mean() / added.square().mean())
    assert abs(float(ratio) - 10) < 0.01
    assert torch.equal(add_noise(clean, torch.zeros(10), 10.0), clean)
    late = torch.cat([torch.zeros(30_000), clean])  # what is before the speech makes it no quieter
    added = add_noise(late, noise, 10.0, 30_000) - late
    assert abs(float(10 * torch.log10(clean.square().mean() / added.square().mean())) - 10) < 0.01


def test_half_of_the_utterances_are_made_quieter() -> None:
    config = AugmentConfig(gain_db=0.0, quiet_db=24.0)
    assert changes_waveform(dataclasses.replace(config, speeds=(1.0,)))
    audio = torch.full((100,), 0.5)
    gains = np.array(
        [20 * np.log10(2 * augment_audio(audio, config, np.random.default_rng(i))[0].item()) for i in range(400)]
    )
    assert 0.4 < (gains < -0.01).mean() < 0.6
    assert -24.01 < gains.min() < -20 and gains.max() < 0.01


def test_background_is_quiet_noise_or_nothing() -> None:
    rng = np.random.default_rng(0)
    noise = torch.randn(700, generator=torch.Generator().manual_seed(0))
    levels = [float(background(2_000, noise, rng).square().mean().log10() * 10) for _ in range(50)]
    assert -71 < min(levels) < max(levels) < -19
    assert torch.equal(background(10, None, rng), torch.zeros(10))


def test_low_pass_removes_what_is_above() -> None:
    both = tone(1_000) + tone(6_000)
    left = filter_audio(both, None, 4_000.0)
    assert float((left - tone(1_000))[1_000:-1_000].abs().max()) < 0.02


def test_a_room_starts_with_the_direct_sound_and_decays() -> None:
    room = room_response(np.random.default_rng(0))
    assert float(room[0]) == 1.0
    tail = room[1:].square()
    assert float(tail[: len(tail) // 2].sum()) > 10 * float(tail[len(tail) // 2 :].sum())
    assert torch.allclose(filter_audio(tone(200), torch.tensor([1.0]), None), tone(200), atol=1e-5)


def test_masks_stay_within_their_widths() -> None:
    config = AugmentConfig(time_masks=2, time_mask_frames=30, band_masks=1, band_mask_bands=10)
    rng = np.random.default_rng(0)
    frames, bands = zip(*(draw_masks(1_000, 80, config, rng) for _ in range(200)), strict=True)
    assert max(f.sum() for f in frames) <= 60
    assert max(b.sum() for b in bands) <= 10
    assert any(f.any() for f in frames)
    assert draw_masks(9, 80, config, rng)[0].sum() == 0  # too short to hide anything of
