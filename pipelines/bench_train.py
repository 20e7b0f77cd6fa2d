"""`python -m pipelines.bench_train`: what Ray Train adds to a training step, against the same loop under torchrun.

Both run two workers on the same batches of made-up speech, in turns; each step is compared with the same step.
Beside it, the processor time that Ray's daemons and the driver take while the workers train. It is the same at any
length of a step and with any other load; where the workers keep all of N processors busy, it is N times less of theirs.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import numpy as np

from asr.config import AugmentConfig, DataConfig, FeatureConfig, ModelConfig, TrainConfig, TrainingConfig, to_toml
from asr.training.shards import VERSION, write_shard
from pipelines.processes import state_of

WORKERS = 2
ROUNDS = 2  # each: torchrun and Ray, then the other way round
WARM_UP = 5  # steps left out: oneDNN sets up its kernels
_BANDS = 80


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="asr-bench-", dir="/tmp") as temporary:
        folder = Path(temporary)
        _write_data(folder / "data")
        config = _config(folder / "data")
        os.environ["RAY_TMPDIR"] = str(folder)
        plain: list[float] = []
        ray: list[float] = []
        loads: list[float] = []
        for i in range(ROUNDS):
            for way in (_under_torchrun, _under_ray)[:: 1 if i % 2 == 0 else -1]:
                run = folder / f"{way.__name__}{i}"
                with ThreadPoolExecutor(1) as pool:
                    load = pool.submit(_load_of_daemons, folder, run) if way is _under_ray else None
                    way(config, run)
                    if load:
                        loads.append(load.result())
                (ray if way is _under_ray else plain).extend(_step_seconds(run))
        ratios = [r / p for r, p in zip(ray, plain, strict=True)]
        low, high = np.percentile(_medians_of_samples(ratios), [2.5, 97.5])
        print(
            f"{WORKERS} workers, {len(ratios)} steps each: torchrun {median(plain) * 1000:.0f} ms a step, "
            f"Ray Train {median(ray) * 1000:.0f} ms; the same step takes {median(ratios) - 1:+.1%} under Ray "
            f"(95 % of resamples: {low - 1:+.1%} to {high - 1:+.1%}); "
            f"daemons and driver take {', '.join(f'{s:.1%}' for s in loads)} of one processor"
        )


def _medians_of_samples(values: list[float], count: int = 2_000) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.median(rng.choice(values, (count, len(values))), axis=1)


def _config(data: Path) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(bidirectional=False, hidden=224, layers=3, dropout=0.0),
        data=DataConfig(train=(str(data),)),
        augment=AugmentConfig(speeds=(1.0,)),
        training=TrainingConfig(epochs=1, batch_seconds=40.0, precision="fp32", checkpoint_steps=10_000),
    )


def _write_data(folder: Path, rows: int = 500) -> None:
    """A prepared folder of noise with words of random letters, 3 to 6 s each."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = []
    for i in range(rows):
        n = int(rng.integers(48_000, 96_000))
        text = " ".join("".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), 5)) for _ in range(n // 8_000))
        data.append(
            {
                "id": str(i),
                "audio": rng.integers(-3_000, 3_000, n).astype("<i2").tobytes(),
                "n_samples": n,
                "features": None,
                "n_frames": None,
                "text": text,
                "phones": None,
                "speaker": "",
                "source": "noise",
            }
        )
    write_shard(folder / "shard-00000.arrow", data)
    info = {
        "version": VERSION, "store": "audio", "shards": [{"file": "shard-00000.arrow"}],
        "features": dataclasses.asdict(FeatureConfig()), "frames": 1, "mean": [0.0] * _BANDS,
        "variance": [9.0] * _BANDS,
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(info))


def _under_torchrun(config: TrainConfig, run: Path) -> None:
    file = run.with_suffix(".toml")
    file.write_text(to_toml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    command += ["-m", "asr.training", str(file), "--out", str(run)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _under_ray(config: TrainConfig, run: Path) -> None:
    from pipelines.train import train_on_ray

    train_on_ray(config, run, (WORKERS, WORKERS), None)


def _load_of_daemons(folder: Path, run: Path) -> float:
    """Processor seconds a second of Ray's other processes and this one, from step WARM_UP to the last ones."""
    while len(_rows(run, "step")) < WARM_UP:
        time.sleep(1.0)
    (start,) = _rows(run, "start")
    workers = {int(number) for number in re.findall(r"process (\d+)", start["workers"])}
    before, clock = _processor_seconds(folder), time.monotonic()
    while _rows(run, "step")[-1]["step"] < 0.95 * start["total"]:  # before the end, where Ray takes all down
        time.sleep(1.0)
    spent = {process: seconds - before.get(process, 0.0) for process, seconds in _processor_seconds(folder).items()}
    others = sum(seconds for process, seconds in spent.items() if process not in workers)
    return others / (time.monotonic() - clock)


def _processor_seconds(folder: Path) -> dict[int, float]:
    """User and system time of this process and of those that Ray started for it."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"RAY_TMPDIR={folder}".encode() in (process / "environ").read_bytes().split(b"\0")
            if ours or process.name == str(os.getpid()):
                found[int(process.name)] = state_of(int(process.name)).seconds
        except OSError:  # it ended meanwhile
            continue
    return found


def _rows(run: Path, kind: str) -> list[dict]:
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == kind]


def _step_seconds(run: Path) -> list[float]:
    steps = _rows(run, "step")
    heard = [0.0, *(row["audio_hours"] * 3600 for row in steps)]
    return [(heard[i + 1] - heard[i]) / row["speed"] for i, row in enumerate(steps)][WARM_UP:]


if __name__ == "__main__":
    main()
