"""Forced alignment from a flat start: a monophone GMM-HMM finds where each phone of prepared speech lies.

What hybrid recognizers begin with (Rabiner 1989; Kaldi's train_mono), and what a network learns from faster than
from CTC alone: dense targets, a label for every frame. Needs word pronunciations, no other model.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numba
import numpy as np
import torch
import torchaudio

from asr.config import FeatureConfig
from asr.errors import ConfigError
from asr.features import LogMel
from asr.lexicon import check_english, phones_of
from asr.training.shards import LABEL_SAMPLES, STATES, ShardDataset, write_alignment

SILENCE = "<silence>"
_CEPSTRA = 13
_FLAT_ITERATIONS, _ITERATIONS, _SPLITS = 8, 4, 2  # with one Gaussian a state; after each split; doublings of them
_VARIANCE_FLOOR = 0.01  # of the variance of all frames
_TRAINING_HOURS = 2.0  # enough for five hundred Gaussians; the rest is aligned once, at the end
_MOST_BYTES = 1e9  # for an utterance: about five minutes of speech
_FRAME_BYTES = 7_000  # that the making of a frame's features takes

Told = Callable[[str], None]


def align(folder: str | Path, told: Told = lambda line: None) -> float:
    """Align the rows of a prepared folder and keep the labels beside them (ShardDataset.alignment).

    Args:
        folder: what `asr prepare` wrote, with audio; its texts must be English (asr.lexicon).
        told: is given a line on each step.

    Returns:
        The share of rows that could be aligned: a text with more phones than its audio has room for cannot, nor
        an utterance that would take too much memory.

    Raises:
        ConfigError: no prepared data, none that can be aligned, or texts that are not English.
    """
    dataset = ShardDataset(folder, aligned=False)
    if dataset.info["store"] != "audio":
        raise ConfigError(f"{folder}: holds features alone; alignment needs audio: `asr prepare --store audio`")
    rows = range(len(dataset))
    check_english(str(folder), dataset.texts)
    names = sorted({p for text in set(dataset.texts) for p in phones_of(text).split()})
    phones = {name: i for i, name in enumerate((SILENCE, *names))}
    graphs = [_Graph(text, phones) for text in dataset.texts]
    told(f"{len(rows)} utterances, {len(phones)} phones")
    nothing = np.zeros((0, 3 * _CEPSTRA), np.float32)
    frames = (dataset.n_samples // LABEL_SAMPLES).tolist()
    features = [_mfcc(dataset, row) if graphs[row].is_small(frames[row]) else nothing for row in rows]
    _subtract_speaker_means(features, dataset.speakers)

    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    hours = np.cumsum(dataset.n_samples[order]) / 16_000 / 3600
    chosen = [
        row for row in order[: int(np.searchsorted(hours, _TRAINING_HOURS)) + 1] if graphs[row].fits(features[row])
    ]
    if not chosen:
        raise ConfigError(
            f"{folder}: none of {len(rows)} utterances can be aligned: they lack text, or audio for its phones, or are "
            "longer than some minutes"
        )
    model = _Mixtures.flat(np.concatenate([features[row] for row in chosen]), len(phones) * STATES)
    labels = [graphs[row].uniform(len(features[row])) for row in chosen]
    for split in range(_SPLITS + 1):
        if split:
            model = model.split()
        for iteration in range(_ITERATIONS if split else _FLAT_ITERATIONS):
            if split or iteration:
                found = [graphs[row].best_path(model.log_likelihoods(features[row])) for row in chosen]
                labels = [path if path is not None else old for (path, _), old in zip(found, labels, strict=True)]
                told(f"{model.size} Gaussians a state: {np.mean([s for _, s in found]):.2f} a frame")
            model = model.reestimated([features[row] for row in chosen], labels)
    joined = []
    for row in rows:
        path, _ = graphs[row].best_path(model.log_likelihoods(features[row]))
        joined.append(path if path is not None else np.zeros(0, np.uint8))
    write_alignment(folder, list(phones), joined, dataset.row_hash)
    return float(np.mean([len(path) > 0 for path in joined]))


class _Graph:
    """The states that an utterance passes through: its words' phones, with silence or none around each word."""

    def __init__(self, text: str, phones: dict[str, int]) -> None:
        states, skips, words = [*range(STATES)], [-1] * STATES, text.split()
        for word in words:
            behind = len(states) - STATES - 1  # the last state of the word before the silence
            for i, phone in enumerate(phones_of(word).split()):
                states += [phones[phone] * STATES + s for s in range(STATES)]
                skips += [behind if i == 0 else -1] + [-1] * (STATES - 1)
            states += range(STATES)
            skips += [-1] * STATES
        self.states = np.array(states, np.int64)
        self.skips = np.array(skips, np.int64)  # a second predecessor of each state, or -1
        self.spoken = self.states >= STATES

    def is_small(self, frames: int) -> bool:
        """Whether memory does for the features of so many frames and the search for their path."""
        return frames * (2 * len(self.states) + _FRAME_BYTES) <= _MOST_BYTES

    def fits(self, features: np.ndarray) -> bool:
        """Whether there is a frame for every state that must be passed."""
        return bool(self.spoken.any()) and len(features) >= self.spoken.sum() + 2 * STATES

    def uniform(self, frames: int) -> np.ndarray:
        """Every state equally long, silence at both ends alone: where the training begins."""
        kept = self.spoken.copy()
        kept[:STATES] = kept[-STATES:] = True
        path = self.states[kept]
        return path[np.arange(frames) * len(path) // frames].astype(np.uint8)

    def best_path(self, scores: np.ndarray) -> tuple[np.ndarray | None, float]:
        """The likeliest state of each frame (frames,) uint8, or None where there are too few, and the mean score."""
        if not self.spoken.any() or len(scores) < self.spoken.sum():
            return None, 0.0
        path, score = _viterbi(scores, self.states, self.skips)
        return self.states[path].astype(np.uint8), score / len(scores)


@numba.njit(cache=True)
def _viterbi(scores: np.ndarray, states: np.ndarray, skips: np.ndarray) -> tuple[np.ndarray, float]:
    frames, n = len(scores), len(states)
    best = np.full(n, -np.inf)
    best[0], best[STATES] = scores[0, states[0]], scores[0, states[STATES]]
    came = np.zeros((frames, n), np.int16)  # steps back to the predecessor
    for t in range(1, frames):
        for s in range(n - 1, -1, -1):  # predecessors have lower numbers, so one array will do
            top, step = best[s], 0
            if s > 0 and best[s - 1] > top:
                top, step = best[s - 1], 1
            skip = skips[s]
            if skip >= 0 and best[skip] > top:
                top, step = best[skip], s - skip
            best[s] = top + scores[t, states[s]]
            came[t, s] = step
    last = n - 1 if best[n - 1] >= best[n - 1 - STATES] else n - 1 - STATES
    score = best[last]
    path = np.zeros(frames, np.int64)
    for t in range(frames - 1, -1, -1):
        path[t] = last
        last -= came[t, last]
    return path, score


class _Mixtures:
    """Gaussians with diagonal covariance: weights (states, size), means and variances (states, size, features)."""

    def __init__(self, weights: np.ndarray, means: np.ndarray, variances: np.ndarray, floor: np.ndarray) -> None:
        self.weights, self.means, self.variances, self.floor = weights, means, variances, floor
        self.states, self.size = weights.shape
        precision = 1 / variances
        constant = np.log(weights) - 0.5 * (np.log(2 * np.pi * variances) + means**2 * precision).sum(-1)
        self._constant = constant.ravel().astype(np.float32)
        # log N(x) = constant + x . (mean / variance) - x^2 . (1 / variance) / 2: one matrix product
        linear = np.concatenate([means * precision, -0.5 * precision], axis=-1)
        self._linear = np.ascontiguousarray(linear.reshape(-1, linear.shape[-1]).T, np.float32)

    @classmethod
    def flat(cls, frames: np.ndarray, states: int) -> "_Mixtures":
        """Every state like all of speech."""
        mean, variance = frames.mean(0), frames.var(0)
        shape = (states, 1, len(mean))
        return cls(
            np.ones((states, 1)), np.broadcast_to(mean, shape).copy(), np.broadcast_to(variance, shape).copy(),
            variance * _VARIANCE_FLOOR,
        )  # fmt: skip

    def split(self) -> "_Mixtures":
        """Twice as many: each Gaussian becomes two beside its mean."""
        step = 0.2 * np.sqrt(self.variances)
        return _Mixtures(
            np.repeat(self.weights / 2, 2, axis=1),
            np.stack([self.means - step, self.means + step], axis=2).reshape(self.states, 2 * self.size, -1),
            np.repeat(self.variances, 2, axis=1),
            self.floor,
        )

    def log_likelihoods(self, frames: np.ndarray) -> np.ndarray:
        """(frames, features) -> (frames, states), the likeliest Gaussian standing for its state."""
        both = np.concatenate([frames, frames**2], axis=1)
        each = (both @ self._linear + self._constant).reshape(len(frames), self.states, self.size)
        return functools.reduce(np.maximum, [each[:, :, i] for i in range(self.size)])

    def reestimated(self, utterances: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> "_Mixtures":
        """The Gaussians that fit the frames that each state was given."""
        count = np.zeros((self.states, self.size))
        first = np.zeros_like(self.means)
        second = np.zeros_like(self.means)
        frames, states = np.concatenate(utterances), np.concatenate(labels)
        order = np.argsort(states, kind="stable")
        bounds = np.searchsorted(states[order], np.arange(self.states + 1))
        for state in range(self.states):
            own = frames[order[bounds[state] : bounds[state + 1]]].astype(np.float32)
            if not len(own):
                continue
            columns = slice(state * self.size, (state + 1) * self.size)
            both = np.concatenate([own, own**2], axis=1)
            logs = both @ self._linear[:, columns] + self._constant[columns]
            share = np.exp(logs - np.logaddexp.reduce(logs, axis=1, keepdims=True))
            count[state] = share.sum(0)
            sums = share.T @ both
            first[state], second[state] = np.split(sums, 2, axis=1)
        seen = count[..., None] > 10  # a Gaussian with next to no frames keeps its shape
        safe = np.maximum(count, 1e-3)[..., None]
        means = np.where(seen, first / safe, self.means)
        variances = np.where(seen, np.maximum(second / safe - means**2, self.floor), self.variances)
        weights = (count + 0.1) / (count + 0.1).sum(1, keepdims=True)
        return _Mixtures(weights, means, variances, self.floor)


def _mfcc(dataset: ShardDataset, row: int) -> np.ndarray:
    """Cepstra with their first and second differences, a frame each 10 ms: (frames, 39) float32."""
    samples = torch.from_numpy(dataset.audio(row).astype(np.float32) / 32768)[None]
    log_mel, dct = _front_end()
    with torch.no_grad():
        cepstra = (log_mel(samples, torch.tensor([samples.shape[1]]))[0][0] @ dct).T
        delta = torchaudio.functional.compute_deltas(cepstra, win_length=5)
        return torch.cat([cepstra, delta, torchaudio.functional.compute_deltas(delta, win_length=5)]).T.numpy()


@functools.cache
def _front_end() -> tuple[LogMel, torch.Tensor]:
    return LogMel(FeatureConfig(bands=40)), torchaudio.functional.create_dct(_CEPSTRA, 40, "ortho")


def _subtract_speaker_means(features: list[np.ndarray], speakers: Sequence[str]) -> None:
    """Take each speaker's mean from his frames, in place; an utterance of nobody is its own speaker."""
    groups: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        groups.setdefault(speaker or f"row {row}", []).append(row)
    for rows in groups.values():
        mean = np.concatenate([features[row] for row in rows]).mean(0) if any(len(features[r]) for r in rows) else 0.0
        for row in rows:
            features[row] -= mean
