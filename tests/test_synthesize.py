"""Synthetic speech: reproducible, honest in its manifest, and kept apart from the demo's samples."""

import json
import lzma
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.errors import AsrError
from asr.text import normalize

pytest.importorskip("espeakng_loader", reason="synthetic speech needs espeakng-loader (extra [train])")

from pipelines.synthesize import (
    HELD_OUT_VOICES,
    TRAINING_VOICES,
    Speaker,
    main,
    read_lines,
    spoken_commands,
    spoken_digits,
    synthesize,
    voices,
)

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "scripts" / "samples" / "samples.jsonl"
SHARED = ROOT.parent / "shared" / "data"


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_manifest_tells_what_was_spoken(tmp_path: Path) -> None:
    manifest = synthesize(["Seven, two!", "   ", "Don't go left."], tmp_path / "speech", voices=["en-us+f1"])
    rows = rows_of(manifest)
    assert [row["text"] for row in rows] == ["seven two", "don't go left"]
    for row in rows:
        info = soundfile.info(manifest.parent / row["audio_filepath"])
        assert (info.samplerate, info.channels, info.format) == (16_000, 1, "FLAC")
        assert row["duration"] == pytest.approx(info.frames / 16_000, abs=1e-3)
        assert row["speaker"] == "espeak-en-us+f1"


def test_the_same_call_gives_the_same_bytes(tmp_path: Path) -> None:
    lines = spoken_digits(6)
    synthesize(lines, tmp_path / "a", seed=3)
    Speaker().speak("something else in between", "en-us+f4")
    synthesize(lines, tmp_path / "b", seed=3)
    synthesize(lines, tmp_path / "c", seed=4)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_breath_is_the_same_noise_at_any_time() -> None:
    """espeak-ng seeds the noise of a breathy voice from the clock, in whole seconds."""

    def breathe() -> np.ndarray:
        return Speaker().speak("seven two nine", "en-us+f5")

    first = breathe()
    time.sleep(1.1)
    np.testing.assert_array_equal(breathe(), first)


def test_rate_and_pitch_are_heard() -> None:
    def bass(samples: np.ndarray) -> float:
        """The share of the energy below 120 Hz, where only a low voice has its fundamental."""
        spectrum = np.abs(np.fft.rfft(samples)) ** 2
        return float(spectrum[: 120 * len(samples) // 16_000].sum() / spectrum.sum())

    speaker = Speaker()
    slow = speaker.speak("seven two nine", "en-us", rate=110)
    fast = speaker.speak("seven two nine", "en-us", rate=220)
    assert len(slow) > 1.4 * len(fast)
    assert np.abs(slow).max() <= 1
    low, high = (speaker.speak("no no no no", "en-us", pitch=pitch) for pitch in (10, 90))
    assert bass(low) > 3 * bass(high)


def test_limit_and_level(tmp_path: Path) -> None:
    manifest = synthesize(spoken_digits(5), tmp_path, limit=2, level=(0.5, 0.5))
    assert len(rows_of(manifest)) == 2
    for row in rows_of(manifest):
        samples, _ = soundfile.read(tmp_path / row["audio_filepath"])
        assert np.abs(samples).max() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("voice", ["xx", "en-us+nobody"])
def test_an_unknown_voice_is_refused_by_name(tmp_path: Path, voice: str) -> None:
    with pytest.raises(AsrError, match=r"has no voice '" + voice.replace("+", r"\+")):
        synthesize(["seven"], tmp_path, voices=[voice])
    assert not (tmp_path / "manifest.jsonl").exists()


def test_every_named_voice_speaks() -> None:
    assert {*TRAINING_VOICES, *HELD_OUT_VOICES} <= set(voices())
    speaker = Speaker()
    for voice in (*TRAINING_VOICES, *HELD_OUT_VOICES):
        assert len(speaker.speak("seven", voice)) > 1600, voice


def test_the_samples_voices_are_kept_out_of_training() -> None:
    heard = {voice.partition("+")[2] for voice in TRAINING_VOICES}
    assert not heard & {voice.partition("+")[2] for voice in HELD_OUT_VOICES}
    assert {row["speaker"] for row in rows_of(SAMPLES)} == {f"espeak-{voice}" for voice in HELD_OUT_VOICES}


def test_the_samples_are_as_their_manifest_says() -> None:
    rows = rows_of(SAMPLES)
    assert len(rows) == 12
    for row in rows:
        info = soundfile.info(SAMPLES.parent / row["audio_filepath"])
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert row["duration"] == pytest.approx(info.frames / 16_000, abs=1e-3)
        assert row["text"] == normalize(row["text"])
    assert "synthetic" in (SAMPLES.parent / "README.md").read_text(encoding="utf-8")


def test_the_samples_sentences_are_not_what_training_says() -> None:
    texts = {row["text"] for row in rows_of(SAMPLES)}
    assert not texts & {*spoken_digits(5000), *spoken_commands(5000)}


def test_the_samples_sentences_are_in_no_training_data() -> None:
    books = SHARED / "text" / "books.txt.xz"
    if not books.exists():
        pytest.skip("needs ../shared/data (the training texts)")
    seen = set(lzma.decompress(books.read_bytes()).decode().splitlines())
    for manifest in SHARED.glob("*/train.jsonl"):
        seen |= {normalize(row["text"]) for row in rows_of(manifest)}
    assert not {row["text"] for row in rows_of(SAMPLES)} & seen


def test_lines_are_drawn_from_a_text(tmp_path: Path) -> None:
    lines = ["too short", *(f"a line of words number {n}" for n in range(20)), "long " * 13]
    plain, packed = tmp_path / "text.txt", tmp_path / "text.txt.xz"
    plain.write_text("\n".join([*lines, ""]), encoding="utf-8")
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    assert read_lines(plain) == read_lines(packed) == [line.strip() for line in lines]
    drawn = read_lines(packed, count=5, seed=1)
    assert len(set(drawn)) == 5 and set(drawn) <= set(lines[1:-1])
    assert drawn == read_lines(packed, count=5, seed=1) != read_lines(packed, count=5, seed=2)
    with pytest.raises(AsrError, match=r"has 20 lines of 3 to 12 words; 21 were asked for"):
        read_lines(plain, count=21)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--digits", "2", "--commands", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "manifest.jsonl")
    assert len(rows_of(tmp_path / "manifest.jsonl")) == 3
    assert main(["--text", str(tmp_path / "none.txt"), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error:") and "none.txt" in error
