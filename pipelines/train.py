"""Train with Ray Train: the loop of asr.training on one or more workers, resumed where it stopped."""

import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from asr.config import TrainConfig, from_dict, to_toml
from asr.errors import AsrError, ConfigError, ModelError
from asr.files import replacing_folder, write_atomically
from asr.runtime.folder import GRAPHS, LM_FOLDER, NEXT_WORD_FOLDER

if TYPE_CHECKING:
    import torch

Device = Literal["auto", "cpu", "gpu"]
_ATTEMPTS = 3  # that get no further than the one before
_RESIZE_SECONDS = 10.0  # between looks for workers to take back


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    workers: int = 1,
    min_workers: int | None = None,
    address: str | None = None,
    device: Device = "auto",
) -> Path:
    """Train a network, or go on with a run that stopped; gives the run's model folder, complete with its graphs.

    A worker or a node that dies costs the steps since the last checkpoint. The global batches are the same with any
    number of workers.

    Args:
        config: everything that is trained and how.
        out: the run's folder, on storage that all workers reach.
        workers: Ray Train workers, each with a processor or a GPU; 0 trains in this process without ray.
        min_workers: go on with as few, where nodes are lost, until they come back; None: with no fewer than `workers`.
        address: a running Ray cluster; None: RAY_ADDRESS, or a local one.
        device: "gpu": each worker has a GPU of its own, and where the cluster has none yet, it is waited for; "cpu":
            none has one; "auto": GPUs where the cluster has any, on one machine where it has as many as workers.

    Raises:
        ConfigError: a GPU is wanted in this process, and there is none.
        AsrError: data, configuration or checkpoint are not usable, or training cannot go on.
    """
    from asr.training.start import with_absolute_paths

    run = Path(out).absolute()
    config = with_absolute_paths(config)
    if min_workers is not None and not 1 <= min_workers <= workers:
        raise ConfigError(f"min_workers = {min_workers}: must be 1 up to the {workers} workers")
    if workers == 0:
        from asr.training.loop import run_training

        network = run_training(config, run, device=device_here(device))
    else:
        network = train_on_ray(config, run, (min_workers or workers, workers), address, device)
    _write_card(config, run)
    if config.init_from and not config.new_tokens:
        _take_language_models(Path(config.init_from).parent, run / "model")
    _write_graphs(network)
    return run / "model"


def device_here(device: Device) -> "torch.device":
    """What a training in this process computes on.

    Raises:
        ConfigError: a GPU is wanted, and there is none.
    """
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("--device gpu: this machine has no GPU that PyTorch can use")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _write_graphs(network: Path) -> None:
    """Both graphs; where rounding to int8 would change the text, fp32 alone, which recognition then takes."""
    from asr.runtime.export import write_graphs

    write_graphs(network, precisions=("fp32",))
    try:
        write_graphs(network, precisions=("int8",))
    except ModelError as error:
        (network / GRAPHS["int8"]).unlink(missing_ok=True)  # of a training before
        print(f"warning: {error}; recognition will take the fp32 graph", file=sys.stderr, flush=True)


def _take_language_models(start: Path, model: Path) -> None:
    """Search with those of the model that the training started from, unless there are others already."""
    for name in (LM_FOLDER, NEXT_WORD_FOLDER):
        if (start / name).is_dir() and not (model / name).exists():
            with replacing_folder(model / name) as temporary:
                shutil.copytree(start / name, temporary, dirs_exist_ok=True)


def _write_card(config: TrainConfig, run: Path) -> None:
    """Say in RUN/model/card.json what the model was trained on and how it scored."""
    from asr.training.shards import ShardDataset

    scores = [row for row in _log(run) if row["kind"] == "dev"]
    data = [ShardDataset(folder) for folder in config.data.train]
    card = {
        "name": run.name,
        "sample_rate": config.features.sample_rate,
        "data": [{"name": d.folder.name, "hours": round(d.info["seconds"] / 3600, 2)} for d in data],
        "accuracy": [{"epoch": row["epoch"] + 1, "wer": row["wer"], "cer": row["cer"]} for row in scores],
    }
    write_atomically(run / "model" / "card.json", json.dumps(card, indent=1) + "\n")


def _log(run: Path) -> list[dict]:
    log = run / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may leave half a row


def train_on_ray(
    config: TrainConfig, run: Path, workers: tuple[int, int], address: str | None, device: Device = "auto"
) -> Path:
    """Train on as many as workers[1] workers, no fewer than workers[0]; gives the network's folder, without graphs."""
    from asr.training.checkpoint import checkpoints
    from asr.training.display import Display
    from asr.training.ranks import RankError
    from asr.training.start import check_inputs
    from pipelines import ray_local

    check_inputs(config, run)  # what cannot start is told here, not by a worker
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AsrError(f"{run}: cannot be written ({error.strerror})") from error
    with ray_local.start(address, cpus=max(workers[1], os.cpu_count() or 1)) as ray, Display() as display:
        display.follow(run / "log.jsonl")  # the workers' own output stays in Ray's logs
        alone = not (address or os.environ.get("RAY_ADDRESS"))
        gpu = _on_gpus(ray, workers[0], device, alone, display.note)  # once: a retry may find nodes lost
        failures = 0
        while True:
            before = checkpoints(run / "checkpoints")[-1:]
            try:
                _fit(ray, config, run, workers, gpu, display.note)
                break
            except Exception as error:  # Ray wraps what a worker raised: give the reader the cause, not the wrapping
                cause = _own_error(error)
                reason = str(cause or _dead_workers(error, run) or f"{type(error).__name__}: {error}").strip()
                now = checkpoints(run / "checkpoints")[-1:]
                failures = failures + 1 if now == before else 0
                if (cause and not isinstance(cause, RankError)) or failures == _ATTEMPTS:
                    raise AsrError(f"{reason} (run again to go on from the last checkpoint in {run})") from error
                display.note(f"{reason}; starting again from {now[0].name if now else 'the beginning'}")
    return run / "model" / config.model.kind


def _on_gpus(ray: ModuleType, least: int, device: Device, alone: bool, note: Callable[[str], None]) -> bool:
    """Whether each worker takes a GPU; `alone`: no other node will come."""
    if device != "auto":
        return device == "gpu"
    found = int(ray.cluster_resources().get("GPU", 0))
    if found >= least or (found and not alone):
        return True
    if found:
        note(f"{found} GPU(s) for {least} workers: training on processors (--workers {found} takes the GPUs)")
    elif not alone:
        note("the cluster has no GPU: training on processors (--device gpu waits for GPUs)")
    return False


def _fit(
    ray: ModuleType,
    config: TrainConfig,
    run: Path,
    workers: tuple[int, int],
    gpu: bool,
    note: Callable[[str], None],
) -> None:
    """One attempt: Ray Train's workers run the loop to its end, or Ray raises."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    least, most = workers
    found = int(ray.cluster_resources().get("GPU" if gpu else "CPU", 0))
    if found < least:
        kind = "GPUs" if gpu else "room"
        note(f"the cluster has {kind} for {found} of {least} workers; waiting for more nodes (Ctrl-C ends this)")
    TorchTrainer(
        _worker,
        train_loop_config={"config": to_toml(config), "run": str(run)},
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=gpu,
            elastic_resize_monitor_interval_s=_RESIZE_SECONDS,
        ),
        torch_config=TorchConfig(timeout_s=round(config.training.hang_seconds)),
        run_config=RunConfig(name="ray", storage_path=str(run)),
    ).fit()


def _worker(settings: dict[str, Any]) -> None:
    """One Ray Train worker: the same loop as in a process of its own."""
    import ray.train
    import ray.train.torch

    from asr.training.loop import run_training
    from asr.training.ranks import RankError

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    try:
        run_training(
            from_dict(TrainConfig, tomllib.loads(settings["config"]), where="config"),
            Path(settings["run"]),
            rank=rank,
            world=world,
            device=ray.train.torch.get_device(),
            report=ray.train.report,
        )
    except RankError:
        raise
    except AsrError as error:
        raise type(error)(f"{error} (seen by worker {rank} of {world} on {platform.node()})") from error


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


def _dead_workers(error: Exception, run: Path) -> str | None:
    """The names of the workers whose process is gone, if that is what Ray raised."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", {})
    dead = [rank for rank, e in failures.items() if isinstance(getattr(e, "health_check_failure", e), RayActorError)]
    if not dead:
        return None
    started = [row.get("workers", "").split(", ") for row in _log(run) if row["kind"] == "start"]
    names = dict(enumerate(started[-1] if started else []))
    return f"{', '.join(names.get(rank, f'rank {rank}') for rank in dead)}: died"
