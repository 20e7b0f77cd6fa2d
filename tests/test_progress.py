"""pipelines.progress: what a long job says of itself where there is no terminal."""

import re
from types import SimpleNamespace

import pytest

from pipelines import progress


def test_lines_tell_hours_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with progress.meter("working", total=36_000) as advance:
        for _ in range(10):  # an hour of audio in 12 s, ten times
            clock.now += 12
            advance(3_600, 1_800)  # and only half of it was there
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working: 1.50 h of audio, 2.50 h a minute, 0:01:24 left"
    assert len(lines) == 3  # one each half minute
    assert re.search(r"0:00:12 left$", lines[2])


def test_a_short_job_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.meter("working", total=10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")
