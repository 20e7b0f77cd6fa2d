"""`asr transcribe`: recordings and manifests become text, one after the other or many at a time over Ray."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr.endpoint import EndpointConfig
from asr.errors import AsrError, AudioError, Problem
from asr.manifest import RECORDINGS, Utterance, walk
from pipelines.decoder import Decode, decode_all, decode_here
from pipelines.formats import render, render_among_many, write_text
from pipelines.pool import map_in_order
from pipelines.predictions import Prediction, PredictionFile, is_manifest, manifest_name, recognize_rows
from pipelines.progress import meter, row_seconds

if TYPE_CHECKING:
    from asr.recognizer import Recognizer

_BYTES_A_SECOND = 16_000  # of a recording, about: the meter guesses lengths by it


@dataclass(frozen=True, kw_only=True)
class RecognizerOptions:
    """What every recognizing command lets its user choose; `load` gives the recognizer."""

    model: Path | None = None
    engine: str = "onnx"
    precision: str | None = None  # what the model has, int8 first
    threads: int = 1
    decoding: str = "greedy"
    search: Mapping[str, Any] = field(default_factory=dict)  # of the beam search: beam, lm_weight, ...
    calibrated: bool = True  # times and confidences of words
    rules: EndpointConfig = EndpointConfig()  # noqa: RUF009 (frozen)

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
            "endpoint": self.rules if endpoint else None,
            "calibrated": self.calibrated,
        }
        return Recognizer.load(self.model, **chosen)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One recording, or one row of a manifest.

    Attributes:
        audio: the recording.
        text: the transcript in the format asked for; of a row its prediction, a line of JSON.
        kept: the file that holds it already, from an earlier run.
        problem: why there is no text.
        seconds: of audio that were recognized.
    """

    audio: Path
    text: str = ""
    kept: Path | None = None
    problem: Problem | None = None
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One recording to be transcribed: `name` is its path from where it was found, without the suffix."""

    audio: Path
    name: str
    target: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all recordings and rows share."""

    options: RecognizerOptions
    network: str
    format: str
    many: bool
    folder: str  # where the command was called: paths are relative to it

    def open(self, decode: Decode = decode_here) -> Callable[[Sequence[_Task | Utterance]], list[Result | Prediction]]:
        """Load the recognizer; what it returns does a batch: rows of a manifest, or recordings.

        Raises:
            ModelError: the model cannot be loaded.
        """
        os.chdir(self.folder)
        recognizer = self.options.load()

        def work(items: Sequence[_Task | Utterance]) -> list[Result | Prediction]:
            rows = [item for item in items if isinstance(item, Utterance)]
            if rows:
                return list(recognize_rows(recognizer, rows, self.network, decode))
            return [self._transcribe(recognizer, item) for item in items if isinstance(item, _Task)]

        return work

    def _transcribe(self, recognizer: "Recognizer", task: _Task) -> Result:
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
        return Result(audio=task.audio, text=text, seconds=transcript.duration)


def transcribe(
    audio: Sequence[Path],
    options: RecognizerOptions,
    *,
    network: str = "offline",
    format: str = "txt",
    output_dir: Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
    address: str | None = None,
) -> Iterator[Result]:
    """Transcribe recordings, in the order of `audio` and folders sorted by path; then the rows of manifests.

    Args:
        audio: files, folders that are searched for recordings (`RECORDINGS`), sub-folders too, and manifests
            (`pipelines.predictions.is_manifest`), each row of which is a result.
        network: "offline" or "streaming".
        format: of recordings, one of `pipelines.formats.FORMATS`; rows become JSON Lines with `pred_text`.
        output_dir: each recording is written there under its name (sub-folders are kept), atomically, and the rows
            of x.jsonl to x.pred.jsonl; what is there already and newer than its recording or manifest is kept, and
            rows are taken up where they stopped, unless `overwrite`.
        workers: above 1: so many recognizers, each in a Ray actor.
        address: a running Ray cluster; the recognizers are there, also a single one.

    Raises:
        ModelError: the model cannot be loaded.
        ManifestError: a manifest cannot be read.
        ConfigError: more than one worker and no ray.
        AsrError: the format does not fit, two recordings would get one name, or nothing can be written.
    """
    manifests = [path for path in audio if is_manifest(path) and not path.is_dir()]
    others = [path for path in audio if path not in manifests]
    found, problems = find_audio(others)
    many = len(found) > 1 or bool(manifests) or any(path.is_dir() for path in audio)
    yield from (Result(audio=Path(problem.where), problem=problem) for problem in problems)

    tasks = _tasks(found, output_dir, format)
    targets = _targets(manifests, output_dir)
    finished = {task for task in tasks if not overwrite and _is_finished(task)}
    todo = [task for task in tasks if task not in finished]
    if not overwrite:
        _check_references(todo)
    settings = f"{options} {network} {_model_state(options.model)}"
    job = _Job(options=options, network=network, format=format, many=many, folder=os.getcwd())
    batches: list[Sequence[_Task | Utterance]] = [[task] for task in todo]
    with ExitStack() as opened:
        files = [
            opened.enter_context(PredictionFile(manifest, target, settings, overwrite=overwrite))
            for manifest, target in zip(manifests, targets, strict=True)
        ]
        batches += [batch for file in files for batch in file.batches]
        expected = sum(_expected_seconds(item) for batch in batches for item in batch)
        advance = opened.enter_context(meter("transcribing", expected))
        made = _made(job, batches, workers, address)
        for task in tasks:
            if task in finished:
                yield Result(audio=task.audio, kept=task.target)
            else:
                result = next(made)[0]
                advance(_expected_seconds(task), result.seconds)
                yield result
        for file in files:
            for result, seconds in _predicted(file, made):
                advance(seconds, result.seconds)
                yield result


def _predicted(file: PredictionFile, made: Iterator[list]) -> Iterator[tuple[Result, float]]:
    """The results of a manifest, each with the seconds of audio that were expected of it."""
    for problem in file.unread:
        yield Result(audio=file.manifest, problem=problem), 0.0
    for row, reason in file.kept:
        problem = Problem(row.where, f"{row.audio}: {reason}") if reason else None
        yield Result(audio=Path(row.audio), kept=None if reason else file.target, problem=problem), 0.0
    for row, prediction, line in file.write(made):
        reason = prediction.reason
        problem = Problem(row.where, f"{row.audio}: {reason}") if reason else None
        yield Result(audio=Path(row.audio), text=line, problem=problem, seconds=prediction.seconds), row_seconds(row)


def _made(job: _Job, batches: list[Sequence[_Task | Utterance]], workers: int, address: str | None) -> Iterator[list]:
    """The results of each batch, in order, as `_Job.open` tells; from here, or from recognizers in actors."""
    if not batches:
        return
    if workers <= 1 and address is None:
        work = job.open(decode_all)  # nobody watches this process, as the pool watches its actors
        for batch in batches:
            yield work(batch)
        return
    job.options.load()  # a broken model is told before Ray starts, and once
    yield from map_in_order(batches, job.open, _lost, workers=min(max(workers, 1), len(batches)), address=address)


def _lost(item: _Task | Utterance, reason: str) -> Result | Prediction:
    if isinstance(item, Utterance):
        return Prediction(reason=reason)
    return Result(audio=item.audio, problem=Problem(str(item.audio), reason))


def find_audio(paths: Sequence[Path]) -> tuple[list[tuple[Path, Path]], list[Problem]]:
    """Recordings as (file, file as seen from the folder that was named), and the folders that hold none."""
    found: list[tuple[Path, Path]] = []
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, Path(path.name)))
            continue
        files = (folder / name for folder, names in walk(path) for name in names)
        inside = sorted(file for file in files if file.suffix.lower() in RECORDINGS)
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

    def shortest(audio: Path, short: Path) -> Path:
        stem = short.with_suffix("")
        return stem if without[stem] == 1 and not whole[stem] else short if whole[short] == 1 else audio

    tasks: list[_Task] = []
    for audio, short in found:
        if whole[short] > 1 and output_dir is not None:
            rivals = " and ".join(str(a) for a, s in distinct if s == short)
            raise AsrError(
                f"{rivals} would be written to one file in {output_dir}: name the folder that holds them "
                "(its sub-folders are kept), or use two output folders"
            )
        name = shortest(audio, short)
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


def _check_references(todo: Sequence[_Task]) -> None:
    """Raise AsrError where a text that lies beside its recording would be replaced: it may be what was really said."""
    real = os.path.realpath
    beside = [t for t in todo if t.target and t.target.exists() and real(t.target.parent) == real(t.audio.parent)]
    if beside:
        first = beside[0]
        raise AsrError(
            f"{first.target}: older than {first.audio} and beside it ({len(beside)} such), so it may be what was "
            "really said; use another output folder, or --overwrite"
        )


def _targets(manifests: Sequence[Path], output_dir: Path | None) -> list[Path | None]:
    """Where the predictions of each manifest go.

    Raises:
        AsrError: two would be written to one file.
    """
    if output_dir is None:
        return [None] * len(manifests)
    names = [f"{manifest_name(path)}.pred.jsonl" for path in manifests]
    for name, count in Counter(names).items():
        if count > 1:
            rivals = " and ".join(str(path) for path, own in zip(manifests, names, strict=True) if own == name)
            raise AsrError(f"{rivals} would be written to one file in {output_dir}: use two output folders")
    return [output_dir / name for name in names]


def _expected_seconds(item: _Task | Utterance) -> float:
    """What an item is for the meter: a row's length, and of a recording a guess from its bytes."""
    if isinstance(item, Utterance):
        return row_seconds(item)
    try:
        return item.audio.stat().st_size / _BYTES_A_SECOND
    except OSError:
        return 0.0


def _model_state(model: Path | None) -> list[tuple[str, int]]:
    """The files of a model folder and when they were made: another model makes other predictions."""
    if model is None:
        return []
    return [(str(path), path.stat().st_mtime_ns) for path in sorted(model.rglob("*")) if path.is_file()]
