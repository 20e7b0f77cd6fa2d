"""asr.training.device: batches made for a GPU are those of the loader for a CPU. (Here they lie on the CPU.)"""

from pathlib import Path

import numpy as np
import pytest
import torch
from tones import changed, row, tone_config, write_corpus

from asr.config import TrainConfig
from asr.training.data import EDGE_SAMPLES, Batch, Corpus, Loader, Plan, Sampler
from asr.training.device import DeviceLoader

CPU = torch.device("cpu")
PLAIN = {"gain_db": 0.0, "time_masks": 0, "band_masks": 0}


def both(config: TrainConfig, rank: int = 0, world: int = 1) -> tuple[Sampler, Loader, DeviceLoader]:
    corpus = Corpus(config.data.train)
    plain = Loader(corpus, config, 160, rank=rank, world=world)
    return Sampler(corpus, config, 640), plain, DeviceLoader(corpus, config, 160, CPU, rank=rank, world=world)


def same(got: Batch, wanted: Batch) -> None:
    for name, value in vars(wanted).items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(
                vars(got)[name], value, atol=2e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert vars(got)[name] == value, name


@pytest.mark.parametrize("rank", [0, 1])
def test_without_chance_the_batches_are_the_same(tmp_path: Path, rank: int) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), consistency_weight=0.1)
    config = changed(config, "augment", **PLAIN, speeds=(0.9, 1.0, 1.1), lead_seconds=1.0, silence_probability=0.1)
    sampler, loader, device = both(config, rank=rank, world=2)
    for plan in [*sampler.epoch(0), Plan((3,), (1.1,), 64_000)]:  # of the last, rank 1 has no row
        same(device.batch(plan, 0), loader.batch(plan, 0))


def test_noise_is_as_strong_as_asked(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    noise = [row(f"n{i}", "", 0.1 * rng.standard_normal(n)) for i, n in enumerate((4_000, 90_000))]
    config = changed(
        tone_config(write_corpus(tmp_path / "d")), "augment", **PLAIN, noise_snr_db=(10.0, 10.0), lead_seconds=1.0
    )
    noisy = changed(config, "augment", noise=str(write_corpus(tmp_path / "n", 0, extra=noise)), noise_probability=1.0)
    sampler, _, clean = both(config)
    _, _, device = both(noisy)
    for plan in sampler.epoch(0):
        speech, heard = clean.batch(plan, 0), device.batch(plan, 0)
        added = heard.audio - speech.audio
        heard_samples = heard.lengths - 2 * EDGE_SAMPLES
        power = speech.audio.square().sum(1) / (heard_samples - torch.tensor(plan.leads))  # of the speech alone
        noise_power = added.square().sum(1) / heard_samples
        torch.testing.assert_close(
            10 * torch.log10(power / noise_power), torch.full_like(power, 10.0), atol=0.1, rtol=0
        )
        for sound, length in zip(added, heard.lengths.tolist(), strict=True):
            assert not sound[:EDGE_SAMPLES].any() and not sound[length - EDGE_SAMPLES :].any()
    silent = changed(noisy, "augment", silence_probability=1.0)
    sampler, _, device = both(silent)
    levels = []
    for plan in sampler.epoch(0):
        batch = device.batch(plan, 0)
        assert not batch.token_lengths.any() and not batch.phone_lengths.any()
        inner = batch.audio[:, EDGE_SAMPLES:-EDGE_SAMPLES].square().sum(1) / (batch.lengths - 2 * EDGE_SAMPLES)
        levels += (10 * torch.log10(inner)).tolist()
    assert -71 < min(levels) < -55 and -35 < max(levels) < -19


def test_rooms_and_band_limits_change_what_they_should(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    bursts = [np.concatenate([0.1 * rng.standard_normal(8_000), np.zeros(8_000)]) for _ in range(12)]
    folder = write_corpus(tmp_path / "d", 0, extra=[row(f"b{i}", "low", x) for i, x in enumerate(bursts)])
    config = changed(tone_config(folder), "augment", **PLAIN)
    corpus = Corpus(config.data.train)
    plan = Plan(tuple(range(12)), (1.0,) * 12, 25_600)

    def heard(**augment: float) -> torch.Tensor:
        batch = DeviceLoader(corpus, changed(config, "augment", **augment), 160, CPU).batch(plan, 0)
        return batch.audio[:, EDGE_SAMPLES : EDGE_SAMPLES + 16_000]

    dry, wet, dull = heard(), heard(reverberation_probability=1.0), heard(low_pass_probability=1.0)
    after = wet[:, 8_200:].square().sum(1) / dry.square().sum(1)
    assert not dry[:, 8_200:].any() and bool((after > 1e-5).all()) and bool((after < 0.5).all())
    spectrum = torch.fft.rfft(dull, dim=1).abs()
    hertz = torch.arange(spectrum.shape[1])
    assert bool((spectrum[:, hertz > 7_100].mean(1) < 0.2 * spectrum[:, hertz < 2_900].mean(1)).all())
    assert len({round(float(x), 3) for x in spectrum[:, hertz > 3_000].mean(1)}) > 6, "each has a limit of its own"


def test_masks_lie_inside_each_utterance_and_differ_from_row_to_row(tmp_path: Path) -> None:
    config = tone_config(write_corpus(tmp_path / "d"), consistency_weight=0.1)
    sampler, _, device = both(changed(config, "augment", time_masks=2, time_mask_frames=8, band_masks=1))
    seen = set()
    for plan in sampler.epoch(0):
        batch = device.batch(plan, 0)
        frames = (batch.lengths // 160).repeat(2)
        assert batch.hidden_frames.shape[0] == batch.hidden_bands.shape[0] == len(frames)
        for hidden, bands, n in zip(batch.hidden_frames, batch.hidden_bands, frames.tolist(), strict=True):
            assert not hidden[n:].any() and int(hidden.sum()) <= 16 and int(bands.sum()) <= 2
            seen.add((int(hidden.sum()), int(hidden.float().argmax()), int(bands.float().argmax())))
    assert len(seen) > 60


def test_the_same_seed_gives_the_same_batch(tmp_path: Path) -> None:
    config = changed(tone_config(write_corpus(tmp_path / "d")), "augment", reverberation_probability=0.5, quiet_db=9.0)
    sampler, _, device = both(config)
    plan = sampler.epoch(0)[0]
    first, again, other = device.batch(plan, 0), device.batch(plan, 0), device.batch(plan, 1)
    same(again, first)
    assert not torch.equal(other.audio, first.audio)
