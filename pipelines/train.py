"""Train with Ray Train: the loop of asr.training on one or more workers, resumed where it stopped."""

import json
import os
from pathlib import Path
from typing import Any

from asr.config import TrainConfig, from_dict, to_toml
from asr.errors import AsrError
from asr.files import write_atomically


def train(config: TrainConfig, out: str | Path, *, workers: int = 1, address: str | None = None) -> Path:
    """Train a network, or go on with a run that stopped; gives the run's model folder, complete with its graphs.

    Args:
        config: everything that is trained and how.
        out: the run's folder, on storage that all workers reach.
        workers: Ray Train workers, each with one GPU where the cluster has them; 0 trains in this process without ray.
        address: a running Ray cluster; None: RAY_ADDRESS, or a local one.

    Raises:
        AsrError: data, configuration or checkpoint are not usable, or training cannot go on.
    """
    run = Path(out).absolute()
    config = _with_absolute_paths(config)
    if workers == 0:
        import torch

        from asr.training.loop import run_training

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = run_training(config, run, device=device)
    else:
        network = _train_on_ray(config, run, workers, address)
    from asr.runtime.export import write_graphs

    write_graphs(network)
    _write_card(config, run)
    return run / "model"


def _write_card(config: TrainConfig, run: Path) -> None:
    """Say in RUN/model/card.json what the model was trained on and how it scored."""
    from asr.training.shards import ShardDataset

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [row for row in rows if row["kind"] == "dev"]
    data = [ShardDataset(folder) for folder in config.data.train]
    card = {
        "name": run.name,
        "sample_rate": config.features.sample_rate,
        "data": [{"name": d.folder.name, "hours": round(d.info["seconds"] / 3600, 2)} for d in data],
        "accuracy": [{"epoch": row["epoch"] + 1, "wer": row["wer"], "cer": row["cer"]} for row in scores],
    }
    write_atomically(run / "model" / "card.json", json.dumps(card, indent=1) + "\n")


def _train_on_ray(config: TrainConfig, run: Path, workers: int, address: str | None) -> Path:
    from asr.training.loop import check_inputs
    from pipelines import ray_local

    check_inputs(config, run)  # what cannot start is told here, not by a worker that Ray would start again
    with ray_local.start(address, cpus=max(workers, os.cpu_count() or 1)) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from asr.training.display import Display

        run.mkdir(parents=True, exist_ok=True)
        gpu = ray.cluster_resources().get("GPU", 0) >= workers
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": to_toml(config), "run": str(run)},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
            run_config=RunConfig(
                name="ray",
                storage_path=str(run),
                failure_config=FailureConfig(max_failures=3),
            ),
        )
        try:
            with Display() as display:  # the workers' own output stays in Ray's logs
                display.follow(run / "log.jsonl")
                trainer.fit()
        except Exception as error:  # Ray wraps what a worker raised: give the reader the cause, not the wrapping
            cause = _own_error(error)
            reason = str(cause) if cause else f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            raise AsrError(f"{reason} (run again to go on from the last checkpoint in {run})") from error
    return run / "model" / config.model.kind


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: the same loop as in a process of its own."""
    import tomllib

    import ray.train
    import ray.train.torch

    from asr.training.loop import run_training

    context = ray.train.get_context()
    run_training(
        from_dict(TrainConfig, tomllib.loads(settings["config"]), where="config"),
        Path(settings["run"]),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device=ray.train.torch.get_device(),
        report=ray.train.report,
    )


def _own_error(error: BaseException | None) -> AsrError | None:
    """The AsrError inside what Ray raised, if there is one."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, AsrError):
            return error
        for failure in getattr(error, "worker_failures", {}).values():
            found = _own_error(failure)
            if found:
                return found
        error = getattr(error, "cause", None) or error.__cause__
        seen += 1
    return None


def _with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Workers run in a folder of their own: name the data from the root."""
    import dataclasses

    def absolute(path: str) -> str:
        return path if not path or "://" in path else str(Path(path).absolute())

    data = dataclasses.replace(
        config.data, train=tuple(map(absolute, config.data.train)), dev=tuple(map(absolute, config.data.dev))
    )
    augment = dataclasses.replace(config.augment, noise=absolute(config.augment.noise))
    return dataclasses.replace(config, data=data, augment=augment, init_from=absolute(config.init_from))
