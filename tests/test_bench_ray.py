"""pipelines.bench_ray: the start does not count, and shares are told."""

import pytest

from pipelines.bench_ray import Finish, compare, speed


def test_the_start_does_not_count() -> None:
    steady = [Finish(100.0 + i, 10.0) for i in range(1, 101)]
    assert speed(steady) == pytest.approx(10.0)
    late = [Finish(finish.time + 500, finish.seconds) for finish in steady]  # the same work, started later
    assert speed(late) == pytest.approx(10.0)
    slow_start = [Finish(0.0, 10.0), *late[1:]]
    assert speed(slow_start) == pytest.approx(10.0)
    assert speed(list(reversed(steady))) == pytest.approx(10.0)


def test_each_round_and_the_median_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    def finishes(pace: float) -> list[Finish]:
        return [Finish(i / pace, 1.0) for i in range(1, 101)]

    speeds = iter((80.0, 95.0, 90.0))
    compare(lambda: finishes(100.0), lambda: finishes(next(speeds)), rounds=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "round 1: plain 100, Ray 80 s of audio a second: 0.800"
    assert lines[-1] == "Ray keeps 0.900 of the speed of plain processes (median of 3)"
