"""Many clients at once, polite and rude, for seconds and for minutes; and what the load generator reports."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from asr.errors import AsrError
from pipelines.serve import soak
from pipelines.serve.clients import started
from pipelines.serve.load import run_load
from pipelines.serve.run import Addresses
from pipelines.serve.soak import Report, metric_of, run_soak

ROOT = Path(__file__).parents[1]
SAMPLES = sorted((ROOT / "scripts" / "samples" / "audio").glob("*.flac"))


def test_seconds_of_mixed_clients_lose_nothing() -> None:
    report = run_soak(SAMPLES, sessions=12, seconds=3, tell=lambda line: None)
    assert report.problems() == []
    assert report.sessions.total() >= 12
    assert len(report.sessions) > 3, "the clients were not mixed"


def test_what_is_wrong_is_told() -> None:
    grown = Report(memory=[100 << 20] * 50 + [200 << 20] * 50, wrong=["vosk: lost"], left=3)
    told = "\n".join(grown.problems())
    assert "memory grew from 100 to 200 MiB" in told
    assert "vosk: lost" in told
    assert "3 sessions" in told
    assert Report(memory=[100 << 20] * 100).problems() == []


def test_memory_is_judged_once_the_server_is_warm() -> None:
    warming = [n << 20 for n in range(25)] + [100 << 20] * 50
    assert Report(memory=[*warming, *[121 << 20] * 25]).problems() == [], "5 % and 16 MiB are allowed"
    assert Report(memory=[*warming, *[122 << 20] * 25]).problems() == ["memory grew from 100 to 122 MiB"]


def test_memory_that_is_not_seen_is_not_flat() -> None:
    assert Report(memory=[1] * 3).problems() == ["memory was seen 3 times: too few to tell whether it grew"]
    text = '# TYPE asr_sessions gauge\nasr_sessions{protocol="vosk"} 2.0\nasr_sessions{protocol="native"} 1.0\n'
    assert metric_of(text, "asr_sessions") == 3
    assert metric_of("# TYPE asr_sessions gauge\n", "asr_sessions") == 0
    with pytest.raises(AsrError, match="no metric process_resident_memory_bytes"):
        metric_of(text, "process_resident_memory_bytes")


def test_a_server_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = dict.fromkeys(("main", "vosk", "sherpa"), "http://127.0.0.1:1")  # nobody listens there
    server = Mock(addresses=Addresses(**nowhere))
    monkeypatch.setattr(soak, "started", lambda *options: nullcontext(server))
    monkeypatch.setattr(soak, "_SAMPLE_SECONDS", 0.01)
    told = "\n".join(run_soak(SAMPLES, sessions=1, seconds=0.1, tell=lambda line: None).problems())
    assert "memory: the server's metrics cannot be read" in told
    assert "memory was seen 0 times" in told
    assert "sessions that are left: the server's metrics" in told


def test_load_is_measured() -> None:
    load = run_load(SAMPLES, sessions=4, seconds=2, options=["--decoding", "greedy"])
    assert load.failed == 0
    assert 70 <= load.replies <= 90, "four sessions of two seconds, ten messages a second"
    assert 0 < load.median <= load.p95 <= load.p99 <= load.largest
    assert load.server_cores > 0 and load.sender_cores > 0


def test_a_server_that_does_not_start_tells_why() -> None:
    with pytest.raises(AsrError, match=r"did not start: .*no such model"), started("--model", "no such model"):
        pass


@pytest.mark.slow
def test_two_minutes_of_a_hundred_clients() -> None:
    """As scripts/soak runs it."""
    command = [sys.executable, "-m", "pipelines.serve.soak", "--sessions", "100", "--minutes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all finals equal; no session lost; memory flat" in done.stdout
