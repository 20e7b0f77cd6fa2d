"""How a transcript is written down: plain text, Whisper's JSON, SubRip and WebVTT subtitles, NIST's CTM."""

import json
import math
import tempfile
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asr.errors import AsrError
from asr.files import replacing

if TYPE_CHECKING:
    from asr.decoding import Word
    from asr.recognizer import Segment, Transcript

FORMATS = ("txt", "json", "srt", "vtt", "ctm")
JOINABLE = ("txt", "json", "ctm")  # several recordings can share a stream; subtitles hold no names

# What subtitle guidelines agree on: two lines of 42 characters, seconds that a reader needs for them.
_CUE_LINE, _CUE_LINES = 42, 2
_CUE_SECONDS = 7.0


def render(transcript: "Transcript", format: str, name: str) -> str:
    """A whole file of one recording.

    Args:
        format: one of `FORMATS`; txt has a segment a line.
        name: the recording as CTM calls it (spaces become underscores there).
    """
    if format == "txt":
        return "".join(f"{segment.text}\n" for segment in transcript.segments)
    if format == "json":
        return json.dumps(whisper_result(transcript), ensure_ascii=False, indent=2) + "\n"
    if format == "srt":
        return _srt(transcript)
    if format == "vtt":
        return _vtt(transcript)
    if format == "ctm":
        return _ctm(transcript, name)
    raise AsrError(f"format {format!r}: allowed are {', '.join(FORMATS)}")


def render_among_many(transcript: "Transcript", format: str, name: str, path: str) -> str:
    """One recording of several in one stream, whose lines tell which is theirs.

    txt: `path<TAB>text`; json: an object a line, with a key `path`; ctm: as ever.

    Raises:
        AsrError: the format is not one of `JOINABLE`.
    """
    if format == "txt":
        return f"{path}\t{' '.join(segment.text for segment in transcript.segments)}\n"
    if format == "json":
        return json.dumps({"path": path, **whisper_result(transcript)}, ensure_ascii=False) + "\n"
    if format == "ctm":
        return _ctm(transcript, name)
    raise AsrError(f"format {format!r}: several recordings can share {', '.join(JOINABLE)}; use an output folder")


def whisper_result(transcript: "Transcript") -> dict[str, Any]:
    """The transcript in the shape of openai/whisper's result.

    As there, segments and words start with a space, so that joined they give the text. What has no meaning
    here is neutral: no tokens, temperature 0, no_speech_prob 0 (silence makes no segment), language null.
    """
    segments = [
        {
            "id": number,
            "seek": 0,
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": f" {segment.text}",
            "tokens": [],
            "temperature": 0.0,
            "avg_logprob": _mean_log_confidence(segment),
            "compression_ratio": _compression_ratio(segment.text),
            "no_speech_prob": 0.0,
            "words": [
                {
                    "word": f" {word.text}",
                    "start": round(word.start, 3),
                    "end": round(word.end, 3),
                    "probability": round(word.confidence, 4),
                }
                for word in segment.words
            ],
            **_alternatives(segment),
        }
        for number, segment in enumerate(transcript.segments)
    ]
    return {"text": transcript.text, "segments": segments, "language": None}


def _alternatives(segment: "Segment") -> dict[str, Any]:
    """What Whisper's result does not have: only where alternatives were asked for."""
    if not segment.alternatives:
        return {}
    return {"alternatives": [{"text": f" {other.text}", "score": other.score} for other in segment.alternatives]}


def check_writable(path: Path) -> None:
    """See that a file, and its folder where there is none yet, can be written: before the work, not after it.

    Raises:
        AsrError: it cannot; the message says why.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        if not path.exists() or path.is_file():
            there = next(folder for folder in path.absolute().parents if folder.exists())
            with tempfile.NamedTemporaryFile(dir=there):
                pass
    except OSError as error:
        raise AsrError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing; what is no regular file (/dev/stdout, a pipe) is written to directly.

    Raises:
        AsrError: it cannot be written; the message says why.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise AsrError(f"{path}: cannot be written ({error.strerror or error})") from error


def _mean_log_confidence(segment: "Segment") -> float:
    logs = [math.log(max(word.confidence, 1e-10)) for word in segment.words]
    return sum(logs) / len(logs) if logs else 0.0


def _compression_ratio(text: str) -> float:
    plain = text.encode()
    return len(plain) / len(zlib.compress(plain))


def _srt(transcript: "Transcript") -> str:
    return "".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n\n"
        for number, (start, end, text) in enumerate(_cues(transcript), start=1)
    )


def _vtt(transcript: "Transcript") -> str:
    cues = []
    for start, end, text in _cues(transcript):
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        cues.append(f"{_clock(start, '.')} --> {_clock(end, '.')}\n{text}\n\n")
    return "WEBVTT\n\n" + "".join(cues)


def _cues(transcript: "Transcript") -> Iterator[tuple[float, float, str]]:
    """Subtitles as (start, end, text): a segment is cut between words where it is too long to read."""
    for segment in transcript.segments:
        cue: list = []
        for word in segment.words:
            lines = len(_lines([*cue, word]))
            if cue and (lines > _CUE_LINES or word.end - cue[0].start > _CUE_SECONDS):
                yield cue[0].start, cue[-1].end, "\n".join(_lines(cue))
                cue = []
            cue.append(word)
        if cue:
            yield cue[0].start, cue[-1].end, "\n".join(_lines(cue))


def _lines(words: list) -> list[str]:
    text = " ".join(word.text for word in words)
    return textwrap.wrap(text, _CUE_LINE, break_long_words=False, break_on_hyphens=False)


def _clock(seconds: float, point: str) -> str:
    milliseconds = max(0, round(seconds * 1000))
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"


def _ctm(transcript: "Transcript", name: str) -> str:
    name = "_".join(name.split())
    return "".join(
        f"{name} 1 {word.start:.2f} {word.end - word.start:.2f} {word.text} {word.confidence:.2f}\n"
        for segment in transcript.segments
        for word in segment.words
    )


def partial_message(text: str, seconds: float) -> dict[str, Any]:
    """The unfinished end of live text, which may still change, after so many seconds of audio."""
    return {"type": "partial", "text": text, "time": round(seconds, 3)}


def final_message(segment: "Segment") -> dict[str, Any]:
    """A finished segment of live text."""
    words = [{"word": word.text, **_times(word), "confidence": round(word.confidence, 3)} for word in segment.words]
    return {"type": "final", "text": segment.text, **_times(segment), "words": words}


def _times(part: "Segment | Word") -> dict[str, float]:
    return {"start": round(part.start, 3), "end": round(part.end, 3)}
