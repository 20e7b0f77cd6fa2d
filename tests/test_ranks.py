"""asr.training.ranks: several workers train as one; one that is gone is named."""

import datetime
import multiprocessing
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from tones import log_rows, losses, tone_config, write_corpus

from asr.config import TrainConfig, to_toml
from asr.models import load_network
from asr.training.data import Corpus, Sampler
from asr.training.loop import run_training
from asr.training.ranks import RankError, Ranks, Stragglers


def in_two_processes(function: Callable[..., None], *arguments: object) -> None:
    """Run function(rank, *arguments) in two processes that torch.distributed joins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(["asr.training.loop"])  # imported once, for all
    torch.multiprocessing.start_processes(  # pyright: ignore[reportPrivateImportUsage]
        _joined, (port, function, *arguments), nprocs=2, start_method="forkserver"
    )


def _joined(rank: int, port: int, function: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=limit)
    function(rank, *arguments)
    torch.distributed.destroy_process_group()


def _train_two(rank: int, config: TrainConfig, run: Path) -> None:
    run_training(config, run, rank=rank, world=2)


def test_two_workers_give_the_curve_of_one(tmp_path: Path) -> None:
    """Same global batches, same masks: losses agree to 1 in 1000 (sums are taken in another order).

    Half of the batches have one utterance, so that one worker has nothing to do.
    """
    folder = write_corpus(tmp_path / "d", rows=40)
    config = tone_config(folder, batch_utterances=3, batch_seconds=4.0)
    sizes = [len(plan.rows) for plan in Sampler(Corpus(config.data.train), config, 640).epoch(0)]
    assert 1 in sizes
    run_training(config, tmp_path / "one")
    in_two_processes(_train_two, config, tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(abs(one[s] - two[s]) <= 1e-3 * one[s] for s in one), (one, two)
    heard = [log_rows(tmp_path / name, "step")[-1]["audio_hours"] for name in ("one", "two")]
    assert abs(heard[0] - heard[1]) < 1e-9
    scores = [log_rows(tmp_path / name, "dev")[-1]["loss"] for name in ("one", "two")]
    assert abs(scores[0] - scores[1]) <= 1e-3 * scores[0]


def test_ranks_agree_on_the_checkpoint_before_a_damaged_one(tmp_path: Path) -> None:
    folder, run = write_corpus(tmp_path / "d", rows=12), tmp_path / "run"
    config = tone_config(folder, epochs=1, checkpoint_steps=1, batch_seconds=6.0)
    in_two_processes(_train_two, config, run)
    undisturbed, (before, newest) = losses(run), sorted((run / "checkpoints").iterdir())
    (newest / "random.safetensors").write_bytes(b"")
    in_two_processes(_train_two, config, run)
    assert f"continuing from {before.name}, as {newest.name}" in log_rows(run, "start")[-1]["text"]
    assert losses(run) == undisturbed


def _meet_one_that_is_gone(rank: int, told: Path, inside: bool) -> None:
    ranks = Ranks(rank, 2, torch.device("cpu"), 60.0)
    assert ranks.gather([float(rank)]) == [[0.0], [1.0]]
    with pytest.raises(RuntimeError, match=r"^out of memory$"), ranks.meet():
        raise RuntimeError("out of memory")  # of this rank alone: nobody else is to blame
    if rank == 1 and inside:
        with ranks.meet():
            os._exit(0)
    if rank == 1:
        os._exit(0)
    try:
        ranks.wait()
    except RankError as error:
        told.write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("inside", [False, True])
def test_a_rank_that_is_gone_is_named(tmp_path: Path, inside: bool) -> None:
    in_two_processes(_meet_one_that_is_gone, tmp_path / "told", inside)
    assert (tmp_path / "told").read_text().startswith(f"rank 1 on {platform.node()} (process ")


def test_a_straggler_is_found_by_its_work_over_many_steps() -> None:
    network = torch.nn.Linear(1, 1)
    even, uneven = Stragglers(network), Stragglers(network)
    rng = np.random.default_rng(0)
    noise = rng.exponential(1.0, (200, 3))
    assert all(even.find(list(step)) is None for step in noise)
    found = [uneven.find(list(step * [1.0, 1.0, 4.0])) for step in noise]
    found = [f for f in found if f]
    assert found and all(rank == 2 and 2.0 <= times < 6.0 for rank, times in found)
    assert len(found) < 10, "said once for a window, not at every step"


def test_torchrun_trains_without_ray(tmp_path: Path) -> None:
    """`python -m asr.training` as one rank: what torchrun starts several of."""
    config = tone_config(write_corpus(tmp_path / "d", rows=6), epochs=1)
    (tmp_path / "c.toml").write_text(to_toml(config))
    command = [sys.executable, "-m", "asr.training", str(tmp_path / "c.toml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    load_network(done.stdout.strip())
    failed = subprocess.run([*command, "--set", "data.train=['none']"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert failed.stderr.startswith("error: ") and "none: no prepared data" in failed.stderr
