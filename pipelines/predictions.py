"""What `asr transcribe` does with a manifest: its rows, recognized in batches, become JSON Lines with `pred_text`."""

import glob
import gzip
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from asr.audio import SAMPLE_RATE
from asr.errors import AsrError, AudioError
from asr.files import locked, write_atomically
from asr.manifest import Utterance, read_manifest
from pipelines.decoder import Decode, Part, decode_all
from pipelines.progress import row_seconds

if TYPE_CHECKING:
    from asr.recognizer import Recognizer, Transcript

MANIFEST_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".tsv")
_BATCH_ROWS = 64
_BATCH_SECONDS = 300.0
_LONGEST_SECONDS = 30.0  # that is read whole; what is longer is cut at silences


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The text of a row and the seconds that it lasts, or the reason why there is none."""

    text: str = ""
    seconds: float = 0.0
    reason: str = ""


def is_manifest(path: Path) -> bool:
    """Whether a file that is to be transcribed lists recordings and is none itself."""
    return path.name == "wav.scp" or path.name.lower().endswith(MANIFEST_SUFFIXES)


def manifest_name(path: Path) -> str:
    """A manifest's name without what tells that it is one."""
    suffixes = (suffix for suffix in (*MANIFEST_SUFFIXES, ".scp") if path.name.lower().endswith(suffix))
    return path.name[: -len(max(suffixes, key=len, default=""))] or path.name


def batches_of(rows: Sequence[Utterance]) -> list[list[Utterance]]:
    """The rows in their order, in batches that depend on nothing else: int8 text may depend on its company."""
    batches: list[list[Utterance]] = []
    seconds = 0.0
    for row in rows:
        seconds += row_seconds(row)
        if not batches or len(batches[-1]) == _BATCH_ROWS or seconds > _BATCH_SECONDS:
            batches.append([])
            seconds = row_seconds(row)
        batches[-1].append(row)
    return batches


def recognize_rows(
    recognizer: "Recognizer",
    rows: Sequence[Utterance],
    network: str,
    decode: Decode = decode_all,
) -> list[Prediction]:
    """Recognize rows, in batches of like length; what cannot be read becomes a reason.

    Raises:
        ModelError: the model has no such network.
    """
    found: dict[int, Transcript | str] = {}
    short: dict[int, np.ndarray] = {}
    long: list[int] = []
    for i, samples in enumerate(decode([_start_of(row) for row in rows])):
        if isinstance(samples, AudioError):
            found[i] = str(samples)
        elif len(samples) <= _LONGEST_SECONDS * SAMPLE_RATE:
            short[i] = samples
        else:
            long.append(i)
    for i in long:  # not meanwhile: they are decoded anew
        found[i] = _recognize_long(recognizer, rows[i], network, decode)
    transcripts = recognizer.transcribe_batch(list(short.values()), network)
    found.update(zip(short, transcripts, strict=True))
    return [
        Prediction(reason=told.removeprefix(f"{row.audio}: "))
        if isinstance(told := found[i], str)
        else Prediction(text=told.text, seconds=told.duration)
        for i, row in enumerate(rows)
    ]


def _start_of(row: Utterance) -> Part:
    """The row, or where it is long, enough of it to tell."""
    longest = _LONGEST_SECONDS + 1
    return Part(row.audio, row.offset or 0.0, min(row.seconds_to_read or longest, longest))


def _recognize_long(
    recognizer: "Recognizer",
    row: Utterance,
    network: str,
    decode: Decode,
) -> "Transcript | str":
    """The row, cut at silences: a whole file in constant memory, a part of one in as much as it has samples."""
    try:
        if row.offset is None and row.duration is None:
            return recognizer.transcribe(row.audio, network=network)
        samples = next(decode([Part(row.audio, row.offset or 0.0, row.seconds_to_read)]))
        return str(samples) if isinstance(samples, AudioError) else recognizer.transcribe(samples, network=network)
    except AudioError as error:
        return str(error)


class PredictionFile:
    """The predictions of one manifest, which grow in order, so that a job that was killed goes on after them.

    Until it is complete the file has another name, which tells rows and settings apart. A complete one that is newer
    than the manifest is kept, but for rows that could not be recognized, which are tried again: they have an empty
    `pred_text` and the reason as `error`. A context manager: meanwhile no other process writes the file.

    Args:
        manifest: a file that `asr.manifest.read_manifest` knows.
        target: the file to write; None writes none.
        settings: what the predictions depend on, besides the rows.
        overwrite: begin anew, whatever is there.

    Attributes:
        unread: rows that cannot be read.
        kept: rows that an earlier run recognized, each with the reason where it could not.
        batches: rows that are still to be recognized.

    Raises:
        ManifestError: the manifest cannot be read.
        AsrError: the file cannot be written, another process writes it, or it holds the predictions of other rows.
    """

    def __init__(self, manifest: Path, target: Path | None, settings: str, *, overwrite: bool) -> None:
        self.manifest, self.target = manifest, target
        rows, self.unread = read_manifest(manifest)
        self.batches = batches_of(rows)
        self.kept: list[tuple[Utterance, str]] = []
        self._complete: list[bytes] = []  # the lines of a complete file, of which `failed` are tried again
        self._failed: list[int] = []
        self._open = ExitStack()
        if target is None:
            return
        told = hashlib.sha256(f"{settings}\n{rows}".encode(errors="surrogatepass")).hexdigest()[:12]
        self._part = target.with_name(f".{target.name}.part-{told}")
        with ExitStack() as opened, _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = target.with_name(f".{target.name}.lock")
            opened.enter_context(locked(lock, self._taken))
            opened.callback(lock.unlink, missing_ok=True)
            for stale in target.parent.glob(f".{glob.escape(target.name)}.part-*"):
                if overwrite or stale != self._part:
                    stale.unlink()
            if not overwrite and _is_newer(target, manifest):
                if not _is_of(target, rows):
                    raise AsrError(
                        f"{target}: holds the predictions of other rows than those of {manifest}; use another output "
                        "folder, or --overwrite"
                    )
                self._part.unlink(missing_ok=True)  # of an interrupted --overwrite
                self._try_again(rows)
            elif self._part.exists():
                size = self._keep(self._part)
                with open(self._part, "r+b") as file:
                    file.truncate(size)
            self._open = opened.pop_all()

    def __enter__(self) -> "PredictionFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _taken(self, owner: str) -> AsrError:
        return AsrError(f"{self.target}: another `asr transcribe` (process {owner}) is writing it; wait for its end")

    def _try_again(self, rows: list[Utterance]) -> None:
        """Take what a complete file has; only rows with an error are still to be recognized."""
        assert self.target is not None
        self._complete = self.target.read_bytes().splitlines(keepends=True)
        reasons = [_reason_in(line) for line in self._complete]
        self.kept = [(row, "") for row, reason in zip(rows, reasons, strict=True) if not reason]
        self._failed = [i for i, reason in enumerate(reasons) if reason]
        self.batches = batches_of([rows[i] for i in self._failed])

    def _keep(self, path: Path) -> int:
        """Take what is there of finished batches, and return its bytes: a batch is written in one piece."""
        size = seen = 0
        reasons: list[str] = []
        with open(path, "rb") as file:
            for line in file:
                seen += len(line)
                reasons.append(_reason_in(line))
                if line.endswith(b"\n") and len(reasons) == len(self.batches[0]):
                    self.kept += zip(self.batches.pop(0), reasons, strict=True)
                    size, reasons = seen, []
                    if not self.batches:
                        break
        return size

    def write(self, made: Iterator[list[Prediction]]) -> Iterator[tuple[Utterance, Prediction, str]]:
        """Take the predictions of `batches` as they come, and give each row with its own and its line.

        Raises:
            AsrError: the file cannot be written.
        """
        fields = _fields_of([row for rows in self.batches for row in rows], self.manifest)
        failed = iter(self._failed)
        for rows in self.batches:
            predictions = next(made)
            lines = [_line(next(fields), prediction) for prediction in predictions]
            written = [line.encode("utf-8", "surrogateescape") for line in lines]
            if self._complete:
                for line in written:
                    self._complete[next(failed)] = line
            elif self.target is not None:
                with _writing(self.target), open(self._part, "ab") as file:
                    file.write(b"".join(written))
            yield from zip(rows, predictions, lines, strict=True)
        if self.target is None:
            return
        with _writing(self.target):
            if self._complete and self.batches:
                write_atomically(self.target, b"".join(self._complete))
            elif self._part.exists():
                os.replace(self._part, self.target)


def _line(fields: dict, prediction: Prediction) -> str:
    told = {"pred_text": prediction.text} | ({"error": prediction.reason} if prediction.reason else {})
    own = {name: value for name, value in fields.items() if name != "error"}  # an earlier prediction's
    return json.dumps(own | told, ensure_ascii=False) + "\n"


def _reason_in(line: bytes) -> str:
    try:
        return json.loads(line).get("error", "")
    except (ValueError, AttributeError):  # cut off, or changed by hand
        return ""


def _fields_of(rows: Sequence[Utterance], manifest: Path) -> Iterator[dict]:
    """What a prediction repeats of its row: all that a NeMo manifest holds, of other formats what is known."""
    if not manifest.name.lower().endswith((".jsonl", ".jsonl.gz")):
        yield from map(_known_fields, rows)
        return
    opened = gzip.open if manifest.suffix.lower() == ".gz" else open
    with opened(manifest, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = enumerate(file, 1)
        place, original = "", {}
        for row in rows:
            while place != row.where:
                number, line = next(lines)
                place = f"{os.path.abspath(manifest)}:{number}"
                original = json.loads(line) if place == row.where else {}
            known = _known_fields(row)
            is_cut = "supervisions" in original or "recording" in original or "recording_id" in original
            yield known if is_cut else original | {"audio_filepath": row.audio}


def _known_fields(row: Utterance) -> dict:
    fields = {
        "audio_filepath": row.audio,
        "offset": row.offset,
        "duration": row.duration,
        "text": row.text,
        "speaker": row.speaker,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _is_of(target: Path, rows: Sequence[Utterance]) -> bool:
    """Whether a file of predictions is of these rows, all of them, in this order."""
    with open(target, encoding="utf-8", errors="surrogateescape", newline="") as file:
        try:
            told = [json.loads(line) for line in file]
            places = [(line["audio_filepath"], float(line.get("offset") or 0)) for line in told]
            return places == [(row.audio, row.offset or 0.0) for row in rows]
        except (ValueError, KeyError, TypeError, AttributeError):  # cut off, or changed by hand
            return False


def _is_newer(target: Path, manifest: Path) -> bool:
    return target.exists() and target.stat().st_mtime_ns >= manifest.stat().st_mtime_ns


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AsrError(f"{path}: cannot be written ({error.strerror or error}); run again to go on") from error
