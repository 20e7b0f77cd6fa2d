"""Short recordings joined to longer ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_model import RATE

from asr.errors import AsrError
from pipelines.join import join_recordings, main


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A manifest of 12 words of two speakers: noise of a second, each louder than the one before."""
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        soundfile.write(tmp_path / f"{i}.wav", rng.normal(0, 0.003 * (i + 1), RATE).clip(-1, 1), RATE)
        speaker = "ab"[i % 2]
        rows.append({"audio_filepath": f"{i}.wav", "duration": 1.0, "text": f"Word {chr(97 + i)}", "speaker": speaker})
    manifest = tmp_path / "words.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def test_each_word_is_said_once_among_others_of_its_speaker(words: Path, tmp_path: Path) -> None:
    path, problems = join_recordings([words], tmp_path / "out", seconds=4)
    assert not problems
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    said = [row["text"].split()[1::2] for row in rows]
    assert sorted(letter for letters in said for letter in letters) == [chr(97 + i) for i in range(12)]
    for row, letters in zip(rows, said, strict=True):
        assert {(ord(letter) - 97) % 2 for letter in letters} == {"ab".index(row["speaker"][-1])}
        samples, rate = soundfile.read(path.parent / row["audio_filepath"])
        assert (rate, round(len(samples) / rate, 3)) == (RATE, row["duration"])
        assert len(letters) + 0.05 * len(letters) <= row["duration"] <= 2.2 * len(letters)
        assert np.std(samples[: RATE // 2]) == pytest.approx(0.003 * (ord(letters[0]) - 96), rel=0.1)
    again, _ = join_recordings([words], tmp_path / "again", seconds=4)
    assert again.read_text() == path.read_text()
    other, _ = join_recordings([words], tmp_path / "other", seconds=4, seed=1)
    assert other.read_text() != path.read_text()


def test_what_cannot_be_read_is_left_out_and_told(
    words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "3.wav").write_bytes(b"no audio")
    words.write_text(words.read_text().replace("Word f", "..."))
    assert main([str(words), "--out", str(tmp_path / "out"), "--seconds", "3"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(tmp_path / "out" / "manifest.jsonl")
    assert f"{words}:4: " in err
    assert f"{words}:6: has no text" in err
    text = (tmp_path / "out" / "manifest.jsonl").read_text()
    assert "word c" in text
    assert "word d" not in text
    words.write_text('{"audio_filepath": "3.wav", "text": "word"}\n')
    with pytest.raises(AsrError, match=rf"{words}: no row can be joined; the first: {words}:1: "):
        join_recordings([words], tmp_path / "none")
    assert main([str(words), "--out", str(tmp_path / "none")]) == 1
