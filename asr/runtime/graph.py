"""A graph of ONNX while it grows: its nodes and constants, by name, and what a network's layers all need of them."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

WEIGHTS = "weights"  # how the names of matrices begin that are not an LSTM's
INT_MAX = np.iinfo(np.int64).max
_DEVIATIONS = 3.0  # standard deviations of a normalised channel that nearly all its values lie within


class Graph:
    """Collects nodes and constants; what adds one gives its name.

    Attributes:
        nodes: so far, but for those that went into the body of a Scan.
        named: how many there are, those among them.
        ranges: of normalised tensors: where nearly all values lie, counted for the channel with the largest weight.
        row_frames: int32 (batch,): each row's frames of a step, where they differ.
    """

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.named = 0
        self.constants: list[TensorProto] = []
        self.ranges: dict[str, tuple[float, float]] = {}
        self.row_frames = ""

    def op(self, kind: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; gives the name of its first output."""
        first = name or f"{kind.lower()}_{self.named}"
        self.named += 1
        names = [first, *(f"{first}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=first, **attributes))
        if kind in ("Transpose", "Squeeze") and inputs[0] in self.ranges:
            self.ranges[first] = self.ranges[inputs[0]]
        return first

    def constant(self, value: np.ndarray | Tensor, kind: str = "constant") -> str:
        """Add a constant; gives its name, which begins with its kind."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = f"{kind}_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def ints(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def cut(self, x: str, axis: int, start: int, end: int = INT_MAX) -> str:
        """x[start:end] along an axis."""
        return self.op("Slice", x, self.ints([start]), self.ints([end]), self.ints([axis]))

    def number(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def linear(self, layer: nn.Linear, x: str) -> str:
        y = self.op("MatMul", x, self.constant(layer.weight.T, WEIGHTS))
        return y if layer.bias is None else self.op("Add", y, self.constant(layer.bias))

    def layer_norm(self, norm: nn.LayerNorm, x: str) -> str:
        weights = [self.constant(v) for v in (norm.weight, norm.bias) if v is not None]
        y = self.op("LayerNormalization", x, *weights, axis=-1, epsilon=norm.eps)
        if norm.weight is not None and norm.bias is not None:
            middle, spread = norm.bias.detach(), _DEVIATIONS * norm.weight.detach().abs()
            self.ranges[y] = (float((middle - spread).min()), float((middle + spread).max()))
        return y
