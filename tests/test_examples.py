"""The worked examples of the documents run, and do what they say."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "docs/examples"


def test_an_lstm_forecasts_a_chaotic_series_and_finds_what_is_odd(tmp_path: Path) -> None:
    path = EXAMPLES / "time_series.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    figures = runpy.run_path(str(path))["main"](str(tmp_path / "series.png"))
    assert figures["LSTM"] < 0.5 * figures["linear"] < figures["last value"]
    assert figures["odd"] > 10  # times the usual error
    assert (tmp_path / "series.png").read_bytes().startswith(b"\x89PNG")


def test_an_lstm_learns_an_agreement_that_n_grams_miss(capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / "next_word.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    figures = runpy.run_path(str(path))["main"]("the cats near the dog")
    assert figures["LSTM"] < 0.95 * figures["5 words"] < 0.5 * figures["1 words"]
    said = capsys.readouterr().out.split()
    assert said[:5] == ["the", "cats", "near", "the", "dog"] and said[-1] == "</s>"
    assert said[-2] in ("sleep", "sing", "wait")
