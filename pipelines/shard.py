"""One shard of prepared data: recordings are decoded, checked and stored, with a report of what is in them."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache

import numpy as np
import torch

from asr.audio import SAMPLE_RATE
from asr.config import FeatureConfig
from asr.errors import AsrError, AudioError, ManifestError, Problem
from asr.features import LogMel
from asr.lexicon import phones_of
from asr.manifest import Utterance
from asr.text import normalize
from asr.training.shards import VERSION, Statistics, write_shard
from pipelines.decoder import Decode, Part, decode_all
from pipelines.progress import row_seconds
from pipelines.storage import Store, local_copies, states

SHORTEST_SECONDS = 0.05
DURATION_TOLERANCE = (0.2, 0.05)  # seconds, share of the manifest's: the larger one counts
_FEATURE_BLOCK = 30 * SAMPLE_RATE
_REPORT_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One shard to make: all that its task needs to know. `out` is the folder or URL, `name` the shard's in it."""

    out: str
    name: str
    rows: tuple[Utterance, ...]
    source: str
    needs_text: bool
    store: str
    lexicon: str | None

    @property
    def report(self) -> str:
        """The name of the shard's report."""
        return self.name.replace(".arrow", ".json")

    @property
    def seconds(self) -> float:
        """Audio in it, by what the manifest says."""
        return sum(map(row_seconds, self.rows))

    def fingerprint(self) -> str:
        """Changes with the rows, with their files (size, time) and with the settings."""
        rows = [asdict(row) for row in self.rows]
        settings = [VERSION, _REPORT_VERSION, asdict(FeatureConfig()), self.source, self.needs_text]
        told = json.dumps([settings, self.store, self.lexicon, rows, states([row.audio for row in self.rows])])
        return hashlib.sha256(told.encode()).hexdigest()


def finished_report(job: ShardJob, store: Store) -> dict | None:
    """The report of a shard that is there and was made from the same rows, files and settings."""
    try:
        report = json.loads(store.read(job.report))
        same = report["fingerprint"] == job.fingerprint() and report["bytes"] == store.size(job.name)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return report if same else None


def make_shard(job: ShardJob, decode: Decode = decode_all) -> dict:
    """Decode and check the rows of `job`; write its shard, then its report, and return that.

    Raises:
        AsrError: the shard cannot be written, or no recording can be decoded.
    """
    fingerprint = job.fingerprint()  # before reading: a file that changes meanwhile is read again next time
    rows: list[dict] = []
    problems: list[Problem] = []
    sums = _FeatureSums()
    with local_copies(row.audio for row in job.rows) as copies, _one_thread():
        there = [row for row in job.rows if not isinstance(copies[row.audio], AudioError)]
        decoded = decode([_part(row, str(copies[row.audio])) for row in there])
        for utterance in job.rows:
            copy = copies[utterance.audio]
            try:
                samples = copy if isinstance(copy, AudioError) else next(decoded)
                row, features = _prepare_row(utterance, samples, job)
            except AsrError as error:
                reason = str(error).replace(copy, utterance.audio) if isinstance(copy, str) else str(error)
                problems.append(Problem(utterance.where, reason))
            else:
                rows.append(row)
                sums.add(features)
    characters: Counter[str] = Counter()
    speakers: Counter[str] = Counter()
    for row in rows:
        characters.update(row["text"])
        speakers[row["speaker"]] += row["n_samples"]
    statistics = sums.statistics()
    store = Store(job.out)
    with writing(store.path(job.name)):
        with store.writing(job.name) as path:
            write_shard(path, rows)
        report = {
            "fingerprint": fingerprint,
            "bytes": store.size(job.name),
            "utterances": len(rows),
            "seconds": sum(row["n_samples"] for row in rows) / SAMPLE_RATE,
            "skipped": [asdict(problem) for problem in problems],
            "characters": dict(sorted(characters.items())),
            "frames": statistics.frames,
            "mean": statistics.mean.tolist(),
            "variance": statistics.variance.tolist(),
            "samples": [row["n_samples"] for row in rows],
            "text_lengths": [len(row["text"]) for row in rows],
            "speakers": dict(sorted(speakers.items())),  # samples of each
        }
        store.write(job.report, json.dumps(report, ensure_ascii=False))
    return report


def _part(row: Utterance, path: str) -> Part:
    # a whole file is read to its end, to notice one that is longer than told
    return Part(path, row.offset or 0.0, row.duration if row.offset is not None else None)


def _prepare_row(utterance: Utterance, samples: np.ndarray | AudioError, job: ShardJob) -> tuple[dict, np.ndarray]:
    """A shard's row, and its features: (frames, bands) float32.

    Raises:
        AsrError: the row is not usable; the message says why.
    """
    text = normalize(utterance.text or "")
    if job.needs_text and not text:
        raise ManifestError(f"no word in the text {utterance.text or ''!r}")
    if isinstance(samples, AudioError):
        raise samples
    seconds = len(samples) / SAMPLE_RATE
    if seconds < SHORTEST_SECONDS:
        raise AudioError(f"{utterance.audio}: {seconds:.3f} s of audio, less than {SHORTEST_SECONDS} s")
    if utterance.duration is not None:
        least, share = DURATION_TOLERANCE
        if abs(seconds - utterance.duration) > max(least, share * utterance.duration):
            raise AudioError(
                f"{utterance.audio}: {seconds:.2f} s of audio, the manifest says {utterance.duration:.2f} s"
            )
    # as the network will see them in training: after rounding to 16 bit
    pcm = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype("<i2")
    if job.needs_text and not pcm.any():  # nobody says the text there; noise may be silence
        raise AudioError(f"{utterance.audio}: silent: every sample is 0, or the channels cancel each other out in mono")
    features = _log_mel(pcm.astype(np.float32) / 32768.0)
    stored = features.astype("<f2") if job.store == "features" else None
    row = {
        "id": utterance.id,
        "audio": pcm.tobytes() if stored is None else b"",
        "n_samples": len(pcm),
        "features": None if stored is None else stored.tobytes(),
        "n_frames": None if stored is None else len(stored),
        "text": text,
        "phones": phones_of(text) if job.lexicon else None,
        "speaker": utterance.speaker or "",
        "source": job.source,
    }
    return row, features


@cache
def _feature_layer() -> LogMel:
    return LogMel(FeatureConfig()).eval()


def _log_mel(samples: np.ndarray) -> np.ndarray:
    """(n,) float32 at 16 kHz -> (n // 160, bands) float32, in blocks: long rows fit."""
    layer = _feature_layer()
    blocks = []
    with torch.inference_mode():
        state = layer.initial_state(1)
        for start in range(0, len(samples), _FEATURE_BLOCK):
            block, state = layer.step(torch.from_numpy(samples[None, start : start + _FEATURE_BLOCK]), state)
            blocks.append(block[0].numpy())
    return np.concatenate(blocks)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: the tasks fill the cores, and threads inside them would only fight."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _FeatureSums:
    """Sums of features and of their squares, in float64."""

    def __init__(self) -> None:
        self.frames = 0
        self.sum: np.ndarray | float = 0.0
        self.squares: np.ndarray | float = 0.0

    def add(self, features: np.ndarray) -> None:
        wide = features.astype(np.float64)
        self.frames += len(wide)
        self.sum = self.sum + wide.sum(axis=0)
        self.squares = self.squares + (wide**2).sum(axis=0)

    def statistics(self) -> Statistics:
        n = max(self.frames, 1)
        mean = np.asarray(self.sum) / n
        return Statistics(frames=self.frames, mean=mean, variance=np.asarray(self.squares) / n - mean**2)


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn an OSError into an error that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise AsrError(f"{path}: cannot write: {reason}; finished shards are kept") from error
