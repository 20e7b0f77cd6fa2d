"""Checkpoints that restore a run exactly: weights, optimiser, position in the data, random states.

Tensors are stored as safetensors and the rest as JSON: loading never unpickles. A checkpoint is written under a
temporary name, synced and renamed, so the newest is whole; where a disk loses it nevertheless, there is one before.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from asr.errors import ModelError
from asr.files import replacing_folder
from asr.models import Network
from asr.runtime.folder import WEIGHTS_FILE
from asr.training.optimizer import Optimizer
from asr.weights import read_weights

_KEPT = 2


def save_checkpoint(
    folder: Path,
    step: int,
    network: Network,
    optimizer: Optimizer,
    random_states: list[Tensor],
    progress: dict,
) -> None:
    """Write `folder`/step-NNNNNNNN and remove all but the newest two.

    Args:
        random_states: `random_state` of each rank.
        progress: anything JSON holds: the position in the data, the best score, counters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_folder(folder / f"step-{step:08d}") as temporary:
        save_file(_owned(network.state_dict()), temporary / WEIGHTS_FILE)
        save_file(_owned(optimizer.state_dict()), temporary / "optimizer.safetensors")
        save_file({f"rank-{i}": s.clone() for i, s in enumerate(random_states)}, temporary / "random.safetensors")
        (temporary / "progress.json").write_text(json.dumps({**progress, "step": step}), encoding="utf-8")
    for old in checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / "progress.json").is_file())


def random_state(device: torch.device) -> Tensor:
    """The states of torch's generators that training draws from, the CPU's and the GPU's: (bytes,) uint8."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return torch.cat(states)


def load_checkpoint(path: Path, network: Network, optimizer: Optimizer, rank: int, device: torch.device) -> dict:
    """Restore a checkpoint into the network, the optimiser and this process's generator; gives its progress.

    Raises:
        ModelError: a file is unreadable or belongs to another network.
    """
    try:
        network.load_state_dict(load_file(path / WEIGHTS_FILE))
        moments = load_file(path / "optimizer.safetensors")
        optimizer.load_state_dict({k: v if k.endswith(".step") else v.to(device) for k, v in moments.items()})
        states = load_file(path / "random.safetensors")
        progress = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    except Exception as error:
        raise ModelError(f"{path}: cannot continue from this checkpoint: {str(error).splitlines()[0]}") from error
    own = states.get(f"rank-{rank}")
    if own is not None:
        size = len(torch.get_rng_state())
        torch.set_rng_state(own[:size])
        if device.type == "cuda" and len(own) > size:
            torch.cuda.set_rng_state(own[size:], device)
    return progress


def average_weights(paths: list[Path], *, dithered: bool = False) -> dict[str, Tensor]:
    """The mean of the weights of several safetensors files (Polyak and Juditsky 1992), float32.

    What one of them lacks, or has in another shape, is as in the first. `dithered` as of asr.weights.read_weights.
    """
    first, *others = (read_weights(path, dithered=dithered) for path in paths)
    mean = {}
    for name, value in first.items():
        if value.is_floating_point():
            same = [value, *(f[name] for f in others if name in f and f[name].shape == value.shape)]
            value = torch.stack([each.double() for each in same]).mean(0).float()
        mean[name] = value
    return mean


def _owned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
