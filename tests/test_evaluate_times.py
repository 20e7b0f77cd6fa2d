"""Word times: found, measured against recordings with known pauses, and fitted."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr.decoding import Word
from asr.errors import ConfigError
from asr.network import Segment, Transcript, transcript_of
from asr.recognizer import Recognizer
from pipelines.cli import main
from pipelines.evaluate_times import Boundaries, fit_times, speech_edges, word_times
from pipelines.transcribe import RecognizerOptions

RATE = 16_000
DATA = Path(__file__).parents[2] / "shared" / "data"


TEXTS = ("one", "two", "three", "four", "five", "six")
LATE, SHORT = 0.1, 0.05  # seconds: how wrong the recognizer below is


class Listener:
    """Recognizes sounds by their pitch, 500 Hz for "one", 100 Hz more for each after it; its times are wrong."""

    def transcribe_batch(self, batch: list[np.ndarray], network: str) -> list[Transcript]:
        return [transcript_of([self._segment(samples)], len(samples) / RATE) for samples in batch]

    def _segment(self, samples: np.ndarray) -> Segment:
        loud = np.flatnonzero(np.abs(samples) > 0.1)
        borders = np.flatnonzero(np.diff(loud) > RATE // 5)
        firsts, lasts = loud[np.append(0, borders + 1)], loud[np.append(borders, len(loud) - 1)]
        words = []
        for a, b in zip(firsts.tolist(), lasts.tolist(), strict=True):
            pitch = np.abs(np.fft.rfft(samples[a:b])).argmax() * RATE / (b - a)
            text = TEXTS[round((pitch - 500) / 100)]
            words.append(Word(text=text, start=a / RATE + LATE, end=b / RATE - SHORT, confidence=1.0))
        return Segment(text=" ".join(w.text for w in words), start=0.0, end=len(samples) / RATE, words=tuple(words))


class Options(RecognizerOptions):
    def load(self, *, endpoint: bool = True) -> Recognizer:
        return Listener()  # type: ignore[return-value]


def recordings(folder: Path, count: int) -> Path:
    """Sounds with silence around them, and their manifest: ten for a speaker."""
    with (folder / "m.jsonl").open("w") as file:
        for i in range(count):
            pitch, length = 500 + 100 * (i % len(TEXTS)), round((0.3 + 0.02 * (i % 7)) * RATE)
            sound = 0.3 * np.sin(2 * np.pi * pitch * np.arange(length) / RATE)
            quiet = [np.zeros(RATE // 4 + 100 * i), np.zeros(RATE // 4)]
            samples = np.concatenate([quiet[0], sound, quiet[1]])
            samples += 1e-3 * np.random.default_rng(i).standard_normal(len(samples))
            soundfile.write(folder / f"{i}.wav", samples, RATE)
            row = {"audio_filepath": f"{i}.wav", "text": TEXTS[i % len(TEXTS)], "speaker": f"s{i // 10}"}
            file.write(json.dumps({**row, "duration": len(samples) / RATE}) + "\n")
    return folder / "m.jsonl"


def test_the_edges_of_speech() -> None:
    rng = np.random.default_rng(0)
    samples = np.concatenate([np.zeros(RATE), rng.standard_normal(RATE // 2), np.zeros(RATE)]).astype(np.float32)
    samples += 1e-3 * rng.standard_normal(len(samples)).astype(np.float32)
    assert speech_edges(samples) == pytest.approx((1.0, 1.5), abs=0.02)
    assert speech_edges(samples[: 5 * RATE // 4]) is None  # cut off
    assert speech_edges(np.zeros(RATE, np.float32)) is None
    assert speech_edges(samples[:100]) is None


def test_errors_of_times_between_known_pauses(tmp_path: Path) -> None:
    found, problems = word_times([recordings(tmp_path, 24)], Options(), "streaming")
    assert problems == []
    assert found.recordings == len(found.starts) == len(found.ends) == 24
    assert found.start_errors == pytest.approx(np.full(24, LATE), abs=0.025)
    assert found.end_errors == pytest.approx(np.full(24, -SHORT), abs=0.025)
    figures = found.figures()
    assert (figures["start_median"], figures["end_median"]) == pytest.approx((LATE, SHORT), abs=0.02)
    assert figures["end_median"] < figures["both_median"] < figures["both_p95"] <= figures["start_p95"]


def test_other_words_are_not_measured(tmp_path: Path) -> None:
    path = recordings(tmp_path, 12)
    path.write_text(path.read_text().replace('"three"', '"tree"'))
    found, _ = word_times([path], Options(), "offline")
    assert (found.recordings, len(found.starts)) == (12, 10)


def test_recordings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = recordings(tmp_path, 3)
    (tmp_path / "0.wav").write_bytes(b"")
    found, problems = word_times([path], Options(), "offline")
    assert (found.recordings, len(found.starts)) == (2, 2)
    assert [problem.where for problem in problems] == [f"{path}:1"]


def boundaries(count: int, start: float, end: float) -> Boundaries:
    words = [Word(text="w", start=float(i), end=i + 0.5, confidence=1.0) for i in range(count)]
    return Boundaries(
        recordings=count,
        starts=tuple((word, word.start - start) for word in words),
        ends=tuple((word, word.end - end) for word in words),
    )


def test_the_fit_takes_the_usual_error_away() -> None:
    found = boundaries(50, 0.17, -0.08)
    fitted = fit_times(found)
    assert (fitted.start_shift, fitted.end_shift) == (pytest.approx(-0.17), pytest.approx(0.08))
    assert fitted.reach > 0
    with pytest.raises(ConfigError, match="--calibrate"):
        fit_times(boundaries(3, 0.1, 0.1))


def test_the_command_tells_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Recognizer, "load", lambda *_, **__: Listener())
    network = tmp_path / "model" / "offline"
    network.mkdir(parents=True)
    (network / "config.toml").write_text("format_version = 1\n[model]\n")
    (network / "tokens.txt").write_text("<blank>\n")
    path = recordings(tmp_path, 36)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "evaluate",
                "--times",
                "--calibrate",
                "-m",
                str(tmp_path / "model"),
                str(path),
                "--json",
                str(tmp_path / "j"),
            ]
        )
    assert not ended.value.code
    kept = json.loads((network / "calibration.json").read_text())["greedy"]
    assert (kept["start_shift"], kept["end_shift"]) == pytest.approx((-LATE, SHORT), abs=0.02)
    assert kept["confidence"] == []
    assert json.loads((tmp_path / "j").read_text())["recordings"] == 36
    assert "median error" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--calibrate", str(path)])
    assert ended.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("network", ["offline", "streaming"])
def test_the_shipped_model_times_real_words(network: str) -> None:
    if not DATA.exists():
        pytest.skip("needs ../shared/data")
    found, _ = word_times([DATA / "speech_commands" / "test.jsonl"], RecognizerOptions(), network)
    figures = found.figures()
    assert figures["both_median"] <= 0.06
    assert figures["both_p95"] <= 0.15
