"""Train with Ray Train: the loop of asr.training on one or more workers, resumed where it stopped."""

import os
from pathlib import Path
from typing import Any

from asr.config import TrainConfig, from_dict, to_toml
from asr.errors import AsrError


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
    return run / "model"


def _train_on_ray(config: TrainConfig, run: Path, workers: int, address: str | None) -> Path:
    from pipelines import ray_local

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
            if cause is None:
                raise
            raise AsrError(str(cause)) from error
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
