"""Features: the streaming contract, and agreement with librosa and torchaudio."""

import librosa
import numpy as np
import torch
import torchaudio
from contract import check_streaming

from asr.config import FeatureConfig
from asr.features import FLOOR, LogMel


def swelling_noise(samples: int, rows: int = 1) -> torch.Tensor:
    time = torch.arange(samples) / 16_000
    return 0.1 * torch.randn(rows, samples, generator=torch.Generator().manual_seed(0)) * torch.sin(5 * time) ** 2


def test_features_stream() -> None:
    check_streaming(LogMel(FeatureConfig()).double(), swelling_noise(4_000, 3).double(), tolerance=1e-9)


def windows_of(audio: torch.Tensor) -> torch.Tensor:
    """Those that the features of audio (1, time) see, one after the other, each without its mean: (1, time)."""
    windows = torch.nn.functional.pad(audio, (240, 0)).unfold(1, 400, 160)
    return (windows - windows[..., 1:].mean(dim=-1, keepdim=True)).flatten(1)


def test_features_equal_librosa() -> None:
    audio = swelling_noise(16_000)
    ours, lengths = LogMel(FeatureConfig())(audio, torch.tensor([16_000]))
    theirs = librosa.feature.melspectrogram(
        y=windows_of(audio)[0].numpy(), sr=16_000, n_fft=400, hop_length=400, center=False, n_mels=80,
        fmin=20, fmax=7_600, window="hann", norm="slaney", htk=False,
    )  # fmt: skip
    assert lengths.tolist() == [100]
    assert np.abs(ours[0].numpy() - np.log(theirs.T + FLOOR)).max() < 1e-3


def test_features_equal_torchaudio() -> None:
    audio = swelling_noise(8_000)
    transform = torchaudio.transforms.MelSpectrogram(
        16_000, n_fft=400, hop_length=400, f_min=20, f_max=7_600, n_mels=80, center=False, norm="slaney",
        mel_scale="slaney",
    )  # fmt: skip
    theirs = torch.log(transform(windows_of(audio)) + FLOOR).transpose(1, 2)
    ours, _ = LogMel(FeatureConfig())(audio, torch.tensor([8_000]))
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_an_offset_of_the_microphone_changes_nothing() -> None:
    audio = 0.1 * swelling_noise(8_000)
    as_it_was, _ = LogMel(FeatureConfig())(audio, torch.tensor([8_000]))
    shifted, _ = LogMel(FeatureConfig())(audio + 0.05, torch.tensor([8_000]))
    first = 2  # before them, the silence that stands before a stream ends
    assert torch.allclose(as_it_was[:, first:], shifted[:, first:], atol=0.02)


def test_the_dft_matrix_is_the_transform() -> None:
    layer = LogMel(FeatureConfig())
    frame = torch.randn(400, dtype=torch.float64)
    real, imaginary = (frame @ layer.dft_matrix()).chunk(2)
    spectrum = torch.fft.rfft((frame - frame[1:].mean()) * torch.hann_window(400, dtype=torch.float64))
    assert torch.allclose(torch.complex(real, imaginary), spectrum, atol=1e-9)


def test_fewer_samples_than_a_hop_give_no_frame() -> None:
    features, lengths = LogMel(FeatureConfig())(torch.zeros(1, 159), torch.tensor([159]))
    assert features.shape == (1, 0, 80)
    assert lengths.tolist() == [0]
