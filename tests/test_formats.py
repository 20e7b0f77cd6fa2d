"""How transcripts are written down."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asr.decoding import Word
from asr.errors import AsrError
from asr.recognizer import Segment, Transcript
from pipelines.formats import FORMATS, render, render_among_many, write_text


def transcript(*segments: list[Word]) -> Transcript:
    made = [
        Segment(text=" ".join(w.text for w in words), start=words[0].start, end=words[-1].end, words=tuple(words))
        for words in segments
    ]
    return Transcript(
        text=" ".join(s.text for s in made),
        words=tuple(w for s in made for w in s.words),
        segments=tuple(made),
        duration=made[-1].end if made else 1.0,
    )


def word(text: str, start: float, end: float, confidence: float = 0.5) -> Word:
    return Word(text=text, start=start, end=end, confidence=confidence)


TWO = transcript(
    [word("hello", 0.5, 1.0), word("there", 1.25, 2.0)],
    [word("good", 3661.0, 3661.5), word("bye", 3662.0, 3663.0004)],
)
SILENCE = transcript()


def test_txt_has_a_segment_a_line() -> None:
    assert render(TWO, "txt", "a") == "hello there\ngood bye\n"


def test_among_many_each_line_tells_whose_it_is() -> None:
    assert render_among_many(TWO, "txt", "a", "x/a.wav") == "x/a.wav\thello there good bye\n"
    line = render_among_many(TWO, "json", "a", "x/a.wav")
    assert line.count("\n") == 1
    assert json.loads(line)["path"] == "x/a.wav"
    with pytest.raises(AsrError, match="srt"):
        render_among_many(TWO, "srt", "a", "a.wav")


def test_json_has_the_shape_of_whisper() -> None:
    result = json.loads(render(TWO, "json", "a"))
    assert result.keys() == {"text", "segments", "language"}
    assert result["text"] == "hello there good bye"
    first, second = result["segments"]
    whisper = {"id", "seek", "start", "end", "text", "tokens", "temperature", "avg_logprob"}
    assert first.keys() == whisper | {"compression_ratio", "no_speech_prob", "words"}
    assert (first["id"], second["id"]) == (0, 1)
    assert (second["start"], second["end"]) == (3661.0, 3663.0)  # to the millisecond
    assert first["avg_logprob"] == pytest.approx(-0.6931, abs=1e-4)
    assert first["words"][0] == {"word": " hello", "start": 0.5, "end": 1.0, "probability": 0.5}
    assert "".join(w["word"] for s in result["segments"] for w in s["words"]).strip() == result["text"]


def test_srt() -> None:
    assert render(TWO, "srt", "a") == (
        "1\n00:00:00,500 --> 00:00:02,000\nhello there\n\n2\n01:01:01,000 --> 01:01:03,000\ngood bye\n\n"
    )


def test_vtt_escapes_what_would_be_markup() -> None:
    text = render(transcript([word("a<b", 0.0, 0.9996), word("&c", 1.0, 59.9999)]), "vtt", "a")
    assert text.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\na&lt;b\n\n")
    assert "00:01:00.000\n&amp;c\n" in text  # 59.9999 s rounds up to a minute, not to 60 seconds


def test_ctm_is_six_columns_whatever_the_file_is_called() -> None:
    lines = render(TWO, "ctm", "my talk/part 1").splitlines()
    assert lines[0] == "my_talk/part_1 1 0.50 0.50 hello 0.50"
    assert all(len(line.split()) == 6 for line in lines)
    assert len(lines) == 4


@pytest.mark.parametrize("format", FORMATS)
def test_silence(format: str) -> None:
    text = render(SILENCE, format, "a")
    if format == "json":
        assert json.loads(text) == {"text": "", "segments": [], "language": None}
    else:
        assert text == ("WEBVTT\n\n" if format == "vtt" else "")


@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 3.0)), min_size=1, max_size=60))
def test_long_segments_are_cut_into_subtitles_that_can_be_read(shapes: list[tuple[int, float]]) -> None:
    words, clock = [], 0.0
    for length, seconds in shapes:
        words.append(word("x" * length, clock, clock + seconds))
        clock += seconds
    cues = render(transcript(words), "srt", "a").strip().split("\n\n")
    shown = [line for cue in cues for line in cue.split("\n")[2:]]
    assert " ".join(shown).split() == [w.text for w in words]
    assert all(len(line) <= 42 for line in shown)
    assert all(len(cue.split("\n")) <= 4 for cue in cues)  # number, times, two lines
    end_before = -1
    for cue in cues:
        start, end = (_milliseconds(t) for t in cue.split("\n")[1].split(" --> "))
        assert end_before <= start < end <= start + 7_001
        end_before = end


def _milliseconds(clock: str) -> int:
    hours, minutes, seconds, milliseconds = map(int, re.split("[:,]", clock))
    return ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(AsrError, match=r"'doc'.*txt, json"):
        render(TWO, "doc", "a")


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "first")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(AsrError, match=r"a\.txt: cannot be written \(No space left"):
        write_text(target, "second")
    assert target.read_text() == "first"
    assert os.listdir(target.parent) == ["a.txt"]


def test_devices_are_written_to_and_never_replaced() -> None:
    write_text(Path("/dev/null"), "x")
    assert not Path("/dev/null").is_file()
