"""pipelines.prepare over Ray: the same bytes as in one process, whatever is killed on the way."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [train]")
pytest.importorskip("ray", reason="needs the extra [train]")
import jobs
from test_decoder import CRASHING
from test_prepare import content, recordings, write_manifest

from asr.training.shards import ShardDataset
from pipelines.prepare import prepare

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]

JOB = """
import sys
from pipelines.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], workers=2, shard_seconds=20)
"""


@pytest.fixture(autouse=True)
def ray_folder() -> Iterator[Path]:
    with jobs.ray_folder() as folder:
        yield folder


def test_ray_makes_the_same_bytes(tmp_path: Path) -> None:
    rows = recordings(tmp_path, 8)
    rows[3]["audio_filepath"] = "gone.wav"
    manifest = write_manifest(tmp_path, rows)
    alone = prepare([manifest], tmp_path / "alone", workers=0, shard_seconds=1.0)
    together = prepare([manifest], tmp_path / "together", workers=2, shard_seconds=1.0)
    assert content(tmp_path / "alone") == content(tmp_path / "together")
    assert together.skipped == alone.skipped
    assert [p.where for p in together.skipped] == [f"{manifest}:4"]


def test_a_killed_driver_is_taken_up(tmp_path: Path, ray_folder: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 60, seconds=10.0))
    prepare([manifest], tmp_path / "undisturbed", workers=0, shard_seconds=20.0)
    out = tmp_path / "killed"
    with jobs.job(JOB, manifest, out):
        jobs.wait_until(lambda: list(out.glob("shard-*.json")), "a shard is finished")
    assert not (out / "dataset.json").exists()
    resumed = prepare([manifest], out, workers=2, shard_seconds=20.0)
    assert 1 <= resumed.reused < resumed.shards
    assert content(out) == content(tmp_path / "undisturbed")
    assert not list(ray_folder.glob("asr-ray-*"))  # what the killed job could not remove is gone too


def test_a_killed_worker_is_replaced(tmp_path: Path, ray_folder: Path) -> None:
    manifest = write_manifest(tmp_path, recordings(tmp_path, 60, seconds=10.0))
    prepare([manifest], tmp_path / "undisturbed", workers=0, shard_seconds=20.0)
    out = tmp_path / "killed"
    with jobs.job(JOB, manifest, out) as started:
        jobs.wait_until(lambda: list(out.glob("shard-*.json")), "a shard is finished")
        jobs.wait_until(lambda: jobs.workers_of(ray_folder, "make_shard"), "a worker is at work")
        victim = jobs.workers_of(ray_folder, "make_shard")[0]
        assert not (out / "dataset.json").exists()
        os.kill(victim, signal.SIGKILL)
        assert started.wait(timeout=200) == 0
    assert content(out) == content(tmp_path / "undisturbed")


def test_a_crashing_decoder_costs_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CRASHING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    rows = recordings(tmp_path, 12)
    (tmp_path / "005.wav").rename(tmp_path / "crash.wav")
    (tmp_path / "crash.wav.once").write_text("again")
    rows[5]["audio_filepath"] = "crash.wav"
    manifest = write_manifest(tmp_path, rows)
    summary = prepare([manifest], tmp_path / "out", workers=2, shard_seconds=2.0)
    assert [(p.where, "crashed (SIGSEGV)" in p.reason) for p in summary.skipped] == [(f"{manifest}:6", True)]
    assert ShardDataset(tmp_path / "out").ids == [f"{i:03d}" for i in range(12) if i != 5]
