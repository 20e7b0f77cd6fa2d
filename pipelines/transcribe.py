"""`asr transcribe`: recordings become text, one after the other or many at a time over Ray Data."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr.errors import AsrError, AudioError, Problem
from pipelines.formats import render, render_among_many, write_text

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

# Files of a folder that count as recordings; a file named outright may be called anything.
AUDIO_SUFFIXES = frozenset(
    {
        ".wav",
        ".flac",
        ".mp3",
        ".ogg",
        ".oga",
        ".opus",
        ".aif",
        ".aiff",
        ".aifc",
        ".au",
        ".snd",
        ".caf",
        ".w64",
    }
    | {".rf64", ".amr", ".wma", ".m4a", ".aac", ".mp4", ".mkv", ".mov", ".webm", ".3gp"}
)


@dataclass(frozen=True, kw_only=True)
class RecognizerOptions:
    """What every recognizing command lets its user choose; `load` gives the recognizer."""

    model: Path | None = None
    engine: str = "onnx"
    precision: str | None = None  # what the model has, int8 first
    threads: int = 1
    decoding: str = "greedy"
    search: Mapping[str, float] = field(default_factory=dict)  # of the beam search: beam, lm_weight, ...

    def load(self, *, endpoint: bool = True) -> "Recognizer":
        """Load the model; `endpoint=False` leaves audio uncut, however long.

        Raises:
            ModelError: the model is missing, incomplete or of another version.
        """
        from asr.recognizer import Recognizer

        chosen: dict[str, Any] = {
            "engine": self.engine,
            "precision": self.precision,
            "threads": self.threads,
            "decoding": self.decoding,
            **self.search,
        }
        if not endpoint:
            chosen["endpoint"] = None
        return Recognizer.load(self.model, **chosen)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One recording: its `text` in the format asked for, the file `kept` from earlier, or a `problem`."""

    audio: Path
    text: str = ""
    kept: Path | None = None
    problem: Problem | None = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One recording to be transcribed: `name` is its path from where it was found, without the suffix."""

    audio: Path
    name: str
    target: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all recordings share."""

    tasks: tuple[_Task, ...]
    options: RecognizerOptions
    network: str
    format: str
    many: bool

    def run(self, recognizer: "Recognizer", task: _Task) -> Result:
        """Transcribe one recording; what is wrong with it alone becomes its `problem`."""
        try:
            transcript = recognizer.transcribe(task.audio, network=self.network)
        except AudioError as error:
            return Result(audio=task.audio, problem=problem_of(task.audio, error))
        if task.target is not None:
            text = render(transcript, self.format, task.name)
            write_text(task.target, text)
        elif self.many:
            text = render_among_many(transcript, self.format, task.name, str(task.audio))
        else:
            text = render(transcript, self.format, task.name)
        return Result(audio=task.audio, text=text)


def transcribe(
    audio: Sequence[Path],
    options: RecognizerOptions,
    *,
    network: str = "offline",
    format: str = "txt",
    output_dir: Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
) -> Iterator[Result]:
    """Transcribe recordings; the results come in the order of `audio`, folders sorted by path.

    Args:
        audio: files, and folders that are searched for recordings (`AUDIO_SUFFIXES`), sub-folders too.
        network: "offline" or "streaming".
        format: one of `pipelines.formats.FORMATS`.
        output_dir: each recording is written there under its name (sub-folders are kept), atomically; what is
            there already and newer than its recording is kept, unless `overwrite`.
        workers: above 1: so many recognizers, each in a Ray actor.

    Raises:
        ModelError: the model cannot be loaded.
        ConfigError: more than one worker and no ray.
        AsrError: the format does not fit, two recordings would get one name, or nothing can be written.
    """
    found, problems = find_audio(audio)
    many = len(found) > 1 or any(path.is_dir() for path in audio)
    yield from (Result(audio=Path(problem.where), problem=problem) for problem in problems)

    tasks = _tasks(found, output_dir, format)
    finished = {i for i, task in enumerate(tasks) if not overwrite and _is_finished(task)}
    todo = [task for i, task in enumerate(tasks) if i not in finished]
    job = _Job(tasks=tuple(todo), options=options, network=network, format=format, many=many)
    made = _over_ray(job, workers) if workers > 1 and todo else _here(job)
    for i, task in enumerate(tasks):
        yield Result(audio=task.audio, kept=task.target) if i in finished else next(made)


def find_audio(paths: Sequence[Path]) -> tuple[list[tuple[Path, Path]], list[Problem]]:
    """Recordings as (file, file as seen from the folder that was named), and the folders that hold none."""
    found: list[tuple[Path, Path]] = []
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, Path(path.name)))
            continue
        inside = sorted(f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES and f.is_file())
        if not inside:
            problems.append(Problem(str(path), "no recordings in this folder (looked for .wav, .flac, .mp3 ...)"))
        found += [(f, f.relative_to(path)) for f in inside]
    return found, problems


def problem_of(audio: Path | str, error: AsrError) -> Problem:
    """The error as a problem of `audio`, whose name the message need not repeat."""
    return Problem(str(audio), str(error).removeprefix(f"{audio}: "))


def _tasks(found: list[tuple[Path, Path]], output_dir: Path | None, format: str) -> list[_Task]:
    """Give every recording the shortest name that is its own: a.wav beside a.flac keep their suffixes.

    Raises:
        AsrError: two recordings would be written to one file.
    """
    distinct = dict.fromkeys(found)
    without = Counter(short.with_suffix("") for _, short in distinct)
    whole = Counter(short for _, short in distinct)
    tasks: list[_Task] = []
    for audio, short in found:
        if whole[short] > 1 and output_dir is not None:
            rivals = " and ".join(str(a) for a, s in distinct if s == short)
            raise AsrError(
                f"{rivals} would be written to one file in {output_dir}: name the folder that holds them "
                "(its sub-folders are kept), or use two output folders"
            )
        stem = short.with_suffix("")
        name = stem if without[stem] == 1 else short if whole[short] == 1 else audio
        target = None if output_dir is None else output_dir / f"{name}.{format}"
        tasks.append(_Task(audio=audio, name=name.as_posix(), target=target))
    return tasks


def _is_finished(task: _Task) -> bool:
    if task.target is None:
        return False
    try:
        return task.target.stat().st_mtime_ns >= task.audio.stat().st_mtime_ns
    except OSError:
        return False


def _here(job: _Job) -> Iterator[Result]:
    if job.tasks:
        recognizer = job.options.load()
        for task in job.tasks:
            yield job.run(recognizer, task)


# ---- over Ray Data


def _over_ray(job: _Job, workers: int) -> Iterator[Result]:
    """The same results in the same order, from recognizers that each live in an actor."""
    from pipelines import ray_local

    job.options.load()  # a broken model is told before Ray starts, and once
    workers = min(workers, len(job.tasks))
    rows = [{"index": index} for index in range(len(job.tasks))]
    # one slot more than actors: with none left, the reader of the rows would wait for ever
    with ray_local.start(cpus=workers + 1) as ray:
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            _Worker,
            fn_constructor_args=(job, os.getcwd()),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
        )
        waiting: dict[int, dict] = {}  # finished before an earlier one
        following = 0
        for row in made.iter_rows():
            waiting[row["index"]] = row
            while following in waiting:
                yield _result(job.tasks[following], waiting.pop(following))
                following += 1


class _Worker:
    """One recognizer. Results travel as plain bytes, so that any file name does, and errors as data."""

    def __init__(self, job: _Job, folder: str) -> None:
        os.chdir(folder)  # paths are relative to where the command was called
        self._job = job
        self._recognizer = job.options.load()

    def __call__(self, row: dict) -> dict:
        told = {"index": row["index"], "text": b"", "reason": b"", "fatal": b""}
        try:
            result = self._job.run(self._recognizer, self._job.tasks[row["index"]])
        except AsrError as error:
            return told | {"fatal": _to_bytes(str(error))}
        if result.problem is not None:
            return told | {"reason": _to_bytes(result.problem.reason)}
        return told | {"text": _to_bytes(result.text)}


def _result(task: _Task, row: dict) -> Result:
    if row["fatal"]:
        raise AsrError(_to_text(row["fatal"]))
    if row["reason"]:
        return Result(audio=task.audio, problem=Problem(str(task.audio), _to_text(row["reason"])))
    return Result(audio=task.audio, text=_to_text(row["text"]))


def _to_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _to_text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
