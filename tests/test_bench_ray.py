"""pipelines.bench_ray: the start does not count, and shares are told."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.bench_ray import Cost, Finish, compare, cost, processor_seconds
from pipelines.processes import state_of

IDLE = [(0.0, 0.0), (1e9, 0.0)]


def test_the_start_does_not_count() -> None:
    steady = [Finish(100.0 + i, 10.0) for i in range(1, 101)]
    assert cost(steady, IDLE).speed == pytest.approx(10.0)
    slow_start = [Finish(0.0, 10.0), *steady[1:]]
    assert cost(slow_start, IDLE).speed == pytest.approx(10.0)
    assert cost(list(reversed(steady)), IDLE).speed == pytest.approx(10.0)


def test_processor_time_is_that_of_the_same_stretch() -> None:
    steady = [Finish(100.0 + i, 36.0) for i in range(1, 101)]  # an hour in 100 s
    cpu = [(100.0, 50.0), (110.0, 90.0), (200.0, 270.0), (250.0, 400.0)]  # a busy start, a busy end
    assert cost(steady, cpu).cpu == pytest.approx(200.0)


def test_each_round_and_the_medians_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    ray = iter([Cost(80.0, 20.0), Cost(95.0, 21.0), Cost(90.0, 22.0)])
    compare(lambda: Cost(100.0, 20.0), lambda: next(ray), rounds=3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("round 1: plain 100, Ray 80 s of audio a second; plain 20.0, Ray 20.0 s of processor")
    assert lines[-1].startswith("Ray has 0.900 of the speed of plain processes, and 1.050 of their processor time")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_the_time_of_child_processes_counts() -> None:
    code = "import sys, time\nwhile time.process_time() < 1: pass\nprint(flush=True); sys.stdin.read()"
    before, own = processor_seconds(), time.process_time()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()  # it has had its second
        used = processor_seconds() - before
    assert used > 0.95
    assert time.process_time() - own < 0.5


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_a_process_may_have_any_name(tmp_path: Path) -> None:
    program = tmp_path / "1 ) (2 3"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-Sc", "input()"], stdin=subprocess.PIPE) as child:
        assert state_of(child.pid).parent == os.getpid()
    with pytest.raises(OSError):
        state_of(child.pid)
