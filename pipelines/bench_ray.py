"""How much of the speed of plain processes Ray keeps, in `asr prepare` and `asr transcribe`; start-up aside.

    python -m pipelines.bench_ray prepare MANIFEST --workers 2
    python -m pipelines.bench_ray transcribe MANIFEST --workers 2 --repeat 20

Plain processes do the same work on equal shares, without Ray and without the decoder's process. A speed is that of
all but the first tenth of the audio, so that it holds neither start-up nor shutdown; rounds alternate. On a machine
that others use too, compare the processor time: there, more processes get more of it.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer

from asr.manifest import Utterance, read_manifest
from pipelines.commands.options import tell
from pipelines.decoder import decode_here
from pipelines.processes import ProcessState, state_of

_START_SHARE = 0.1  # of the audio, whose time does not count
_SPAWN = multiprocessing.get_context("spawn")

app = typer.Typer(add_completion=False, help=__doc__)
ManifestArgument = Annotated[Path, typer.Argument(help="NeMo JSON Lines ...")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Plain processes, and Ray workers.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Times that both are measured.")]


class Finish(NamedTuple):
    """So many seconds of audio were finished at `time` (of time.time)."""

    time: float
    seconds: float


class Cost(NamedTuple):
    """Seconds of audio in a second, and seconds of processor time for an hour of audio."""

    speed: float
    cpu: float


def cost(finishes: Sequence[Finish], cpu: Sequence[tuple[float, float]]) -> Cost:
    """What the work took, the start left out; `cpu` are times with the processor seconds used until then."""
    ordered = sorted(finishes)
    total = sum(finish.seconds for finish in ordered)
    seen, first = 0.0, 0
    while seen < _START_SHARE * total:
        seen += ordered[first].seconds
        first += 1
    begin, end, seconds = ordered[first - 1].time, ordered[-1].time, total - seen
    times = [when for when, _ in cpu]
    used = np.maximum.accumulate([seconds for _, seconds in cpu])  # a process that has ended is not seen any more
    spent = float(np.interp(end, times, used) - np.interp(begin, times, used))
    return Cost(speed=seconds / (end - begin), cpu=spent / seconds * 3600)


def compare(plain: Callable[[], Cost], ray: Callable[[], Cost], rounds: int) -> None:
    """Measure both in turn, and print each round and the medians."""
    kept, extra = [], []
    for number in range(1, rounds + 1):
        a, b = plain(), ray()
        kept.append(b.speed / a.speed)
        extra.append(b.cpu / a.cpu)
        print(
            f"round {number}: plain {a.speed:,.0f}, Ray {b.speed:,.0f} s of audio a second; "
            f"plain {a.cpu:.1f}, Ray {b.cpu:.1f} s of processor time for an hour of audio"
        )
    print(
        f"Ray has {statistics.median(kept):.3f} of the speed of plain processes, "
        f"and {statistics.median(extra):.3f} of their processor time (medians of {rounds})"
    )


def measure(way: Callable[[], list[Finish]]) -> Cost:
    """What the work takes that `way` does."""
    samples = [(time.time(), processor_seconds())]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(1.0):
            samples.append((time.time(), processor_seconds() - time.thread_time()))  # looking costs something too

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        finishes = way()
    finally:
        ended.set()
        sampler.join()
    return cost(finishes, samples)


def processor_seconds() -> float:
    """Used by this process and all below it that are there now; on Linux."""
    states: dict[int, ProcessState] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            states[int(path.name)] = state_of(int(path.name))
    family = {os.getpid()}
    while more := {child for child, state in states.items() if state.parent in family} - family:
        family |= more
    return sum(states[number].seconds for number in family)


def _in_processes(work: Callable[..., None], shares: Sequence[Any], *arguments: Any) -> list[Finish]:
    """Run `work(share, *arguments, together, finishes)` in a process for each share; what they put into the queue.

    They wait at `together`, so that all begin when all have started up.
    """
    finishes, together = _SPAWN.Queue(), _SPAWN.Barrier(len(shares))
    processes = [_SPAWN.Process(target=work, args=(share, *arguments, together, finishes)) for share in shares]
    for process in processes:
        process.start()
    collected: list[Finish] = []
    for _ in processes:  # each ends with None
        while (finish := finishes.get()) is not None:
            collected.append(finish)
    for process in processes:
        process.join()
    return collected


# ---- prepare


@app.command()
def prepare(
    manifest: ManifestArgument,
    workers: WorkersOption = 2,
    rounds: RoundsOption = 2,
    shard_seconds: Annotated[float, typer.Option(help="Audio in a shard.")] = 600.0,
) -> None:
    """Compare `asr prepare` with plain processes that make the same shards."""
    from pipelines.prepare import prepare as run
    from pipelines.prepare import shard_jobs

    with tempfile.TemporaryDirectory(prefix="asr-bench-") as folder:

        def ray() -> list[Finish]:
            out = Path(folder, f"ray-{time.monotonic_ns()}")
            tell(f"prepare with {workers} Ray tasks at a time")
            run([manifest], out, workers=workers, shard_seconds=shard_seconds)
            return _finished_shards(out)

        def plain() -> list[Finish]:
            out = Path(folder, f"plain-{time.monotonic_ns()}")
            out.mkdir()
            tell(f"prepare in {workers} plain processes")
            jobs = shard_jobs(str(manifest), read_manifest(manifest)[0], str(out), shard_seconds=shard_seconds)
            _in_processes(_make_shards, [jobs[i::workers] for i in range(workers)])
            return _finished_shards(out)

        compare(lambda: measure(plain), lambda: measure(ray), rounds)


def _make_shards(jobs: list, together: Any, finishes: Any) -> None:
    from pipelines.shard import make_shard

    together.wait()
    for job in jobs:
        make_shard(job, decode=decode_here)
    finishes.put(None)


def _finished_shards(out: Path) -> list[Finish]:
    """When each shard was finished, from the times of the files."""
    reports = sorted(out.glob("shard-*.json"))
    return [Finish(path.stat().st_mtime_ns / 1e9, json.loads(path.read_text())["seconds"]) for path in reports]


# ---- transcribe


@app.command()
def transcribe(
    manifest: ManifestArgument,
    workers: WorkersOption = 2,
    rounds: RoundsOption = 2,
    repeat: Annotated[int, typer.Option(min=1, help="Times that the rows are there.")] = 1,
) -> None:
    """Compare `asr transcribe` of a manifest with plain processes that recognize the same batches."""
    from pipelines.predictions import batches_of
    from pipelines.transcribe import RecognizerOptions
    from pipelines.transcribe import transcribe as run

    rows = read_manifest(manifest)[0] * repeat
    with tempfile.TemporaryDirectory(prefix="asr-bench-") as folder:
        whole = Path(folder, "all.jsonl")
        whole.write_text("".join(json.dumps({"audio_filepath": r.audio, "duration": r.duration}) + "\n" for r in rows))
        rows = read_manifest(whole)[0]

        def ray() -> list[Finish]:
            tell(f"transcribe {len(rows):,} rows with {workers} Ray actors")
            out = Path(folder, f"ray-{time.monotonic_ns()}")
            results = run([whole], RecognizerOptions(), output_dir=out, workers=workers)
            return [Finish(time.time(), result.seconds) for result in results]

        def plain() -> list[Finish]:
            tell(f"transcribe {len(rows):,} rows in {workers} plain processes")
            batches = batches_of(rows)
            return _in_processes(_recognize, [batches[i::workers] for i in range(workers)], RecognizerOptions())

        compare(lambda: measure(plain), lambda: measure(ray), rounds)


def _recognize(batches: Sequence[Sequence[Utterance]], options: Any, together: Any, finishes: Any) -> None:
    from pipelines.predictions import recognize_rows

    recognizer = options.load()
    together.wait()
    for batch in batches:
        for prediction in recognize_rows(recognizer, batch, "offline", decode=decode_here):
            finishes.put(Finish(time.time(), prediction.seconds))
    finishes.put(None)


if __name__ == "__main__":
    app()
