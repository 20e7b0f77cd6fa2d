"""weights.safetensors: a network's weights, whole, or small: without what the int8 graph beside them holds."""

import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from asr.errors import ModelError
from asr.runtime.folder import GRAPHS

_STEPS = 64  # of 7 bits, from 0 to the largest weight of a row
_STEP = ".step"  # behind the name of a matrix in 8 bits: what 1 in each of its rows is
# Of a file's metadata: names of what it lacks, in the order of the graph, and a hash of it, which no other graph gives.
_IN_GRAPH, _DIGEST = "in_graph", "digest"


def save_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write weights as they are."""
    save_file(weights, path, metadata)
    path.chmod(0o644)  # safetensors makes it private


def save_small_weights(weights: dict[str, Tensor], in_graph: Sequence[str], path: Path) -> None:
    """Write weights with matrices in 8 bits, a step for each row, and without those that the int8 graph beside holds.

    Args:
        in_graph: names of the matrices of its LSTM operators: of each, of each direction, W and U.

    Raises:
        ModelError: that graph is missing, or of other shapes.
    """
    kept: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name in in_graph:
            continue
        if value.is_floating_point() and value.ndim > 1:
            step = value.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            kept[name], kept[name + _STEP] = (value / _of_rows(step, value)).round().to(torch.int8), step
        else:
            kept[name] = value
    if in_graph:
        found = _weights_in_graph(path.parent / GRAPHS["int8"], in_graph, weights)
        save_weights(kept, path, {_IN_GRAPH: json.dumps(list(in_graph)), _DIGEST: _digest(found)})
    else:
        save_weights(kept, path)


def read_weights(path: str | Path, *, dithered: bool = False) -> dict[str, Tensor]:
    """What a weights.safetensors holds, in float32; of a small one with what is in the graph beside it (7 bits).

    Args:
        dithered: add noise of one step, the same each time, to what is of 7 bits (Roberts 1962). What a training then
            changes by less than half a step would be lost in the next int8 graph, which has nearly the same steps.

    Raises:
        ModelError: that graph is missing, or of another network.
    """
    path = Path(path)
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
    in_graph: list[str] = json.loads(about.get(_IN_GRAPH, "[]"))
    kept = load_file(path)
    weights = {}
    for name, value in kept.items():
        if value.dtype == torch.int8:
            value = value.float() * _of_rows(kept[name + _STEP], value)
        if not name.endswith(_STEP):
            weights[name] = value.float() if value.is_floating_point() else value
    if in_graph:
        graph = path.parent / GRAPHS["int8"]
        found = _weights_in_graph(graph, in_graph, weights)
        if _digest(found) != about[_DIGEST]:
            raise ModelError(f"{graph}: is not that of the network beside it; copy the model's folder anew, whole")
        weights |= {name: _dithered(name, matrix) for name, matrix in found.items()} if dithered else found
    return weights


def _dithered(name: str, matrix: Tensor) -> Tensor:
    noise = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))) - 0.5
    return matrix + noise * matrix.abs().amax(1, keepdim=True) / _STEPS


def _digest(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for value in weights.values():
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def _of_rows(step: Tensor, matrix: Tensor) -> Tensor:
    return step.reshape(-1, *[1] * (matrix.ndim - 1))


def _weights_in_graph(graph: Path, names: Sequence[str], others: dict[str, Tensor]) -> dict[str, Tensor]:
    if not graph.is_file():
        raise ModelError(f"{graph}: is missing, and with it the matrices of LSTM layers; the model is incomplete")
    try:
        from asr.runtime.quantise import lstm_matrices
    except ImportError:
        raise ModelError(
            f"{graph}: reading weights from it needs the package onnx: pip install 'streaming-asr[train]', or, where "
            "that is installed, `asr export MODEL -o DIR` for a model whose weights are whole"
        ) from None
    try:
        units = {name.rsplit(".", 2)[0]: len(others[name.replace("weight", "bias")]) // 4 for name in names}
        found = [torch.from_numpy(matrix) for matrix in lstm_matrices(graph, list(units.values()))]
        return dict(zip(names, found, strict=True))
    except Exception as error:  # of whatever kind a damaged file brings about
        raise ModelError(f"{graph}: does not hold the network beside it ({str(error).splitlines()[0]})") from error
