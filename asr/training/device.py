"""Batches made on a GPU: what asr.augment does to one utterance after another, done to all rows of a batch at once.

A GPU that trains needs hundreds of utterances a second, augmented; a processor core makes some tens.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F

from asr.augment import (
    BACKGROUND_DB,
    DIRECT_DB,
    GAP_SECONDS,
    LIMIT_HZ,
    SAMPLE_RATE,
    SPEED_STEPS,
    T60_SECONDS,
)
from asr.config import TrainConfig
from asr.nn.layer import valid
from asr.training.data import EDGE_SAMPLES, ROW_STREAM, UNKNOWN, Batch, Corpus, Loader, Plan
from asr.training.shards import LABEL_SAMPLES


def fits(corpus: Corpus, device: torch.device) -> bool:
    """Whether the device has room for all audio beside a training: half of what is free."""
    free, _ = torch.cuda.mem_get_info(device)
    return not corpus.holds_features and 2 * int(corpus.n_samples.sum()) < free / 2


class Ragged:
    """Rows of any lengths, one after another on a device."""

    def __init__(self, rows: Iterable[np.ndarray], device: torch.device) -> None:
        rows = list(rows)
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.lasts = np.maximum(self.lengths - 1, 0)
        self.flat = torch.from_numpy(np.concatenate([*rows, np.zeros(1, rows[0].dtype)])).to(device)

    def at(self, rows: np.ndarray, index: Tensor) -> Tensor:
        """What some rows hold at an index, or at their nearest end: (rows, time) int64 -> (rows, time)."""
        starts, lasts = (_put(x[rows], index.device)[:, None] for x in (self.starts, self.lasts))
        return self.flat[starts + torch.minimum(index.clamp(min=0), lasts)]


class DeviceLoader(Loader):
    """A Loader whose audio and labels lie on a device, where it augments.

    What happens to an utterance has the same chances as a Loader's, though not the same dice.

    Args:
        device: where the training runs.
    """

    def __init__(
        self, corpus: Corpus, config: TrainConfig, hop: int, device: torch.device, *, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(corpus, config, hop, rank=rank, world=world)
        self.device = device
        every = range(len(corpus))
        self.recorded = Ragged((corpus.samples(i) for i in every), device)
        self.labels = Ragged((corpus.states(i).astype(np.int16) for i in every), device)
        self.written = Ragged((np.array(ids, np.int64) for ids in corpus.tokens), device)
        self.spoken = Ragged((np.array(ids, np.int64) for ids in corpus.phone_ids), device)
        noise = self.noise
        self.noises = Ragged((noise.audio(i) for i in range(len(noise))), device) if noise else None
        self._resamplers: dict[int, torchaudio.transforms.Resample] = {}

    @torch.no_grad()
    def batch(self, plan: Plan, epoch: int) -> Batch:
        """The tensors of one planned batch, on the device."""
        corpus, config, device = self.corpus, self.config, self.device
        mine = plan.share(self.rank, self.world)
        idle = not mine
        rows, speeds, leads, silent = (np.array(x) for x in zip(*(mine or plan.share(0, len(plan.rows))), strict=True))
        steps = np.round(speeds * SPEED_STEPS).astype(np.int64)
        rng = np.random.default_rng([config.training.seed, ROW_STREAM, epoch, int(rows[0])])
        put = self._put

        room = plan.samples - 2 * EDGE_SAMPLES
        played = -(-corpus.n_samples[rows] * SPEED_STEPS // steps)
        lengths = np.minimum(leads + played, room)
        audio = self._played(rows, steps, played)
        time = torch.arange(room, device=device)[None] - put(leads)[:, None]  # of the utterance
        inside = (time >= 0) & (time < put(np.where(silent, 0, played))[:, None])
        audio = torch.where(inside, audio.gather(1, time.clamp(0, audio.shape[1] - 1)), 0.0)
        audio = self._augmented(audio, lengths, leads, silent, rng)
        lengths = np.zeros_like(lengths) if idle else lengths + 2 * EDGE_SAMPLES

        bands, frames, views = config.features.bands, plan.samples // self.hop, config.training.views
        hidden_frames, hidden_bands = self._masks(views, lengths // self.hop, frames, bands, rng)
        of_text = np.where(silent | idle, 0, self.written.lengths[rows])
        of_phones = np.where(silent | idle, 0, self.spoken.lengths[rows])
        states = self._states(rows, speeds, leads, lengths, silent, plan.samples)
        return Batch(
            audio=F.pad(audio, (EDGE_SAMPLES, EDGE_SAMPLES)),
            features=None,
            lengths=put(lengths),
            cpu_lengths=torch.from_numpy(lengths),
            tokens=self._targets(self.written, rows, of_text),
            token_lengths=torch.from_numpy(of_text),
            counts=torch.full((len(rows),), not idle, device=device),
            phones=self._targets(self.spoken, rows, of_phones),
            phone_lengths=torch.from_numpy(of_phones),
            pronounced=put((of_phones > 0) | (silent & (not idle and bool(corpus.phones)))),
            hidden_frames=hidden_frames,
            hidden_bands=hidden_bands,
            states=states,
            token_count=sum(len(corpus.tokens[row]) for row in plan.rows),
            phone_count=sum(len(corpus.phone_ids[row]) for row in plan.rows),
            state_count=plan.output_frames(corpus.n_samples, self.stride),
        )

    def _played(self, rows: np.ndarray, steps: np.ndarray, played: np.ndarray) -> Tensor:
        """The rows at their speeds, (rows, longest) float32; past its end, a row holds nothing that counts."""
        put = self._put
        recorded = self.corpus.n_samples[rows]
        audio = torch.zeros(len(rows), int(played.max()), device=self.device)
        for step in np.unique(steps):
            these = np.flatnonzero(steps == step)
            time = torch.arange(int(recorded[these].max()), device=self.device)
            samples = self.recorded.at(rows[these], time[None].expand(len(these), -1)).float() / 32768
            samples = torch.where(time < put(recorded[these])[:, None], samples, 0.0)
            changed = self._resample(samples, int(step))[:, : audio.shape[1]]
            audio[put(these), : changed.shape[1]] = changed
        return audio

    def _resample(self, samples: Tensor, step: int) -> Tensor:
        if step == SPEED_STEPS:
            return samples
        if step not in self._resamplers:
            self._resamplers[step] = torchaudio.transforms.Resample(step, SPEED_STEPS).to(self.device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # its 10 bits would be heard
            return self._resamplers[step](samples)

    def _augmented(
        self, audio: Tensor, lengths: np.ndarray, leads: np.ndarray, silent: np.ndarray, rng: np.random.Generator
    ) -> Tensor:
        """As asr.augment.augment_audio, or of silent rows background: (rows, samples) float32, likewise."""
        config, put, count = self.config.augment, self._put, len(audio)
        rooms = rng.random(count) < config.reverberation_probability
        limited = rng.random(count) < config.low_pass_probability
        limits = np.where(limited, rng.uniform(*LIMIT_HZ, size=count), SAMPLE_RATE)
        inside = valid(put(lengths), audio.shape[1])
        changed = np.flatnonzero((rooms | limited) & ~silent)
        if len(changed):
            of = put(changed)
            audio[of] = self._filtered(audio[of], rooms[changed], limits[changed], rng)
            audio = torch.where(inside, audio, 0.0)
        noisy = np.flatnonzero(rng.random(count) < (config.noise_probability if self.noises else 0.0))
        if len(noisy) and self.noises:
            of = put(noisy)
            clips = rng.integers(len(self.noises.lengths), size=len(noisy))
            sizes = np.maximum(self.noises.lengths[clips], 1)
            first = put((rng.random(len(noisy)) * sizes).astype(np.int64))[:, None]
            time = (first + torch.arange(audio.shape[1], device=self.device)) % put(sizes)[:, None]
            noise = torch.where(inside[of], self.noises.at(clips, time).float() / 32768, 0.0)
            power = audio[of].square().sum(1) / put(np.maximum(lengths - leads, 1)[noisy])
            noise_power = noise.square().sum(1) / put(np.maximum(lengths, 1)[noisy])
            low, high = config.noise_snr_db
            snr = put(10 ** (-rng.uniform(low, high, len(noisy)) / 10).astype(np.float32))
            level = put(10 ** (rng.uniform(*BACKGROUND_DB, size=len(noisy)) / 20).astype(np.float32))
            beside = torch.sqrt(power * snr / noise_power.clamp(min=1e-10))
            alone = level / noise_power.sqrt().clamp(min=1e-5)
            scale = torch.where(put(silent[noisy]), alone, beside)
            audio[of] = audio[of] + noise * scale[:, None]
        gain = rng.uniform(-config.gain_db, config.gain_db, count)
        gain -= np.where(rng.random(count) < 0.5, rng.uniform(0.0, config.quiet_db, count), 0.0)
        gain = np.where(silent, 0.0, gain)
        return (audio * put((10 ** (gain / 20)).astype(np.float32))[:, None]).clamp(-1.0, 1.0)

    def _filtered(self, audio: Tensor, rooms: np.ndarray, limits: np.ndarray, rng: np.random.Generator) -> Tensor:
        """As asr.augment.room_response and filter_audio: (rows, samples) float32, likewise."""
        put, count = self._put, len(audio)
        t60 = put(rng.uniform(*T60_SECONDS, size=count).astype(np.float32))[:, None]
        gap = put(rng.uniform(*GAP_SECONDS, size=count).astype(np.float32))[:, None]
        strength = put(10 ** (-rng.uniform(*DIRECT_DB, size=count) / 10).astype(np.float32))[:, None]
        seconds = torch.arange(int(T60_SECONDS[1] * SAMPLE_RATE), device=self.device)[None] / SAMPLE_RATE
        dice = torch.Generator(self.device).manual_seed(int(rng.integers(2**62)))
        tail = torch.randn(count, seconds.shape[1], generator=dice, device=self.device) * 10 ** (-3 * seconds / t60)
        tail = torch.where((seconds >= gap) & (seconds < t60), tail, 0.0)
        tail = tail * torch.sqrt(strength / (tail.square().sum(1, keepdim=True) + 1e-12))
        tail = torch.where(put(rooms)[:, None], tail, 0.0)
        tail[:, 0] = 1.0
        size = 1 << (audio.shape[1] + tail.shape[1] - 1).bit_length()
        spectrum = torch.fft.rfft(audio, size) * torch.fft.rfft(tail, size)
        edge = put((limits / SAMPLE_RATE * size).astype(np.int64))[:, None]
        spectrum = spectrum * (torch.arange(spectrum.shape[1], device=self.device) < edge)
        return torch.fft.irfft(spectrum, size)[:, : audio.shape[1]]

    def _masks(
        self, views: int, lengths: np.ndarray, frames: int, bands: int, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """As asr.augment.draw_masks: (views * rows, frames) and (views * rows, bands) bool."""
        config = self.config.augment
        lengths = np.tile(lengths, views)
        shape = len(lengths), config.time_masks
        widths = rng.integers(0, np.minimum(config.time_mask_frames, lengths // 10)[:, None] + 1, shape)
        hidden_frames = self._covered(rng.integers(0, lengths[:, None] - widths + 1), widths, frames)
        shape = len(lengths), config.band_masks
        widths = rng.integers(0, config.band_mask_bands + 1, shape)
        return hidden_frames, self._covered(rng.integers(0, bands - widths + 1), widths, bands)

    def _covered(self, starts: np.ndarray, widths: np.ndarray, size: int) -> Tensor:
        put, place = self._put, torch.arange(size, device=self.device)
        return ((place >= put(starts)[..., None]) & (place < put(starts + widths)[..., None])).any(1)

    def _states(
        self,
        rows: np.ndarray,
        speeds: np.ndarray,
        leads: np.ndarray,
        lengths: np.ndarray,
        silent: np.ndarray,
        samples: int,
    ) -> Tensor:
        """As Loader._states_at, of all rows: (rows, output frames) int64."""
        put = self._put
        time = torch.arange(samples // self.stride, device=self.device)[None]
        position = (time - self.delay) * self.stride - EDGE_SAMPLES - put(leads)[:, None]
        index = torch.floor(position * put(speeds)[:, None] / LABEL_SAMPLES).long()
        known = self.labels.lengths[rows]
        inside = (index >= 0) & (index < put(np.where(silent, 0, known))[:, None])
        states = torch.where(inside, self.labels.at(rows, index), self.corpus.silence).long()
        taught = np.where(silent, self.corpus.state_count > 0, known > 0)
        heard = time < put(np.where(taught, lengths // self.stride, 0))[:, None]
        return torch.where(heard, states, UNKNOWN)

    def _targets(self, of: Ragged, rows: np.ndarray, lengths: np.ndarray) -> Tensor:
        place = torch.arange(max(int(lengths.max()), 1), device=self.device)[None]
        targets = of.at(rows, place.expand(len(rows), -1))
        return torch.where(place < self._put(lengths)[:, None], targets, 0)

    def _put(self, array: np.ndarray) -> Tensor:
        return _put(array, self.device)


def _put(array: np.ndarray, device: torch.device) -> Tensor:
    """An array on a device, which is not waited for."""
    return torch.from_numpy(array).to(device, non_blocking=True)
