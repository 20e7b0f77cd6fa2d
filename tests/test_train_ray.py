"""Training under Ray Train with faults injected: the loss curve stays the undisturbed one."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from jobs import REPOSITORY, ray_folder, wait_until, workers_of
from tones import log_rows, losses, tone_config, write_corpus

from asr.config import TrainConfig, to_toml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE_SECONDS = 240


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where Ray works, and these tests."""
    with ray_folder() as made:
        yield made


@pytest.fixture(scope="module")
def config(folder: Path) -> TrainConfig:
    return tone_config(write_corpus(folder / "data", rows=80), epochs=2, batch_seconds=6.0, hang_seconds=20.0)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, config: TrainConfig) -> dict[int, float]:
    """The losses of two workers by step."""
    driver = start_training(folder, config, "undisturbed")
    assert driver.wait(PATIENCE_SECONDS) == 0, log_of(folder, "undisturbed")
    assert len(list((folder / "undisturbed" / "model" / "offline").glob("*.onnx"))) == 2
    assert not list(folder.glob("asr-ray-*")), "Ray's own folder is left behind"
    return losses(folder / "undisturbed")


def start_training(folder: Path, config: TrainConfig, name: str) -> subprocess.Popen:
    """`asr train` with two workers, as a user starts it."""
    (folder / f"{name}.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "pipelines.cli", "train", f"{name}.toml", "--out", name, "--workers", "2"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with open(folder / f"{name}.err", "a") as told:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=told, stderr=told)


def log_of(folder: Path, name: str) -> str:
    return (folder / f"{name}.err").read_text()


def steps_of(run: Path) -> list[dict]:
    return log_rows(run, "step") if (run / "log.jsonl").is_file() else []


def worker_processes(run: Path) -> list[int]:
    """Process ids of the workers, by rank."""
    return [int(pid) for pid in re.findall(r"process (\d+)", log_rows(run, "start")[-1]["workers"])]


def assert_no_batch_was_lost_or_read_twice(run: Path, config: TrainConfig) -> None:
    """What counts of a step that was done again is the last time; so taken, each batch is there once, in order."""
    counted = {row["step"]: (row["epoch"], row["batch"]) for row in steps_of(run)}
    assert sorted(counted) == list(range(1, len(counted) + 1))
    batches = [counted[step] for step in sorted(counted)]
    assert batches == sorted(set(batches))
    per_epoch = len(batches) // config.training.epochs
    assert batches == [(e, b) for e in range(config.training.epochs) for b in range(per_epoch)]


def test_a_worker_killed_in_mid_epoch_changes_nothing(
    folder: Path, config: TrainConfig, undisturbed: dict[int, float]
) -> None:
    """Equal to the last bit, also the steps that were done twice."""
    run = folder / "worker"
    driver = start_training(folder, config, "worker")
    wait_until(lambda: len(steps_of(run)) > 9, "ten steps are done", seconds=PATIENCE_SECONDS)
    os.kill(worker_processes(run)[1], signal.SIGKILL)
    assert driver.wait(PATIENCE_SECONDS) == 0, log_of(folder, "worker")
    assert len(log_rows(run, "start")) == 2, "it was started again once"
    told = " ".join(log_of(folder, "worker").split())
    assert re.search(r"rank 1 on \S+ \(process \d+\): died\S* .*starting again from step-", told), told
    assert {row["step"]: row["loss"] for row in reversed(steps_of(run))} == undisturbed
    assert losses(run) == undisturbed
    assert_no_batch_was_lost_or_read_twice(run, config)


def test_a_killed_driver_goes_on_when_started_again(
    folder: Path, config: TrainConfig, undisturbed: dict[int, float]
) -> None:
    run = folder / "driver"
    driver = start_training(folder, config, "driver")
    wait_until(lambda: len(steps_of(run)) > 9, "ten steps are done", seconds=PATIENCE_SECONDS)
    driver.kill()
    driver.wait()
    wait_until(lambda: not workers_of(folder, ""), "Ray's workers ended with their driver")
    assert start_training(folder, config, "driver").wait(PATIENCE_SECONDS) == 0, log_of(folder, "driver")
    assert losses(run) == undisturbed
    assert_no_batch_was_lost_or_read_twice(run, config)


def test_a_worker_that_hangs_is_named_and_started_again(
    folder: Path, config: TrainConfig, undisturbed: dict[int, float]
) -> None:
    run = folder / "hang"
    driver = start_training(folder, config, "hang")
    wait_until(lambda: len(steps_of(run)) > 9, "ten steps are done", seconds=PATIENCE_SECONDS)
    stopped = worker_processes(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    assert driver.wait(PATIENCE_SECONDS) == 0, log_of(folder, "hang")
    told = " ".join(log_of(folder, "hang").split())
    assert re.search(rf"rank 1 on \S+ \(process {stopped}\): died, or did not come for 20 s", told), told
    assert losses(run) == undisturbed


def test_an_error_of_a_worker_ends_the_run_at_once(folder: Path, config: TrainConfig) -> None:
    """What starting again cannot mend is not tried again: here the run's folder turns into a full disk."""
    run = folder / "full"
    driver = start_training(folder, config, "full")
    wait_until(lambda: len(steps_of(run)) > 9, "ten steps are done", seconds=PATIENCE_SECONDS)
    limit = ["prlimit", "--pid", str(worker_processes(run)[0]), "--fsize=30000"]
    subprocess.run(limit, check=True)
    assert driver.wait(PATIENCE_SECONDS) == 1
    told = " ".join(log_of(folder, "full").split())
    assert re.search(r"error: \S*full: cannot be written .*checkpoints/step-\d+ is whole", told), told
    assert "Traceback" not in told
    assert len(log_rows(run, "start")) == 1


def test_torchrun_trains_what_ray_trains(folder: Path, config: TrainConfig, undisturbed: dict[int, float]) -> None:
    (folder / "torchrun.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "asr.training", "torchrun.toml", "--out", "torchrun"]
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "torchrun") == undisturbed
