"""Log-mel filter bank features as a streaming layer: 80 bands, 25 ms windows, a frame each 10 ms."""

import math

import torch
import torchaudio
from torch import Tensor

from asr.config import FeatureConfig
from asr.nn.layer import State, StreamingLayer, window_state, windows

FLOOR = 1e-7  # added to the mel power before the logarithm: keeps digital silence near a quiet room's level


class LogMel(StreamingLayer):
    """Samples (batch, time) -> log-mel features (batch, time // hop, bands).

    Frame t sees the `window` samples that end at hop * (t + 1), with zeros before the stream begins: no frame
    is centred, so none needs the future. The mean of its samples, a microphone's offset, is taken off. The window is a
    periodic Hann window, the DFT has as many points as the window, filters are Slaney's with area normalisation
    (librosa's defaults), the logarithm is natural.
    """

    filters: Tensor
    taper: Tensor

    def __init__(self, config: FeatureConfig) -> None:
        super().__init__()
        self.window = config.sample_rate * config.window_ms // 1000
        self.stride = config.hop
        bins = self.window // 2 + 1
        filters = torchaudio.functional.melscale_fbanks(
            bins, config.low_hz, config.high_hz, config.bands, config.sample_rate, "slaney", "slaney"
        )
        self.register_buffer("filters", filters, persistent=False)  # (bins, bands)
        self.register_buffer("taper", torch.hann_window(self.window), persistent=False)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        frames, _ = windows(x, None, self.window, self.stride)
        return self._log_mel(frames), lengths // self.stride

    def initial_state(self, batch_size: int) -> State:
        return window_state(self.taper.new_zeros(batch_size, 0), self.window)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        samples, state = windows(x, state, self.window, self.stride)
        return self._log_mel(samples), state

    def _log_mel(self, samples: Tensor) -> Tensor:
        if samples.shape[1] < self.window:
            return self._nothing(samples.shape[0])
        framed = samples.unfold(1, self.window, self.stride)
        framed = (framed - framed[..., 1:].mean(dim=-1, keepdim=True)) * self.taper  # which leaves out the first one
        power = torch.fft.rfft(framed).abs().square()
        return torch.log(power @ self.filters + FLOOR)

    def dft_matrix(self) -> Tensor:
        """The windowed DFT, the mean taken off before, as a matrix: (window, 2 * bins), real parts first; float64."""
        n = torch.arange(self.window, dtype=torch.float64)
        angle = 2 * math.pi / self.window * n[:, None] * torch.arange(self.window // 2 + 1)
        taper = torch.hann_window(self.window, dtype=torch.float64)[:, None]
        matrix = torch.cat([taper * angle.cos(), -taper * angle.sin()], dim=1)
        matrix[1:] -= matrix[1:].mean(dim=0)
        return matrix

    def _nothing(self, batch_size: int) -> Tensor:
        return self.taper.new_zeros(batch_size, 0, self.filters.shape[1])
