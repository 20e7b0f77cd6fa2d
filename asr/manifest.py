"""Lists of utterances, in whichever of the usual formats they come, read into one kind of row."""

import csv
import gzip
import json
import math
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from asr.errors import ManifestError, Problem

# What a column of a table, or a key of a JSON row, may be called.
_NAMES = {
    "audio": ("audio_filepath", "audio", "path", "file", "file_name"),
    "text": ("text", "sentence", "transcript", "transcription"),
    "duration": ("duration",),
    "offset": ("offset",),
    "speaker": ("speaker", "speaker_id", "client_id"),
}
TEXT_NAMES = _NAMES["text"]
# Files of a folder that count as recordings; a file named outright may be called anything.
RECORDINGS = {".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf"}
RECORDINGS |= {".w64", ".rf64", ".m4a", ".mp4", ".aac", ".webm", ".mkv", ".mov", ".wma", ".amr", ".3gp", ".wv"}
RECORDINGS |= {".m4v", ".avi", ".mpg", ".mpeg", ".ts", ".flv"}
_FORMATS = (
    "NeMo JSON Lines, a Kaldi data folder (wav.scp), Lhotse cuts or recordings with supervisions (.jsonl, "
    ".jsonl.gz), CSV or TSV with a header, or a folder of recordings each with a .txt beside it"
)
_MOST_OUTSIDE = 0.1  # seconds that a Lhotse text may reach out of its cut
_ROUNDING_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Utterance:
    """One row of a manifest.

    Args:
        id: unique in its manifest: the audio's name relative to it, without suffix.
        audio: absolute path, or a URL.
        text: as written there; None where the row has none.
        duration: seconds, of this utterance; None where the row does not tell.
        offset: where in the file it starts, seconds; None: it is the whole file.
        speaker: a label, or None.
        where: "manifest:line".
    """

    id: str
    audio: str
    text: str | None
    duration: float | None = None
    offset: float | None = None
    speaker: str | None = None
    where: str

    @property
    def seconds_to_read(self) -> float | None:
        """How much of its file to read; None: all of it.

        A duration is often rounded: where it is told of a whole file, a little more is read, so that the last sound
        stays. Inside a long recording that would be the neighbour's first.
        """
        return self.duration if self.duration is None or self.offset is not None else self.duration + _ROUNDING_SECONDS


# A reader yields rows still unchecked: "file:line" and the fields by the names of _NAMES; "problem" is one it found.
_Row = tuple[str, dict[str, Any]]


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The folders in a folder, itself first, and the names of the files in each, sorted, without hidden ones.

    Links to folders are followed, but to each folder once.
    """
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield Path(parent), sorted(name for name in names if not name.startswith("."))


def read_manifest(path: str | Path) -> tuple[list[Utterance], list[Problem]]:
    """Return the good rows of a manifest in their order, and what was wrong with the others.

    Reads NeMo JSON Lines, Kaldi data folders, Lhotse cuts, Lhotse recordings with supervisions, CSV and TSV
    with a header, and folders of recordings each with a .txt beside it; the format shows in what is there.
    Paths are taken relative to the manifest. Whether the audio exists is found out by reading it.

    Raises:
        ManifestError: the manifest is missing or unreadable, or has no good row.
    """
    utterances, problems, _ = read_with_lost(path)
    return utterances, problems


def read_with_lost(path: str | Path) -> tuple[list[Utterance], list[Problem], list[Utterance]]:
    """As `read_manifest`; and of the bad rows those whose text is known nevertheless, without audio, `where` as id.

    Raises:
        ManifestError: the manifest is missing or unreadable, or has no good row.
    """
    # abspath, not resolve: links stay as they are named.
    path = Path(os.path.abspath(path))
    is_folder = os.path.isdir(path)
    folder = path if is_folder else path.parent
    utterances: list[Utterance] = []
    problems: list[Problem] = []
    lost: list[Utterance] = []
    try:
        for row in _read_folder(path) if is_folder else _read_file(path):
            if isinstance(row, Problem):
                problems.append(row)
                continue
            where, fields = row
            try:
                utterances.append(_check(where, folder, **fields))
            except ManifestError as error:
                problems.append(Problem(where, str(error)))
                lost += _lost(where, fields)
    except FileNotFoundError as error:
        raise ManifestError(f"{error.filename or path}: no such manifest") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ManifestError(f"{getattr(error, 'filename', None) or path}: cannot be read: {reason}") from None
    if not utterances:
        first = f"; the first of {len(problems)} bad rows: {problems[0]}" if problems else ""
        raise ManifestError(f"{path}: no usable row{first}")
    return _with_unique_ids(utterances), problems, lost


def names_in(path: str | Path) -> list[str]:
    """The fields that a manifest has: a table's columns, or the keys of the first JSON row; of other formats none."""
    listed = _list_in(Path(path)) if os.path.isdir(path) else Path(path)
    if listed is None or listed.name == "wav.scp":
        return []
    with _open_text(listed) as file:
        first = next((line for line in file if line.strip()), "")
    if _is_json(listed, first):
        row = next((row for _, row in _json_rows(listed) if isinstance(row, dict)), {})
        return list(row)
    return _titles(first)[0]


def _check(where: str, folder: Path, **fields: Any) -> Utterance:
    """Make a row an Utterance whose id is not yet unique, or raise ManifestError with the reason alone."""
    if "problem" in fields:
        raise ManifestError(fields["problem"])
    audio, text, speaker = (fields.get(name) for name in ("audio", "text", "speaker"))
    if audio is None or audio == "":
        raise ManifestError("lacks the field audio_filepath")
    if isinstance(speaker, int):
        speaker = str(speaker)
    for name, value in (("audio_filepath", audio), ("text", text), ("speaker", speaker)):
        if value is not None and not isinstance(value, str):
            raise ManifestError(f"{name} is {value!r:.40}, not a string")
        if value is not None and not _is_unicode(value):
            raise ManifestError(f"{name} is not valid UTF-8")
    duration, offset = _seconds("duration", fields.get("duration")), _seconds("offset", fields.get("offset"))
    if duration == 0:
        raise ManifestError("duration is 0; it must be positive")
    if "://" in audio:
        name = audio
    else:
        audio = os.path.normpath(_find(folder, audio))
        if not _is_unicode(audio):
            raise ManifestError("the name of its folder is not valid UTF-8; rename it")
        name = os.path.relpath(audio, folder) if Path(audio).is_relative_to(folder) else audio
    return Utterance(
        id=os.path.splitext(name)[0],
        audio=audio,
        text=text,
        duration=duration,
        offset=offset,
        speaker=speaker or None,
        where=where,
    )


def _lost(where: str, fields: dict[str, Any]) -> list[Utterance]:
    """A bad row, where its text is known."""
    text, speaker = (
        value if isinstance(value := fields.get(name), str) and _is_unicode(value) else None
        for name in ("text", "speaker")
    )
    return [] if text is None else [Utterance(id=where, audio="", text=text, speaker=speaker or None, where=where)]


def _find(folder: Path, name: str) -> Path:
    """`name` relative to the manifest; if not there, in Common Voice's clips/ or the current folder."""
    beside = folder / name
    if not os.path.isabs(name) and not os.path.exists(beside):
        for other in (folder / "clips" / name, Path(os.path.abspath(name))):
            if os.path.exists(other):
                return other
    return beside


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:  # bytes that were not UTF-8 are read as lone surrogates
        return False
    return True


def _seconds(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ManifestError(f"{name} is {value!r:.40}; it must be seconds, a number not below 0")
    return seconds


def _with_unique_ids(utterances: list[Utterance]) -> list[Utterance]:
    """Add "#offset" where segments share a file, then "~2", "~3" ... to what still repeats."""
    offsets: dict[str, set[float]] = defaultdict(set)
    for utterance in utterances:
        offsets[utterance.audio].add(utterance.offset or 0.0)
    used: set[str] = set()
    unique = []
    for utterance in utterances:
        segment = f"#{utterance.offset or 0.0:.3f}" if len(offsets[utterance.audio]) > 1 else ""
        name = first = utterance.id + segment
        repeat = 1
        while name in used:
            repeat += 1
            name = f"{first}~{repeat}"
        used.add(name)
        unique.append(replace(utterance, id=name))
    return unique


def _open_text(path: Path) -> TextIO:
    opened = gzip.open if path.suffix == ".gz" else open
    return opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="")  # type: ignore[return-value]


def _read_file(path: Path) -> Iterator[_Row | Problem]:
    if path.name == "wav.scp":
        return _read_kaldi(path.parent)
    with _open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    if first.lstrip().startswith("["):
        raise ManifestError(f"{path}: one JSON list; write one JSON object a line")
    return _read_json_lines(path) if _is_json(path, first) else _read_table(path)


def _is_json(path: Path, first: str) -> bool:
    """Whether a manifest of this name and first line is JSON Lines, and no table."""
    return first.lstrip().startswith("{") or ".json" in path.name


def _read_folder(path: Path) -> Iterator[_Row | Problem]:
    listed = _list_in(path)
    return _read_recordings(path) if listed is None else _read_file(listed)


def _list_in(path: Path) -> Path | None:
    """The manifest in a folder; None where it holds none."""
    if (path / "wav.scp").is_file():
        return path / "wav.scp"
    lists = [p for p in sorted(path.iterdir()) if p.name.endswith((".jsonl", ".jsonl.gz", ".csv", ".tsv"))]
    found = (
        [p for p in lists if "cuts" in p.name]
        or [p for p in lists if "supervisions" in p.name]
        or [p for p in lists if "recordings" not in p.name]
    )
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ManifestError(f"{path}: holds several manifests; name one of them: {names}")
    return found[0] if found else None


def _read_recordings(folder: Path) -> Iterator[_Row | Problem]:
    """A folder of recordings, each with its text in a .txt of the same name."""
    recordings: list[Path] = []
    texts: dict[Path, Path] = {}  # by their names without .txt
    for parent, names in walk(folder):
        for path in (parent / name for name in names):
            if path.suffix.lower() in RECORDINGS:
                recordings.append(path)
            elif path.suffix.lower() == ".txt":
                texts[path.with_suffix("")] = path
    if not recordings:
        raise ManifestError(f"{folder}: holds neither a manifest nor recordings; give {_FORMATS}")
    # without any text it is noise, or speech to be recognized
    with_texts = any(recording.with_suffix("") in texts for recording in recordings)
    for recording in recordings:
        beside = texts.get(recording.with_suffix(""))
        if not with_texts:
            yield str(recording), {"audio": str(recording)}
        elif beside is None:
            yield Problem(str(recording), f"no {recording.with_suffix('.txt').name} with its text beside it")
        else:
            try:
                text = beside.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                yield Problem(str(beside), f"cannot be read: {error}")
            else:
                yield f"{beside}:1", {"audio": str(recording), "text": " ".join(text.split())}


def _read_table(path: Path) -> Iterator[_Row | Problem]:
    """CSV or TSV; the header says which columns there are, and what parts them."""
    with _open_text(path) as file:
        rows = enumerate(file, 1)
        titles, delimiter = _titles(next((line for _, line in rows if line.strip()), ""))
        columns = {
            field: next(titles.index(name) for name in names if name in titles)
            for field, names in _NAMES.items()
            if not set(names).isdisjoint(titles)
        }
        if "audio" not in columns:
            wanted = " or ".join(_NAMES["audio"])
            reason = f"not a manifest: its first line has no column {wanted}"
            raise ManifestError(f"{path}: {reason}; give {_FORMATS}")
        for number, line in rows:
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                cells = _cells(line, delimiter)
            except csv.Error as error:
                yield Problem(where, f"not a row of a table: {error}")
                continue
            if len(cells) < len(titles):
                yield Problem(where, f"has {len(cells)} columns, the header {len(titles)}")
            elif any(cells[len(titles) :]):
                quoted = f"put texts with {delimiter!r} in quotation marks"
                advice = "a text holds no tab" if delimiter == "\t" else quoted
                yield Problem(where, f"has {len(cells)} columns, the header {len(titles)}; {advice}")
            else:
                yield where, {field: cells[column] for field, column in columns.items()}


def _titles(header: str) -> tuple[list[str], str]:
    """The columns of a table, and what parts them."""
    delimiter = max("\t,;|", key=header.count)
    return [title.strip().lower() for title in _cells(header, delimiter)], delimiter


def _cells(line: str, delimiter: str) -> list[str]:
    """One line is one row, so that a stray quotation mark spoils a row and not the rest of the file."""
    # Tab-separated files (Common Voice) carry bare quotation marks in their sentences.
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader([line], delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True)
    return next(reader, [])


def _read_json_lines(path: Path) -> Iterator[_Row | Problem]:
    """NeMo's rows, Lhotse's cuts, or Lhotse's supervisions; each row shows what it is."""
    recordings: dict[str, Any] | None = None
    for where, row in _json_rows(path):
        if isinstance(row, Problem):
            yield row
        elif "supervisions" in row or str(row.get("type", "")).endswith("Cut"):
            yield from _read_cut(where, row)
        elif "recording_id" in row:
            if recordings is None:
                recordings = _recordings_of(path)
            recording = recordings.get(str(row["recording_id"]))
            if recording is None:
                problem = f"recording {row['recording_id']!r} is not in the list of recordings"
                yield where, {"text": row.get("text"), "speaker": row.get("speaker"), "problem": problem}
            else:
                cut = {"type": "MonoCut", "recording": recording, "supervisions": [row]}
                yield from _read_cut(where, cut | {"channel": row.get("channel")})
        elif "sources" in row:
            raise ManifestError(f"{path}: Lhotse recordings without texts; give cuts or supervisions")
        else:
            present = {field: [row[n] for n in names if n in row] for field, names in _NAMES.items()}
            yield where, {field: values[0] for field, values in present.items() if values}


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Problem]]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, Problem(where, f"not JSON: {error}")
                continue
            yield where, row if isinstance(row, dict) else Problem(where, "not a JSON object")


def _recordings_of(supervisions: Path) -> dict[str, Any]:
    """The recordings, by id, of the list beside `supervisions` that is named alike."""
    if "supervisions" not in supervisions.name:
        raise ManifestError(
            f"{supervisions}: Lhotse supervisions; name the file like x_supervisions.jsonl, "
            "and its recordings x_recordings.jsonl"
        )
    path = supervisions.with_name(supervisions.name.replace("supervisions", "recordings"))
    return {str(row.get("id")): row for _, row in _json_rows(path) if isinstance(row, dict)}


def _read_cut(where: str, cut: dict[str, Any]) -> Iterator[_Row | Problem]:
    """One row for each of the cut's supervisions; the whole cut, without text, where it has none."""
    try:
        kind, recording = cut.get("type", "MonoCut"), cut.get("recording")
        if kind not in ("MonoCut", "MultiCut"):
            raise ManifestError(f"a {kind} is not read; save the cuts' audio first, as MonoCut")
        if not recording:
            raise ManifestError("lacks the field recording")
        if recording.get("transforms"):
            raise ManifestError("its recording has transforms; save the cuts' audio first")
        source, *more = recording["sources"]
        if more or source["type"] not in ("file", "url"):
            raise ManifestError("its audio is not one file; save each recording as a file")
        if len(source.get("channels") or [0]) > 1 and isinstance(cut.get("channel"), int):
            raise ManifestError("takes one channel of several; save each channel as a file")
        cut_start = _seconds("start", cut.get("start")) or 0.0
        cut_duration = _seconds("duration", cut.get("duration"))
        audio = {"audio": source["source"]}
        if not cut.get("supervisions"):
            yield where, audio | {"offset": cut_start, "duration": cut_duration}
        for supervision in cut.get("supervisions") or ():
            start, duration = float(supervision["start"]), float(supervision["duration"])
            fields = {"text": supervision.get("text"), "speaker": supervision.get("speaker")}
            end = math.inf if cut_duration is None else cut_duration
            if start < -_MOST_OUTSIDE or start + duration > end + _MOST_OUTSIDE:
                yield where, fields | {"problem": f"text {supervision.get('id')} reaches out of its cut"}
                continue
            offset = round(max(cut_start + start, 0.0), 6)
            yield where, audio | fields | {"offset": offset, "duration": duration}
    except ManifestError as error:
        yield Problem(where, str(error))
    except KeyError as error:
        yield Problem(where, f"lacks the field {error.args[0]}")
    except (TypeError, ValueError, AttributeError):
        yield Problem(where, "not a Lhotse cut: a field has the wrong type")


def _read_kaldi(folder: Path) -> Iterator[_Row | Problem]:
    """wav.scp, and where they exist: segments, text, utt2spk."""
    recordings, problems = _kaldi_table(folder / "wav.scp")
    tables = {}
    for name in ("segments", "text", "utt2spk"):
        if (folder / name).exists():
            tables[name], more = _kaldi_table(folder / name)
            problems += more
    yield from problems
    listed, texts = tables.get("segments", recordings), tables.get("text")
    for utterance, (value, where) in listed.items():
        text, _ = (texts or {}).get(utterance, (None, ""))
        speaker, _ = tables.get("utt2spk", {}).get(utterance, (None, ""))
        try:
            fields = _segment(value, recordings) if "segments" in tables else {"audio": value}
            if fields["audio"].endswith("|"):
                raise ManifestError(f"audio is a command, {fields['audio']} Run it and list its files")
        except ManifestError as error:
            fields = {"problem": str(error)}
        yield where, fields | {"text": text, "speaker": speaker}
    for utterance, (text, where) in (texts or {}).items():
        if utterance not in listed:
            yield where, {"text": text, "problem": f"utterance {utterance} has no audio"}


def _segment(value: str, recordings: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """A line of Kaldi's segments, "recording start end", as the fields of a row."""
    parts = value.split()
    if len(parts) < 3:
        raise ManifestError("lacks a recording, a start or an end")
    recording, start, end = parts[:3]
    if recording not in recordings:
        raise ManifestError(f"recording {recording} is not in wav.scp")
    fields = {"audio": recordings[recording][0], "offset": _seconds("start", start)}
    if end not in ("-1", "-1.0"):  # Kaldi's way to say: to the end of the file
        fields["duration"] = round((_seconds("end", end) or 0.0) - (fields["offset"] or 0.0), 6)
    return fields


def _kaldi_table(path: Path) -> tuple[dict[str, tuple[str, str]], list[Problem]]:
    """Lines of a key and a value, as {key: (value, "file:line")}; a key that repeats is a problem."""
    table: dict[str, tuple[str, str]] = {}
    problems = []
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            key, value = (*line.split(maxsplit=1), "", "")[:2]
            if key in table:
                problems.append(Problem(where, f"{key} is there already"))
            elif key:
                table[key] = (value.strip(), where)
    return table, problems
