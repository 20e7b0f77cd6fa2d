"""Latency: when words are shown and final, against their ends by forced alignment, for blocks of several sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from toy_model import FRAME, RATE, ToyOptions, spell

from asr.audio import read_audio
from asr.decoding import Word
from asr.errors import ConfigError
from asr.metrics import ErrorCounts
from asr.runtime.folder import shipped_model
from pipelines import evaluate_latency
from pipelines.evaluate_latency import Latency, measure_latency
from pipelines.evaluate_latency_page import latency_page, latency_table
from pipelines.evaluate_live import Stability
from pipelines.transcribe import RecognizerOptions


class ToyAligner:
    """Knows when the toy's words end: each letter is four frames, of which the first two sound."""

    def __init__(self, model: Path | None) -> None: ...

    def words(self, samples: np.ndarray, text: str) -> list[Word]:
        ends, letters = [], 0
        for word in text.split():
            letters += len(word)
            ends.append((FRAME * (1 + 4 * (letters - 1) + 2)) / RATE)
            letters += 1
        return [Word(text=w, start=0.0, end=end, confidence=1.0) for w, end in zip(text.split(), ends, strict=True)]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluate_latency, "Aligner", ToyAligner)
    monkeypatch.setattr(RecognizerOptions, "load", lambda self, **_: ToyOptions().load())
    with (tmp_path / "m.jsonl").open("w") as file:
        for i, text in enumerate(["zyx wvu tsr", "zwz"]):
            soundfile.write(tmp_path / f"{i}.wav", spell(text), RATE)
            file.write(json.dumps({"audio_filepath": f"{i}.wav", "text": text, "speaker": "s"}) + "\n")
    return tmp_path / "m.jsonl"


def test_words_are_shown_within_a_block_of_their_end(rows: Path) -> None:
    results, problems = measure_latency([rows], RecognizerOptions(), [None], blocks=(1, 4, 8))
    assert problems == []
    assert [result.block for result in results] == pytest.approx([0.04, 0.16, 0.32])
    for result in results:
        assert result.errors == ErrorCounts(words=4, characters=15)
        assert len(result.partials) == len(result.finals) == 4
        # the last letter is read within two frames of its beginning, and a block
        assert all(-0.08 <= t <= result.block + 0.02 for t in result.partials)
        assert all(result.finals >= result.partials)
        assert result.finals.max() < 3.5
    assert results[0].partials.mean() < results[2].partials.mean()


def test_words_of_unreadable_rows_are_deletions(rows: Path) -> None:
    (rows.parent / "1.wav").write_bytes(b"")
    results, problems = measure_latency([rows], RecognizerOptions(), [None], blocks=(4,))
    assert [problem.where for problem in problems] == [f"{rows}:2"]
    assert (results[0].errors.words, results[0].errors.deletions) == (4, 1)
    assert len(results[0].partials) == 3
    (rows.parent / "0.wav").write_bytes(b"")
    with pytest.raises(ConfigError, match="--latency"):
        measure_latency([rows], RecognizerOptions(), [None])


def result(model: str, block: float, errors: int, partials: list[float]) -> Latency:
    return Latency(
        model=model, look_ahead=0.08, block=block, errors=ErrorCounts(words=100, substitutions=errors),
        partials=np.array(partials), finals=np.array(partials) + 1, stability=Stability(kept=90, changed=10),
    )  # fmt: skip


def test_the_table_and_the_figure() -> None:
    results = [
        result("one", 0.04, 30, [0.1, 0.2, 0.3]),
        result("<two>", 0.16, 20, [-0.1, 0.3]),
        result("one", 0.32, 25, []),
    ]
    figures = results[0].figures()
    assert (figures["first_partial_p50"], figures["final_p50"], figures["wer"]) == (0.2, 1.2, 0.3)
    assert results[2].figures()["first_partial_p99"] is None
    json.dumps([r.figures() for r in results], allow_nan=False)
    lines = latency_table(results).splitlines()
    assert len(lines) == 4
    assert lines[1].split()[1:6] == ["80", "40", "30.00", "3", "200"]
    page = latency_page(results, "about <this>")
    assert page.count("<circle") == 2
    assert "<two>" not in page and "&lt;two&gt;" in page and "about &lt;this&gt;" in page
    assert latency_page([results[2]], "nothing timed").count("<circle") == 0


def test_forced_alignment_finds_letters_where_they_sound() -> None:
    samples = Path(__file__).parents[1] / "scripts" / "samples"
    row = json.loads((samples / "samples.jsonl").read_text().splitlines()[0])
    audio = read_audio(samples / row["audio_filepath"])
    aligner = evaluate_latency.Aligner(shipped_model())
    words = aligner.words(audio, row["text"])
    assert [word.text for word in words] == row["text"].lower().split()
    ends = [word.end for word in words]
    assert ends == sorted(ends) and ends[0] > 0 and ends[-1] <= len(audio) / RATE
    delayed = aligner.words(np.concatenate([np.zeros(RATE, np.float32), audio]), row["text"])
    assert np.median([b.end - a.end for a, b in zip(words, delayed, strict=True)]) == pytest.approx(1.0, abs=0.15)
    assert aligner.words(audio[:800], row["text"]) == []
    assert aligner.words(audio, "日本") == []
