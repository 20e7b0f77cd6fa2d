"""`asr prepare`: manifests become shards of checked 16 kHz audio, texts and feature statistics, by Ray Data.

Rows keep the order of the manifests and are cut into shards of about ten minutes. One task makes one shard
and its report (`shard-00000.json`); a shard whose report has the same fingerprint (rows, files, settings) is
not made again, so a job that was killed goes on where it was and ends with the same bytes.
"""

import hashlib
import json
import os
import pickle
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from asr.audio import SAMPLE_RATE, read_audio
from asr.config import FeatureConfig
from asr.errors import AsrError, AudioError, ConfigError, ManifestError, Problem
from asr.features import LogMel
from asr.files import write_atomically
from asr.lexicon import phones_of
from asr.manifest import Utterance, read_manifest
from asr.text import normalize
from asr.training.shards import VERSION, Statistics, write_shard

STORES = ("audio", "features")
LEXICONS = (None, "cmudict")
SHORTEST_SECONDS = 0.05
DURATION_TOLERANCE = (0.2, 0.05)  # seconds, share of the manifest's: the larger one counts
_FEATURE_BLOCK = 30 * SAMPLE_RATE
_ASSUMED_SECONDS = 5.0  # of a row that doesn't tell, for cutting shards and the progress bar


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `prepare` did: `skipped` are the rows left out, `reused` the shards found finished."""

    out: Path
    utterances: int
    seconds: float
    shards: int
    reused: int
    skipped: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One shard to make: all that its task needs to know."""

    shard: Path
    rows: tuple[Utterance, ...]
    source: str
    needs_text: bool
    store: str
    lexicon: str | None

    @property
    def report(self) -> Path:
        return self.shard.with_suffix(".json")

    @property
    def seconds(self) -> float:
        return sum(map(_nominal_seconds, self.rows))

    def fingerprint(self) -> str:
        """Changes with the rows, with their files (size, time) and with the settings."""
        rows = [asdict(row) for row in self.rows]
        settings = [VERSION, asdict(FeatureConfig()), self.source, self.needs_text, self.store, self.lexicon]
        told = json.dumps([settings, rows, [_file_state(row.audio) for row in self.rows]])
        return hashlib.sha256(told.encode()).hexdigest()


def prepare(
    manifests: list[Path] | list[str],
    out: str | Path,
    *,
    workers: int = 1,
    store: str = "audio",
    lexicon: str | None = None,
    address: str | None = None,
    shard_seconds: float = 600.0,
) -> Summary:
    """Check and decode the rows of `manifests` once, and write the folder `out` that training reads.

    Run again after an interruption, it goes on; run again with the same data, it does nothing.

    Args:
        manifests: files or folders that `asr.manifest.read_manifest` knows.
        out: the folder for shards, dataset.json and skipped.jsonl; on a cluster all nodes must see it.
        workers: Ray Data tasks at a time; 0 works in this process and imports no ray.
        store: "audio" keeps samples, "features" keeps float16 log-mel frames instead.
        lexicon: "cmudict" adds the phones of English text; None adds none.
        address: a running Ray cluster; None: RAY_ADDRESS, or else a local one.
        shard_seconds: audio in a shard, by the manifest's durations.

    Raises:
        ConfigError: a setting is impossible, or a package for it is missing.
        ManifestError: a manifest cannot be read or has no usable row.
        AsrError: `out` cannot be written.
    """
    out = Path(out)
    if store not in STORES:
        raise ConfigError(f"store {store!r}: allowed are {', '.join(STORES)}")
    if lexicon not in LEXICONS:
        raise ConfigError(f"lexicon {lexicon!r}: allowed are cmudict, or none")
    if workers < 0:
        raise ConfigError(f"workers {workers}: 0 works in this process, 1 or more are Ray tasks at a time")
    if not manifests:
        raise ManifestError("no manifest was given")
    if lexicon:
        phones_of("")  # a missing package is found here, not in every task

    jobs: list[_Job] = []
    unread: list[Problem] = []
    owner: list[Path] = []  # the manifest of each job
    for manifest in map(Path, manifests):
        rows, problems = read_manifest(manifest)
        unread += problems
        for part in _cut(rows, shard_seconds):
            jobs.append(
                _Job(
                    shard=out.absolute() / f"shard-{len(jobs):05d}.arrow",
                    rows=part,
                    source=_source(manifest),
                    needs_text=any(row.text is not None for row in rows),
                    store=store,
                    lexicon=lexicon,
                )
            )
            owner.append(manifest)

    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for stray in out.glob("*.tmp-[0-9]*"):
            stray.unlink(missing_ok=True)
        todo = [job for job in jobs if not _is_finished(job)]
        if todo:  # what follows changes shards: from here to the end the folder is not a data set
            (out / "dataset.json").unlink(missing_ok=True)
    _run(todo, workers, address)
    with _writing(out):
        return _assemble(out, jobs, owner, unread, store, reused=len(jobs) - len(todo))


def _cut(rows: list[Utterance], shard_seconds: float) -> Iterator[tuple[Utterance, ...]]:
    """The rows in their order, in runs of at least `shard_seconds` (the last may be shorter)."""
    part: list[Utterance] = []
    seconds = 0.0
    for row in rows:
        part.append(row)
        seconds += _nominal_seconds(row)
        if seconds >= shard_seconds:
            yield tuple(part)
            part, seconds = [], 0.0
    if part:
        yield tuple(part)


def _nominal_seconds(row: Utterance) -> float:
    return row.duration if row.duration is not None else _ASSUMED_SECONDS


def _source(manifest: Path) -> str:
    manifest = manifest.resolve()
    return manifest.name if manifest.is_dir() else manifest.parent.name


def _file_state(audio: str) -> tuple[int, int] | None:
    try:
        state = os.stat(audio)
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _is_finished(job: _Job) -> bool:
    try:
        report = json.loads(job.report.read_text(encoding="utf-8"))
        return report["fingerprint"] == job.fingerprint() and report["bytes"] == job.shard.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---- running the jobs


def _run(jobs: list[_Job], workers: int, address: str | None) -> None:
    """Make the shards, in this process or as Ray Data tasks, with a progress bar on stderr."""
    if not jobs:
        return
    columns = (TextColumn("preparing"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        hours = sum(job.seconds for job in jobs) / 3600
        task = progress.add_task("", total=hours, told="starting")
        start = time.monotonic()
        done = 0.0
        for index in _finished_jobs(jobs, workers, address):
            done += jobs[index].seconds / 3600
            rate = done / max(time.monotonic() - start, 1e-9) * 60
            told = f"{done:.2f} of {hours:.2f} h of audio, {rate:.2f} h a minute"
            progress.update(task, completed=done, told=told)


def _finished_jobs(jobs: list[_Job], workers: int, address: str | None) -> Iterator[int]:
    """Make every shard; give the index of each as it is finished.

    Raises:
        AsrError: a shard could not be written.
    """
    if workers == 0:
        for index, job in enumerate(jobs):
            make_shard(job)
            yield index
        return

    from pipelines import ray_local

    with ray_local.start(address, cpus=workers) as ray:
        items = [{"index": index, "job": pickle.dumps(job)} for index, job in enumerate(jobs)]
        tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _make_shard_task, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=workers)
        )
        for result in tasks.iter_rows():
            if result["error"]:
                raise AsrError(result["error"])
            yield result["index"]


def _make_shard_task(item: dict) -> dict:
    """`make_shard` as a Ray Data row: an error for the reader travels as data, not as a traceback."""
    try:
        make_shard(pickle.loads(item["job"]))
    except AsrError as error:
        return {"index": item["index"], "error": str(error)}
    return {"index": item["index"], "error": ""}


# ---- one shard


def make_shard(job: _Job) -> None:
    """Decode and check the rows of `job`; write its shard, then its report.

    Raises:
        AsrError: the shard cannot be written.
    """
    fingerprint = job.fingerprint()  # before reading: a file that changes meanwhile is read again next time
    rows: list[dict] = []
    problems: list[Problem] = []
    characters: Counter[str] = Counter()
    sums = _FeatureSums()
    with _one_thread():
        for utterance in job.rows:
            try:
                row, features = _prepare_row(utterance, job)
            except AsrError as error:
                problems.append(Problem(utterance.where, str(error)))
            except Exception as error:  # whatever a decoder throws costs one row, not a night's work
                reason = f"{utterance.audio}: {type(error).__name__}: {error}"
                problems.append(Problem(utterance.where, reason))
            else:
                rows.append(row)
                characters.update(row["text"])
                sums.add(features)
    statistics = sums.statistics()
    with _writing(job.shard):
        write_shard(job.shard, rows)
        report = {
            "fingerprint": fingerprint,
            "bytes": job.shard.stat().st_size,
            "utterances": len(rows),
            "seconds": sum(row["n_samples"] for row in rows) / SAMPLE_RATE,
            "skipped": [asdict(problem) for problem in problems],
            "characters": dict(sorted(characters.items())),
            "frames": statistics.frames,
            "mean": statistics.mean.tolist(),
            "variance": statistics.variance.tolist(),
        }
        write_atomically(job.report, json.dumps(report, ensure_ascii=False))


def _prepare_row(utterance: Utterance, job: _Job) -> tuple[dict, np.ndarray]:
    """A shard's row, and its features: (frames, bands) float32.

    Raises:
        AsrError: the row is not usable; the message says why.
    """
    text = normalize(utterance.text or "")
    if job.needs_text and not text:
        raise ManifestError(f"no word in the text {utterance.text or ''!r}")
    # a whole file is read to its end, to notice one that is longer than told
    duration = utterance.duration if utterance.offset is not None else None
    samples = read_audio(utterance.audio, offset=utterance.offset or 0.0, duration=duration)
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


# ---- the whole


def _assemble(
    out: Path, jobs: list[_Job], owner: list[Path], unread: list[Problem], store: str, *, reused: int
) -> Summary:
    """Join the shards' reports into dataset.json and skipped.jsonl, and remove shards of earlier runs."""
    reports = [json.loads(job.report.read_text(encoding="utf-8")) for job in jobs]
    skipped = unread + [Problem(**problem) for report in reports for problem in report["skipped"]]
    for manifest in dict.fromkeys(owner):
        own = [report for report, of in zip(reports, owner, strict=True) if of == manifest]
        if not any(report["utterances"] for report in own):
            lost = [Problem(**problem) for report in own for problem in report["skipped"]]
            raise ManifestError(f"{manifest}: none of its {len(lost)} rows is usable; the first: {lost[0]}")
    characters: Counter[str] = Counter()
    for report in reports:
        characters.update(report["characters"])
    statistics = Statistics.join(
        Statistics(frames=r["frames"], mean=np.array(r["mean"]), variance=np.array(r["variance"]))
        for r in reports
        if r["frames"]
    )
    told = [
        {"file": job.shard.name, "utterances": report["utterances"], "seconds": report["seconds"]}
        for job, report in zip(jobs, reports, strict=True)
    ]
    dataset = {
        "version": VERSION,
        "sample_rate": SAMPLE_RATE,
        "features": asdict(FeatureConfig()),
        "store": store,
        "shards": told,
        "utterances": sum(shard["utterances"] for shard in told),
        "seconds": sum(shard["seconds"] for shard in told),
        "skipped": len(skipped),
        "characters": dict(sorted(characters.items())),
        "frames": statistics.frames,
        "mean": statistics.mean.tolist(),
        "variance": statistics.variance.tolist(),
    }
    lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in skipped]
    write_atomically(out / "skipped.jsonl", "".join(lines))
    write_atomically(out / "dataset.json", json.dumps(dataset, ensure_ascii=False, indent=1))
    kept = {job.shard for job in jobs} | {job.report for job in jobs}
    for stray in out.absolute().glob("shard-[0-9]*"):
        if stray not in kept:
            stray.unlink()
    return Summary(
        out=out,
        utterances=dataset["utterances"],
        seconds=dataset["seconds"],
        shards=len(jobs),
        reused=reused,
        skipped=tuple(skipped),
    )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an error that names the place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise AsrError(f"{path}: cannot write: {reason}; finished shards are kept") from error
