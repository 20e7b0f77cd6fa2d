"""What this machine allows: how fast it reads memory and multiplies, and what a network must cost at least."""

import os
import platform
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from asr.config import FeatureConfig
from asr.features import LogMel
from asr.models import Network
from asr.nn import StridedConvolution
from pipelines.bench.figures import Figure, timed

_MEMORY_BYTES = 256 << 20
_CACHE_BYTES = 4 << 20  # about the weights of a network in int8
_TIMES = 50  # that these are read in one go
_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one number of threads: bytes a second from memory and from the last cache, operations a second."""

    memory: float
    cache: float
    fp32: float
    int8: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a network must do for a second of audio: operations, and weights that are needed anew.

    Attributes:
        recurrent: operations of the recurrent layers, which int8 graphs compute in int8.
        others: operations of the other layers, always fp32; the features are counted as an FFT.
        weights: of the recurrent layers, for what they remember: each frame needs them anew.
        inputs: likewise, for what comes into them: the frames of a block share them.
    """

    recurrent: float
    others: float
    weights: int
    inputs: int

    def seconds(self, limits: Limits, precision: str) -> float:
        """The least time for a second of audio, with weights that cost nothing to read: many rows share them."""
        rate = limits.int8 if precision == "int8" else limits.fp32
        return self.recurrent / rate + self.others / limits.fp32

    def seconds_alone(self, limits: Limits, precision: str, frames: float, block: int) -> float:
        """The same for one stream of `frames` a second, so many to a block: weights are read for it alone."""
        size = 1 if precision == "int8" else 4
        read = frames * (self.weights + self.inputs / block) * size
        return max(self.seconds(limits, precision), read / limits.cache)


@cache
def measured(threads: int) -> tuple[Limits, list[Figure]]:
    """Measure once a process, with the given number of threads working."""
    memory, cached = (_reading(size, threads) for size in (_MEMORY_BYTES, _CACHE_BYTES))
    size = 1024
    parts: dict[str, tuple[Callable[[], object], float, str]] = {
        "reading memory": (memory, threads * _MEMORY_BYTES, "GB/s"),
        "reading 4 MB again and again": (cached, threads * _TIMES * _CACHE_BYTES, "GB/s"),
        "fp32 products": (_fp32(size, threads), 2 * size**3, "GFLOP/s"),
        "int8 products": (_int8(size, threads), 2 * size**3, "Gop/s"),
    }
    times = timed({name: part for name, (part, _, _) in parts.items()}, _ROUNDS)
    figures = []
    for name, (_, work, unit) in parts.items():
        rates = sorted(work / seconds / 1e9 for seconds in times[name])
        section = f"this machine, {threads} thread{'s' if threads > 1 else ''}"
        middle = statistics.median(rates)
        figures.append(Figure(section=section, name=name, value=middle, low=rates[0], high=rates[-1], unit=unit))
    best = [figure.high * 1e9 for figure in figures]  # a limit is what was reached, not what was usual
    return Limits(memory=best[0], cache=best[1], fp32=best[2], int8=best[3]), figures


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        info = ""
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in info.splitlines()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    return {
        "processor": found.get("model name", platform.processor() or platform.machine()),
        "features": [name for name in wanted if name in found.get("flags", "").split()],
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def work_of(network: Network) -> Work:
    """The operations of a network, two for each weight and frame that meet."""
    config = network.config
    rate = config.features.sample_rate / config.features.hop
    others = rate * feature_operations(config.features)
    recurrent, weights, inputs = 0.0, 0, 0
    for i, layer in enumerate(network._each()[2:], start=2):
        if isinstance(layer, StridedConvolution):
            rate /= layer.stride
        counts = {name: p.numel() for name, p in layer.named_parameters() if p.dim() > 1}
        operations = 2 * rate * sum(counts.values())
        if i >= network.first_recurrent and i < network.first_recurrent + config.model.layers:
            recurrent += operations
            shared = sum(count for name, count in counts.items() if "weight_ih" in name or ".w." in name)
            inputs += shared
            weights += sum(counts.values()) - shared
        else:
            others += operations
    return Work(recurrent=recurrent, others=others, weights=weights, inputs=inputs)


def feature_operations(config: FeatureConfig) -> float:
    """Of one frame: a real FFT, the power, the filters where they are not zero."""
    layer = LogMel(config)
    bins = layer.window // 2 + 1
    return 2.5 * layer.window * np.log2(layer.window) + 3 * bins + 2 * int((layer.filters > 0).sum())


def _reading(size: int, threads: int) -> Callable[[], object]:
    """Each thread sums up `size` bytes of its own: once where they are many, often where they fit the cache."""
    times = 1 if size == _MEMORY_BYTES else _TIMES
    tensors = [torch.ones(size // 4) for _ in range(threads)]
    pool = ThreadPoolExecutor(threads)

    def read(tensor: torch.Tensor) -> None:
        for _ in range(times):
            tensor.sum()

    return lambda: list(pool.map(read, tensors))


def _fp32(size: int, threads: int) -> Callable[[], object]:
    a, b = torch.randn(size, size), torch.randn(size, size)

    def multiply() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        torch.mm(a, b)
        torch.set_num_threads(before)

    return multiply


def _int8(size: int, threads: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.integers(-127, 127, (size, size), np.int8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [size, size])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [size, size])], [weights],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    session = session_of(model, threads)
    x = rng.integers(0, 255, (size, size), np.uint8)
    return lambda: session.run(None, {"x": x})


def session_of(model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
    """A graph, ready to run on so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def lstm_stack(network: Network) -> list[nn.LSTM]:
    """The recurrent layers as torch knows them; empty where they are of another cell."""
    found = [getattr(layer, "lstm", None) for layer in network._each()]
    return [layer for layer in found if isinstance(layer, nn.LSTM)]
