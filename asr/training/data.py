"""Batches to train on: which utterances together, in what order, at what speed, and their tensors.

Everything is a function of the configuration, the epoch and the row, so that a run can stop at any batch and go
on, with any number of workers, on the same data in the same order.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from asr.augment import (
    SAMPLE_RATE,
    SPEED_STEPS,
    augment_audio,
    background,
    change_speed,
    draw_leads,
    draw_masks,
    draw_speeds,
    playable,
)
from asr.config import TrainConfig
from asr.errors import ConfigError, TextError
from asr.features import FLOOR
from asr.lexicon import phones_of
from asr.models import Network
from asr.text import Tokenizer
from asr.training.pieces import pieces
from asr.training.shards import LABEL_SAMPLES, STATES, ShardDataset, Statistics

EDGE_SAMPLES = SAMPLE_RATE // 4  # 250 ms of silence before and after: short words need frames to be written on
_GRID = SAMPLE_RATE * 32 // 100  # batch lengths are rounded up to this: each new shape costs oneDNN a set-up
UNKNOWN = -1  # the phone state of a frame that was not aligned
_DELAY = 2  # frames: a network without a future names a phone's states so late, when it has heard them
_ORDER, ROW_STREAM = 0, 1  # streams of random numbers
_COUNTED_WITH = ("cpu_lengths", "token_lengths", "phone_lengths")  # of a batch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A padded batch.

    Attributes:
        audio: (batch, samples) float32, edge silence included; lengths: (batch,) samples, and once more on the CPU.
        features: (batch, feature frames, bands) float32 log-mel in place of audio, where the data holds those; or None.
        tokens: (batch, longest) int64, token_lengths: (batch,) on the CPU: 0 means that nothing is said; likewise
            phones, where pronounced, (batch,) bool, says that they are known.
        counts: (batch,) bool: False for a row that only keeps a rank without work in step.
        hidden_frames: (batch, feature frames) bool; hidden_bands: (batch, bands) bool: SpecAugment's masks; of
            twice as many rows where each utterance is read under two of them.
        states: (batch, output frames) int64, the aligned phone state of each frame or UNKNOWN, as behind the end.
        token_count, phone_count, state_count: of the global batch, over all ranks.
    """

    audio: torch.Tensor
    features: torch.Tensor | None
    lengths: torch.Tensor
    cpu_lengths: torch.Tensor
    tokens: torch.Tensor
    token_lengths: torch.Tensor
    counts: torch.Tensor
    phones: torch.Tensor
    phone_lengths: torch.Tensor
    pronounced: torch.Tensor
    hidden_frames: torch.Tensor
    hidden_bands: torch.Tensor
    states: torch.Tensor
    token_count: int
    phone_count: int
    state_count: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device, but for what a loss counts with: on a GPU it would have to wait for that."""
        tensors = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name not in _COUNTED_WITH
        }
        return dataclasses.replace(self, **tensors)

    def repeated(self, views: int) -> "Batch":
        """The same batch with the targets of each row once for each view, and counted as often."""
        rows = {name: getattr(self, name).repeat(views, 1) for name in ("tokens", "phones", "states")}
        ones = {name: getattr(self, name).repeat(views) for name in ("counts", "pronounced", *_COUNTED_WITH)}
        counts = {name: views * getattr(self, name) for name in ("token_count", "phone_count", "state_count")}
        return dataclasses.replace(self, **rows, **ones, **counts)


@dataclass(frozen=True, slots=True)
class Plan:
    """One global batch: which rows, at what speeds, padded to how many samples.

    Attributes:
        leads: samples of silence before each row; empty: none.
        silent: whether a row gives way to silence, with an empty text; empty: none does.
    """

    rows: tuple[int, ...]
    speeds: tuple[float, ...]
    samples: int
    leads: tuple[int, ...] = ()
    silent: tuple[bool, ...] = ()

    def share(self, rank: int, world: int) -> list[tuple[int, float, int, bool]]:
        """Row, speed, lead and silence of a rank's part."""
        leads, silent = self.leads or (0,) * len(self.rows), self.silent or (False,) * len(self.rows)
        return list(zip(self.rows, self.speeds, leads, silent, strict=True))[rank::world]

    def output_frames(self, n_samples: np.ndarray, stride: int) -> int:
        """How many frames of so many samples are no padding, in all rows; `n_samples` are those of the corpus."""
        steps = np.round(np.array(self.speeds) * SPEED_STEPS).astype(np.int64)
        played = -(-n_samples[list(self.rows)] * SPEED_STEPS // steps) + (self.leads or 0)
        whole = np.minimum(played, self.samples - 2 * EDGE_SAMPLES) + 2 * EDGE_SAMPLES
        return int((whole // stride).sum())


class Corpus:
    """The utterances of one or more prepared folders, encoded.

    Args:
        folders: what `asr prepare` wrote, with audio.
        tokenizer: None makes one from the texts.
        phones: names of the phones, blank first; None takes those that occur.
        cut_seconds: aligned utterances are cut in pauses to pieces of so many seconds (asr.training.pieces); 0: never.

    Attributes:
        unspelled: ids of utterances that the tokenizer cannot spell; they are left out.
        silence: the state before and after an utterance, where there are alignments.
    """

    def __init__(
        self,
        folders: Sequence[str],
        tokenizer: Tokenizer | None = None,
        phones: tuple[str, ...] | None = None,
        cut_seconds: float = 0.0,
    ) -> None:
        self.datasets = [ShardDataset(folder) for folder in folders]
        stores = {dataset.info["store"] for dataset in self.datasets}
        if len(stores) > 1:
            raise ConfigError(f"{', '.join(folders)}: some hold audio and some features; prepare them alike")
        self.holds_features = stores == {"features"}
        self.tokenizer = tokenizer or Tokenizer.characters(t for d in self.datasets for t in d.texts)
        self.phones = phones if phones is not None else _phones_in(self.datasets)
        ids = {phone: i for i, phone in enumerate(self.phones)}
        self.where: list[tuple[int, int, slice]] = []  # folder, row, frames of 10 ms
        self.tokens: list[list[int]] = []
        self.phone_ids: list[list[int]] = []
        self.unspelled: list[str] = []
        sources, lengths = [], []
        for d, dataset in enumerate(self.datasets):
            for row, (text, phones_of_row) in enumerate(zip(dataset.texts, dataset.phones, strict=True)):
                parts = _parts(dataset, row, text, phones_of_row or "", cut_seconds)
                try:
                    tokens = [self.tokenizer.encode(part) for _, part, _ in parts]
                except TextError:
                    self.unspelled.append(dataset.ids[row])
                    continue
                self.tokens += tokens
                for span, _, part_phones in parts:
                    self.where.append((d, row, span))
                    self.phone_ids.append([ids[p] for p in part_phones.split() if p in ids])
                    sources.append(dataset.sources[row])
                    end = int(dataset.n_samples[row]) if span.stop is None else span.stop * LABEL_SAMPLES
                    lengths.append(end - (span.start or 0) * LABEL_SAMPLES)
        self.sources = np.array(sources)
        aligned = [dataset.aligned_phones for dataset in self.datasets]
        union = sorted({phone for phones in aligned for phone in phones})
        self.state_count = len(union) * STATES
        self.silence = next((union.index(phones[0]) * STATES for phones in aligned if phones), 0)
        self._states = [
            np.array([union.index(p) * STATES + s for p in phones for s in range(STATES)], np.int64)
            for phones in aligned
        ]  # of each folder's labels among all
        self.n_samples = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.where)

    @property
    def statistics(self) -> Statistics:
        """Feature statistics of all folders together."""
        return Statistics.join(d.statistics for d in self.datasets)

    def text(self, index: int) -> str:
        """Normalised text of an utterance."""
        return self.tokenizer.decode(self.tokens[index])

    def states(self, index: int) -> np.ndarray:
        """The aligned phone state in each 10 ms of an utterance: (frames,) int64; empty where unknown."""
        d, row, span = self.where[index]
        return self._states[d][self.datasets[d].alignment(row)][span]

    def features(self, index: int) -> torch.Tensor:
        """Stored log-mel features of an utterance: (frames, bands) float32."""
        d, row, span = self.where[index]
        stored = self.datasets[d].features(row)
        assert stored is not None
        return torch.from_numpy(stored[span].astype(np.float32))

    def samples(self, index: int) -> np.ndarray:
        """Samples of an utterance: (samples,) int16."""
        d, row, span = self.where[index]
        first = (span.start or 0) * LABEL_SAMPLES
        return self.datasets[d].audio(row)[first : first + self.n_samples[index]]

    def audio(self, index: int) -> torch.Tensor:
        """Samples of an utterance: (samples,) float32 in [-1, 1)."""
        return torch.from_numpy(self.samples(index).astype(np.float32) / 32768)


def _parts(dataset: ShardDataset, row: int, text: str, phones: str, cut_seconds: float) -> list[tuple[slice, str, str]]:
    """What an utterance is trained in: frames of 10 ms, text and phones of each piece."""
    labels = dataset.alignment(row)
    if not cut_seconds or dataset.n_samples[row] <= cut_seconds * SAMPLE_RATE or not len(labels):
        return [(slice(None), text, phones)]
    words, names = text.split(), phones.split()
    counts = [len(phones_of(word).split()) for word in words]
    found = pieces(labels, counts, cut_seconds)
    if len(found) == 1:
        return [(slice(None), text, phones)]
    ends = np.cumsum([0, *counts])
    named = len(names) == ends[-1]  # else the folder was prepared without, or with another lexicon
    return [
        (
            slice(piece.start, None if piece.end == len(labels) else piece.end),
            " ".join(words[piece.first_word : piece.end_word]),
            " ".join(names[ends[piece.first_word] : ends[piece.end_word]]) if named else "",
        )
        for piece in found
    ]


def _phones_in(datasets: Sequence[ShardDataset]) -> tuple[str, ...]:
    found = {p for d in datasets for phones in d.phones if phones for p in phones.split()}
    return ("<blank>", *sorted(found)) if found else ()


def frames_needed(tokens: Sequence[int]) -> int:
    """Output frames that CTC needs for a label sequence: one a token, and a blank between equal neighbours."""
    return len(tokens) + sum(a == b for a, b in itertools.pairwise(tokens))


class Sampler:
    """Deals a corpus into batches of like length, the same in every run of one configuration.

    Args:
        stride: samples to an output frame of the network.

    Attributes:
        too_long: utterances left out because they are longer than data.max_seconds.
        too_dense: utterances left out because their text has more tokens than their audio has output frames.
        empty: utterances left out because they have no text.
    """

    def __init__(self, corpus: Corpus, config: TrainConfig, stride: int) -> None:
        self.corpus, self.config = corpus, config
        fastest = max(map(playable, config.augment.speeds))
        need = np.array([frames_needed(tokens) for tokens in corpus.tokens], dtype=np.int64)
        long = corpus.n_samples > config.data.max_seconds * SAMPLE_RATE
        dense = need > (corpus.n_samples / fastest + 2 * EDGE_SAMPLES) // stride
        empty = np.array([not tokens for tokens in corpus.tokens], dtype=bool)
        self.usable = np.flatnonzero(~long & ~dense & ~empty)
        self.too_long, self.too_dense = int(long.sum()), int((dense & ~long).sum())
        self.empty = int((empty & ~long & ~dense).sum())
        if not len(self.usable):
            unspelled = len(corpus.unspelled)
            letters = " in the letters of init_from (set new_tokens = true)" if config.init_from else ""
            raise ConfigError(
                f"no utterance of {', '.join(config.data.train)} can be trained on: {self.too_long} too long, "
                f"{self.too_dense} with more tokens than frames, {self.empty} without text, {unspelled} not "
                f"to be spelled{letters}"
            )

    def epoch(self, epoch: int) -> list[Plan]:
        """The global batches of an epoch (from 0), in training order."""
        config, training = self.config, self.config.training
        rng = np.random.default_rng([training.seed, _ORDER, epoch])
        rows = self.usable
        if config.data.weights:
            weight = np.array([config.data.weights.get(s, 1.0) for s in self.corpus.sources[rows]])
            rows = rows[rng.random(len(rows)) < weight]
        if training.curriculum_seconds and epoch < training.curriculum_epochs:
            longest = training.curriculum_seconds + epoch * training.curriculum_step_seconds
            short = rows[self.corpus.n_samples[rows] <= longest * SAMPLE_RATE]
            rows = short if len(short) else rows
        speeds = draw_speeds(len(rows), config.augment, rng)
        leads = draw_leads(len(rows), config.augment, rng)
        silent = rng.random(len(rows)) < config.augment.silence_probability
        lengths = np.ceil(self.corpus.n_samples[rows] / speeds).astype(np.int64) + 2 * EDGE_SAMPLES + leads
        order = np.argsort(lengths * rng.uniform(0.97, 1.03, len(rows)), kind="stable")
        most_rows = training.batch_utterances // training.views
        most_samples = training.batch_seconds / training.views * SAMPLE_RATE
        batches: list[Plan] = []
        start = widest = 0
        for end, length in enumerate([*lengths[order].tolist(), 0]):
            full = end - start >= most_rows or max(widest, length) * (end - start + 1) > most_samples
            if end > start and (full or end == len(order)):
                group = order[start:end]
                samples = -(-widest // _GRID) * _GRID
                of_rows, of_speeds, of_leads, of_silent = (
                    tuple(values[group].tolist()) for values in (rows, speeds, leads, silent)
                )
                batches.append(Plan(of_rows, of_speeds, samples, of_leads, of_silent))
                start, widest = end, 0
            widest = max(widest, length)
        return [batches[i] for i in rng.permutation(len(batches))]


class Loader:
    """Turns planned batches into tensors, one rank's share of each.

    Args:
        augment: apply the configuration's augmentation (training) or none of it (tuning).
    """

    def __init__(
        self, corpus: Corpus, config: TrainConfig, hop: int, *, rank: int = 0, world: int = 1, augment: bool = True
    ) -> None:
        self.corpus, self.config, self.hop = corpus, config, hop
        self.stride = hop * math.prod(config.model.strides)  # samples to an output frame
        self.rank, self.world, self.augment = rank, world, augment
        self.delay = 0 if config.model.bidirectional else _DELAY
        self.noise = ShardDataset(config.augment.noise) if augment and config.augment.noise else None

    def batches(self, planned: Sequence[Plan], epoch: int) -> Iterator[Batch]:
        """The tensors of each planned batch."""
        for plan in planned:
            yield self.batch(plan, epoch)

    def batch(self, plan: Plan, epoch: int) -> Batch:
        """The tensors of one planned batch; a rank without a row of its own gets one that does not count."""
        corpus, bands = self.corpus, self.config.features.bands
        mine = plan.share(self.rank, self.world)
        idle = not mine
        if idle:
            mine = plan.share(0, len(plan.rows))
        stored = corpus.holds_features
        audio = torch.zeros(len(mine), 0 if stored else plan.samples)
        lengths = torch.zeros(len(mine), dtype=torch.long)
        frames = plan.samples // self.hop
        features = torch.full((len(mine), frames, bands), math.log(FLOOR)) if stored else None  # what silence gives
        views = self.config.training.views if self.augment else 1
        hidden_frames = np.zeros((views, len(mine), frames), bool)
        hidden_bands = np.zeros((views, len(mine), bands), bool)
        states = np.full((len(mine), plan.samples // self.stride), UNKNOWN)
        for i, (row, speed, lead, silent) in enumerate(mine):
            rng = np.random.default_rng([self.config.training.seed, ROW_STREAM, epoch, int(row)])
            if features is not None:
                edge, kept = EDGE_SAMPLES // self.hop, corpus.features(row)
                features[i, edge : edge + len(kept)] = kept
                lengths[i] = int(corpus.n_samples[row]) + 2 * EDGE_SAMPLES
            else:
                samples = corpus.audio(row)
                if self.augment:
                    samples = torch.cat([torch.zeros(lead), change_speed(samples, speed)])
                    noise = self._noise(rng)
                    if silent:
                        samples = background(len(samples), noise, rng)
                    else:
                        samples = augment_audio(samples, self.config.augment, rng, noise, lead)
                samples = samples[: plan.samples - 2 * EDGE_SAMPLES]
                audio[i, EDGE_SAMPLES : EDGE_SAMPLES + len(samples)] = samples
                lengths[i] = len(samples) + 2 * EDGE_SAMPLES
            if not idle:
                heard = int(lengths[i]) // self.stride
                states[i, :heard] = self._states_at(row, speed, heard, lead, silent)
            if self.augment:
                n = int(lengths[i]) // self.hop
                for view in range(views):
                    hidden_frames[view, i, :n], hidden_bands[view, i] = draw_masks(n, bands, self.config.augment, rng)
        if idle:
            lengths.zero_()  # no frame of it enters batch normalisation
        tokens, token_lengths = _pad([[] if idle or silent else corpus.tokens[row] for row, _, _, silent in mine])
        phones, phone_lengths = _pad([[] if idle or silent else corpus.phone_ids[row] for row, _, _, silent in mine])
        return Batch(
            audio=audio,
            features=features,
            lengths=lengths,
            cpu_lengths=lengths,
            tokens=tokens,
            token_lengths=token_lengths,
            counts=torch.full((len(mine),), not idle),
            phones=phones,
            phone_lengths=phone_lengths,
            pronounced=(phone_lengths > 0) | torch.tensor([s and not idle and bool(corpus.phones) for *_, s in mine]),
            hidden_frames=torch.from_numpy(hidden_frames).flatten(0, 1),
            hidden_bands=torch.from_numpy(hidden_bands).flatten(0, 1),
            states=torch.from_numpy(states),
            token_count=sum(len(corpus.tokens[row]) for row in plan.rows),
            phone_count=sum(len(corpus.phone_ids[row]) for row in plan.rows),
            state_count=plan.output_frames(corpus.n_samples, self.stride),
        )

    def _states_at(self, row: int, speed: float, frames: int, lead: int, silent: bool) -> np.ndarray:
        """The phone state that each output frame of an utterance, or of silence, should name: (frames,) int64."""
        if silent:
            return np.full(frames, self.corpus.silence if self.corpus.state_count else UNKNOWN)
        known = self.corpus.states(row)
        if not len(known):
            return np.full(frames, UNKNOWN)
        # of its middle, in changed audio
        position = (np.arange(frames) - self.delay) * self.stride - EDGE_SAMPLES - lead
        labels = np.floor(position * speed / LABEL_SAMPLES).astype(np.int64)
        inside = (labels >= 0) & (labels < len(known))
        return np.where(inside, known[labels.clip(0, len(known) - 1)], self.corpus.silence)

    def _noise(self, rng: np.random.Generator) -> torch.Tensor | None:
        if self.noise is None or rng.random() >= self.config.augment.noise_probability:
            return None
        samples = self.noise.audio(int(rng.integers(len(self.noise))))
        start = int(rng.integers(max(len(samples), 1)))
        return torch.from_numpy(np.roll(samples, -start).astype(np.float32) / 32768)


def tuning_plan(corpus: Corpus, minutes: float, seconds: float, rows: np.ndarray | None = None) -> list[Plan]:
    """Read about `minutes` of a corpus, evenly picked, unchanged, shortest first, in batches of `seconds`.

    Args:
        rows: those to pick from; None: all.
    """
    rows = np.arange(len(corpus)) if rows is None else rows
    step = max(round(corpus.n_samples[rows].sum() / SAMPLE_RATE / 60 / minutes), 1)
    picked = rows[::step]
    order = picked[np.argsort(corpus.n_samples[picked], kind="stable")]
    plans, start = [], 0
    for end in range(1, len(order) + 1):
        longest = int(corpus.n_samples[order[end]]) if end < len(order) else 0
        full = (longest + 2 * EDGE_SAMPLES) * (end + 1 - start) > seconds * SAMPLE_RATE
        if end == len(order) or full:
            group = order[start:end]
            samples = int(corpus.n_samples[group].max()) + 2 * EDGE_SAMPLES
            plans.append(Plan(tuple(group), (1.0,) * len(group), -(-samples // _GRID) * _GRID))
            start = end
    return plans


def _pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    padded = torch.zeros(len(rows), max(int(lengths.max()), 1), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded, lengths


def features_of(network: Network, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch's features as a network normalises them, (batch, frames, bands), and lengths; computed or stored."""
    if batch.features is None:
        return network.normalised_features(batch.audio, batch.lengths)
    return network.layers[1](batch.features, batch.lengths // network.config.features.hop)
