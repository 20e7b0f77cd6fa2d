"""`asr prepare`: manifests become shards of checked 16 kHz audio, texts and feature statistics, by Ray Data.

Rows keep the order of the manifests and are cut into shards of about ten minutes. One task makes one shard
and its report (`shard-00000.json`); a shard whose report has the same fingerprint (rows, files, settings) is
not made again, so a job that was killed goes on where it was and ends with the same bytes.
"""

import json
import logging
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.config import FeatureConfig
from asr.errors import AsrError, ConfigError, ManifestError, Problem
from asr.lexicon import check_english
from asr.manifest import TEXT_NAMES, Utterance, names_in
from asr.text import normalize
from asr.training.shards import VERSION, Statistics
from pipelines.progress import meter, row_seconds
from pipelines.report_data import data_report
from pipelines.shard import ShardJob, finished_report, make_shard, writing
from pipelines.storage import Store, is_remote, read_any_manifest

STORES = ("audio", "features")
LEXICONS = (None, "cmudict")
_log = logging.getLogger("asr")
_MOST_KNOWN = 0.8  # share of words in the dictionary of pronunciations, below which it is told
_TASK_DEATHS = 5  # of one shard's task, before the job gives up: nodes do get lost, but not that often


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What `prepare` did: `skipped` are the rows left out, `reused` the shards found finished."""

    out: str
    utterances: int
    seconds: float
    shards: int
    reused: int
    skipped: tuple[Problem, ...]


class _Source(NamedTuple):
    """A manifest, the shards that it becomes, and its rows that could not be read."""

    manifest: str
    jobs: list[ShardJob]
    unread: list[Problem]


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What a data set is made of, and where: `folder`, which the caller calls `out`."""

    sources: list[_Source]
    folder: Store
    out: str
    store: str

    @property
    def jobs(self) -> list[ShardJob]:
        """The shards of all manifests, in their order."""
        return [job for source in self.sources for job in source.jobs]

    def skipped(self, reports: dict[str, dict]) -> list[Problem]:
        """Rows that could not be read, then those that finished shards left out."""
        unread = [problem for source in self.sources for problem in source.unread]
        made = [reports[job.name] for job in self.jobs if job.name in reports]
        return unread + [Problem(**problem) for report in made for problem in report["skipped"]]

    def write_skipped(self, skipped: list[Problem]) -> None:
        """List them in skipped.jsonl."""
        lines = [json.dumps(asdict(problem), ensure_ascii=False) + "\n" for problem in skipped]
        self.folder.write("skipped.jsonl", "".join(lines))


def prepare(
    manifests: Sequence[Path | str],
    out: str | Path,
    *,
    workers: int = 1,
    store: str = "audio",
    lexicon: str | None = None,
    address: str | None = None,
    shard_seconds: float = 600.0,
    max_errors: int | None = None,
) -> Summary:
    """Check and decode the rows of `manifests` once, and write the folder `out` that training reads.

    Run again after an interruption, it goes on; run again with the same data, it does nothing.

    Args:
        manifests: files or folders that `asr.manifest.read_manifest` knows, or URLs of such (s3://...).
        out: the folder for shards, dataset.json, skipped.jsonl and report.html, or its URL; on a cluster all
            nodes must see it.
        workers: Ray Data tasks at a time; 0 works in this process and imports no ray.
        store: "audio" keeps samples, "features" keeps float16 log-mel frames instead.
        lexicon: "cmudict" adds the phones of English text; None adds none.
        address: a running Ray cluster; None: RAY_ADDRESS, or else a local one.
        shard_seconds: audio in a shard, by the manifest's durations.
        max_errors: stop when more rows than that cannot be used; None goes on to the end.

    Raises:
        ConfigError: a setting is impossible, or a package for it is missing.
        ManifestError: a manifest cannot be read or has no usable row, or there are more than `max_errors`.
        AsrError: `out` cannot be written.
    """
    if store not in STORES:
        raise ConfigError(f"store {store!r}: allowed are {', '.join(STORES)}")
    if lexicon not in LEXICONS:
        raise ConfigError(f"lexicon {lexicon!r}: allowed are cmudict, or none")
    if workers < 0:
        raise ConfigError(f"workers {workers}: 0 works in this process, 1 or more are Ray tasks at a time")
    if max_errors is not None and max_errors < 0:
        raise ConfigError(f"max_errors {max_errors}: must be 0 or more")
    if not manifests:
        raise ManifestError("no manifest was given")
    folder = Store(str(out))
    sources: list[_Source] = []
    count = 0
    for manifest in map(str, manifests):
        rows, unread = read_any_manifest(manifest)
        if all(row.text is None for row in rows):
            _log.warning("%s: %s", manifest, _without_texts(manifest, len(rows)))
        if lexicon and (known := check_english(manifest, (normalize(row.text or "") for row in rows))) < _MOST_KNOWN:
            _log.warning("%s: the dictionary of pronunciations has %.0f %% of its words", manifest, 100 * known)
        jobs = shard_jobs(manifest, rows, folder.folder, count, store, lexicon, shard_seconds)
        count += len(jobs)
        sources.append(_Source(manifest, jobs, unread))

    with ExitStack() as held:
        with writing(folder.folder):
            held.enter_context(folder.held())
        plan = _Plan(sources=sources, folder=folder, out=str(out), store=store)
        return _prepare(plan, workers, address, max_errors)


def _prepare(plan: _Plan, workers: int, address: str | None, max_errors: int | None) -> Summary:
    """Make the shards that are not there yet, and of all a data set."""
    folder = plan.folder
    with writing(folder.folder):
        names = folder.names()
        reports = {
            job.name: report for job in plan.jobs if job.name in names and (report := finished_report(job, folder))
        }
        reused = len(reports)
        todo = [job for job in plan.jobs if job.name not in reports]
        if todo and "dataset.json" in names:  # from here to the end the folder is not a data set
            folder.remove("dataset.json")
    bad = len(plan.skipped(reports))
    if max_errors is not None and bad > max_errors:
        raise _too_many(plan, reports, max_errors)
    if todo:
        with meter("preparing", sum(job.seconds for job in todo)) as advance:
            for job, report in _made(todo, workers, address):
                reports[job.name] = report
                advance(job.seconds, report["seconds"])
                bad += len(report["skipped"])
                if max_errors is not None and bad > max_errors:
                    raise _too_many(plan, reports, max_errors)
    with writing(folder.folder):
        return _assemble(plan, reports, reused=reused)


def shard_jobs(
    manifest: str,
    rows: list[Utterance],
    out: str,
    first: int = 0,
    store: str = "audio",
    lexicon: str | None = None,
    shard_seconds: float = 600.0,
) -> list[ShardJob]:
    """The shards that the rows of a manifest become in `out`, counted from `first`."""
    has_texts = any(row.text is not None for row in rows)
    return [
        ShardJob(
            out=out,
            name=f"shard-{number:05d}.arrow",
            rows=part,
            source=_source_name(manifest),
            needs_text=has_texts,
            store=store,
            lexicon=lexicon,
        )
        for number, part in enumerate(_cut(rows, shard_seconds), first)
    ]


def _without_texts(manifest: str, rows: int) -> str:
    """What to say of a manifest without texts: they may stand under a name that means nothing here."""
    names = [] if is_remote(manifest) else names_in(manifest)
    has = f"it has {', '.join(names)}; " if names else ""
    known = f"in tables and JSON, a text is called {', '.join(TEXT_NAMES[:-1])} or {TEXT_NAMES[-1]}"
    return f"none of its {rows} rows has a text: good for noise only ({has}{known})"


def _cut(rows: list[Utterance], shard_seconds: float) -> Iterator[tuple[Utterance, ...]]:
    """The rows in their order, in runs of at least `shard_seconds` (the last may be shorter)."""
    part: list[Utterance] = []
    seconds = 0.0
    for row in rows:
        part.append(row)
        seconds += row_seconds(row)
        if seconds >= shard_seconds:
            yield tuple(part)
            part, seconds = [], 0.0
    if part:
        yield tuple(part)


def _source_name(manifest: str) -> str:
    """The name of the manifest's folder; its own, where it is one."""
    if is_remote(manifest):
        path = PurePosixPath(manifest)
        return path.parent.name if path.suffix or path.name == "wav.scp" else path.name
    resolved = Path(manifest).resolve()
    return resolved.name if resolved.is_dir() else resolved.parent.name


# ---- making the shards


def _made(jobs: list[ShardJob], workers: int, address: str | None) -> Iterator[tuple[ShardJob, dict]]:
    """Make the shards, in this process or as Ray Data tasks; give each with its report when it is finished.

    Raises:
        AsrError: a shard could not be written, or its task died again and again.
    """
    if workers == 0:
        for job in jobs:
            yield job, make_shard(job)
        return

    from pipelines import ray_local

    with ray_local.start(address, cpus=workers) as ray:
        items = [{"index": index, "job": pickle.dumps(job)} for index, job in enumerate(jobs)]
        with warnings.catch_warnings(action="ignore"):  # max_retries will be a named argument in Ray 2.64
            tasks = ray.data.from_items(items, override_num_blocks=len(items)).map(
                _make_shard_task,
                num_cpus=1,
                max_retries=_TASK_DEATHS,  # without it, for ever
                compute=ray.data.TaskPoolStrategy(size=workers),
            )
        rows = iter(tasks.iter_rows())
        while True:
            try:
                result = next(rows, None)
            except ray.exceptions.RayError as error:
                reason = str(error).strip().split("\n")[0]
                raise AsrError(f"a task died {_TASK_DEATHS + 1} times ({reason}); finished shards are kept") from error
            if result is None:
                return
            if result["error"]:
                raise AsrError(result["error"])
            yield jobs[result["index"]], json.loads(result["report"])


def _make_shard_task(item: dict) -> dict:
    """`make_shard` as a Ray Data row: an error for the reader travels as data, not as a traceback."""
    told = {"index": item["index"], "report": "", "error": ""}
    try:
        return told | {"report": json.dumps(make_shard(pickle.loads(item["job"])))}
    except AsrError as error:
        return told | {"error": str(error)}


def _too_many(plan: _Plan, reports: dict[str, dict], most: int) -> ManifestError:
    """The error where more than `most` rows are unusable; skipped.jsonl tells of those known so far."""
    skipped = plan.skipped(reports)
    with writing(plan.folder.folder):
        plan.write_skipped(skipped)
    return ManifestError(
        f"{len(skipped)} rows cannot be used so far, {most} are allowed; the first: {skipped[0]}. "
        f"All are in {plan.folder.path('skipped.jsonl')}: mend them or allow more, and run again; "
        f"{len(reports)} finished shards are kept"
    )


# ---- the whole


def _assemble(plan: _Plan, reports: dict[str, dict], *, reused: int) -> Summary:
    """Join the shards' reports into dataset.json, skipped.jsonl and report.html; remove shards of earlier runs."""
    folder, skipped = plan.folder, plan.skipped(reports)
    plan.write_skipped(skipped)
    for source in plan.sources:
        if not any(reports[job.name]["utterances"] for job in source.jobs):
            lost = [problem for job in source.jobs for problem in reports[job.name]["skipped"]]
            raise ManifestError(
                f"{source.manifest}: none of its {len(lost)} rows is usable; the first: {Problem(**lost[0])}. "
                f"All are in {folder.path('skipped.jsonl')}"
            )
    in_order = {job.name: reports[job.name] for job in plan.jobs}
    characters: Counter[str] = Counter()
    for report in in_order.values():
        characters.update(report["characters"])
    statistics = Statistics.join(
        Statistics(frames=r["frames"], mean=np.array(r["mean"]), variance=np.array(r["variance"]))
        for r in in_order.values()
        if r["frames"]
    )
    told = [
        {"file": name, "utterances": report["utterances"], "seconds": report["seconds"]}
        for name, report in in_order.items()
    ]
    dataset = {
        "version": VERSION,
        "sample_rate": SAMPLE_RATE,
        "features": asdict(FeatureConfig()),
        "store": plan.store,
        "shards": told,
        "utterances": sum(shard["utterances"] for shard in told),
        "seconds": sum(shard["seconds"] for shard in told),
        "skipped": len(skipped),
        "characters": dict(sorted(characters.items())),
        "frames": statistics.frames,
        "mean": statistics.mean.tolist(),
        "variance": statistics.variance.tolist(),
    }
    names = dict.fromkeys(_source_name(source.manifest) for source in plan.sources)
    page = data_report(f"Prepared data: {', '.join(names)}", list(in_order.values()), statistics, skipped)
    folder.write("report.html", page)
    folder.write("dataset.json", json.dumps(dataset, ensure_ascii=False, indent=1))
    # Only then: where this is interrupted, no dataset.json names a shard that is gone.
    kept = {name for job in plan.jobs for name in (job.name, job.report)}
    for stray in folder.names():
        if stray.startswith("shard-") and stray not in kept:
            folder.remove(stray)
    return Summary(
        out=plan.out,
        utterances=dataset["utterances"],
        seconds=dataset["seconds"],
        shards=len(in_order),
        reused=reused,
        skipped=tuple(skipped),
    )
