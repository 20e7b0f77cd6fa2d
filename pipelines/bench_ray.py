"""How much of the speed of plain processes Ray keeps, in `asr prepare` and `asr transcribe`; start-up aside.

    python -m pipelines.bench_ray prepare MANIFEST --workers 2
    python -m pipelines.bench_ray transcribe MANIFEST --workers 2 --repeat 20

Plain processes do the same work on equal shares, without Ray and without the decoder's process. A speed is that of
all but the first tenth of the audio, so that it holds neither start-up nor shutdown; rounds alternate.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from asr.manifest import Utterance, read_manifest
from pipelines.commands.options import tell
from pipelines.decoder import decode_here

_START_SHARE = 0.1  # of the audio, whose time does not count
_SPAWN = multiprocessing.get_context("spawn")

app = typer.Typer(add_completion=False, help=__doc__)
ManifestArgument = Annotated[Path, typer.Argument(help="NeMo JSON Lines ...")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Plain processes, and Ray workers.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Times that both are measured.")]


class Finish(NamedTuple):
    """So many seconds of audio were finished at `time` (of time.monotonic)."""

    time: float
    seconds: float


def speed(finishes: Sequence[Finish]) -> float:
    """Seconds of audio a second, the start left out."""
    ordered = sorted(finishes)
    total = sum(finish.seconds for finish in ordered)
    seen = 0.0
    for i, finish in enumerate(ordered):
        seen += finish.seconds
        if seen >= _START_SHARE * total:
            rest = ordered[i + 1 :]
            return sum(f.seconds for f in rest) / (rest[-1].time - finish.time)
    raise ValueError("nothing was finished")


def compare(plain: Callable[[], list[Finish]], ray: Callable[[], list[Finish]], rounds: int) -> None:
    """Measure both in turn, and print each round and the median of Ray's share."""
    shares = []
    for number in range(rounds):
        by_plain, by_ray = speed(plain()), speed(ray())
        shares.append(by_ray / by_plain)
        print(f"round {number + 1}: plain {by_plain:,.0f}, Ray {by_ray:,.0f} s of audio a second: {shares[-1]:.3f}")
    print(f"Ray keeps {statistics.median(shares):.3f} of the speed of plain processes (median of {rounds})")


def _in_processes(work: Callable[..., None], shares: Sequence[Any], *arguments: Any) -> list[Finish]:
    """Run `work(share, *arguments, finishes)` in a process for each share; what they put into the queue."""
    finishes = _SPAWN.Queue()
    processes = [_SPAWN.Process(target=work, args=(share, *arguments, finishes)) for share in shares]
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
def prepare(manifest: ManifestArgument, workers: WorkersOption = 2, rounds: RoundsOption = 2) -> None:
    """Compare `asr prepare` with plain processes that make the same shards."""
    from pipelines.prepare import prepare as run
    from pipelines.prepare import shard_jobs

    with tempfile.TemporaryDirectory(prefix="asr-bench-") as folder:

        def ray() -> list[Finish]:
            out = Path(folder, f"ray-{time.monotonic_ns()}")
            tell(f"prepare with {workers} Ray tasks at a time")
            run([manifest], out, workers=workers)
            return _finished_shards(out)

        def plain() -> list[Finish]:
            out = Path(folder, f"plain-{time.monotonic_ns()}")
            out.mkdir()
            tell(f"prepare in {workers} plain processes")
            jobs = shard_jobs(str(manifest), read_manifest(manifest)[0], str(out))
            _in_processes(_make_shards, [jobs[i::workers] for i in range(workers)])
            return _finished_shards(out)

        compare(plain, ray, rounds)


def _make_shards(jobs: list, finishes: Any) -> None:
    from pipelines.shard import make_shard

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
            return [Finish(time.monotonic(), result.seconds) for result in results]

        def plain() -> list[Finish]:
            tell(f"transcribe {len(rows):,} rows in {workers} plain processes")
            batches = batches_of(rows)
            return _in_processes(_recognize, [batches[i::workers] for i in range(workers)], RecognizerOptions())

        compare(plain, ray, rounds)


def _recognize(batches: Sequence[Sequence[Utterance]], options: Any, finishes: Any) -> None:
    from pipelines.predictions import recognize_rows

    recognizer = options.load()
    for batch in batches:
        for prediction in recognize_rows(recognizer, batch, "offline", decode=decode_here):
            finishes.put(Finish(time.monotonic(), prediction.seconds))
    finishes.put(None)


if __name__ == "__main__":
    app()
