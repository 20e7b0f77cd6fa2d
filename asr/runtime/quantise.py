"""int8 graphs whose activations are quantised in fixed steps, so that no stream and no block changes another's text.

ONNX Runtime's int8 LSTM takes one step size a call, from the smallest and the largest value that it finds in all rows
and frames. It is fixed here by making sure that it always finds the same two: the input is clipped to its range and
gets two more channels that stand at the range's ends, and the layer gets two more units whose output stands at 1 and
-1, between which every output lies. No weight leads from them to anything. Rows are exact then, whatever their company.
"""

import json
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from asr.runtime.graph import WEIGHTS

_SATURATED = 40.0  # a gate's bias that leaves it open or shut
_CELL = 20.0  # a cell state whose tanh is 1


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with int8 weights in its LSTM operators and activations of 8 bits.

    What has no int8 kernel stays fp32: RNN, GRU, and the cells that run in a Scan. An LSTM whose input has no known
    range (metadata `lstm_input_ranges`, made by asr.runtime.export_graph) has its step sizes taken as they come.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    metadata = {p.key: p.value for p in model.metadata_props}
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    ranges = json.loads(metadata.get("lstm_input_ranges", "{}"))
    del fixed.graph.node[:]
    for node in model.graph.node:
        fixed.graph.node.extend(_fix(node, fixed.graph, *ranges[node.name]) if node.name in ranges else [node])
    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/fp32.onnx", f"{folder}/int8.onnx"
        onnx.save(fixed, source)
        quiet = logging.getLogger()
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it advises a pre-processing step that this graph does not need
        # Weights of 7 bits: a CPU without VNNI adds products of 8 bits in 16, and with large weights sums saturate.
        quantize_dynamic(
            source, target, op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8, per_channel=True,
            reduce_range=True,
        )  # fmt: skip
        quiet.setLevel(level)
        quantised = onnx.load(target)
    _halve_others(quantised.graph)
    helper.set_model_props(quantised, metadata | {"precision": "int8"})
    return quantised


def _halve_others(graph: onnx.GraphProto) -> None:
    """Keep the other matrices in float16, which a session widens once, as it opens."""
    for constant in graph.initializer:
        if constant.name.startswith(WEIGHTS):
            name, half = constant.name, f"half_{constant.name}"
            constant.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(constant).astype(np.float16), half))
            graph.node.insert(0, helper.make_node("Cast", [half], [name], name=f"{half}_cast", to=TensorProto.FLOAT))


def _fix(lstm: NodeProto, graph: onnx.GraphProto, low: float, high: float) -> list[NodeProto]:
    """An LSTM node with the two channels and the two units; its constants in `graph` grow with it."""
    prefix, nodes = lstm.name, []
    x, w, r, b, lengths, h, c, peepholes = [*lstm.input, *[""] * (8 - len(lstm.input))]
    constants = {constant.name: constant for constant in graph.initializer}

    def op(kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        name = name or f"{prefix}_{kind.lower()}_{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def constant(values: list[float] | list[int], dtype: type = np.float32, scalar: bool = False) -> str:
        name = f"{prefix}_constant_{len(graph.initializer)}"
        array = np.array(values[0] if scalar else values, dtype)
        graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def replace(name: str, array: np.ndarray) -> None:
        constants[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    weights, recurrent, bias = (numpy_helper.to_array(constants[name]) for name in (w, r, b))
    directions, size = len(recurrent), recurrent.shape[2]
    replace(w, _grown(weights.reshape(directions, 4, size, -1)).reshape(directions, 4 * (size + 2), -1))
    replace(r, _grown(recurrent.reshape(directions, 4, size, -1)).reshape(directions, 4 * (size + 2), -1))
    bias = np.pad(bias.reshape(directions, 8, size), ((0, 0), (0, 0), (0, 2)))
    # ONNX's order: input, output, forget, candidate. Nothing comes in, all is kept, all goes out.
    bias[:, :4, size:] = np.array([-_SATURATED, _SATURATED, _SATURATED, 0.0])[:, None]
    replace(b, bias.reshape(directions, -1))
    if peepholes:
        weights = numpy_helper.to_array(constants[peepholes]).reshape(directions, 3, size)
        replace(peepholes, np.pad(weights, ((0, 0), (0, 0), (0, 2))).reshape(directions, -1))

    two, batch = constant([2], np.int64), op("Shape", x, start=1, end=2)
    x = op("Clip", x, constant([low], scalar=True), constant([high], scalar=True))
    ends = op("Expand", constant([low, high]), op("Concat", op("Shape", x, start=0, end=2), two, axis=0))
    x = op("Concat", x, ends, axis=2)
    starts = []
    for start, value in ((h, 1.0), (c, _CELL)):
        rails = [value, -value] if start else [0.0] * size + [value, -value]
        shape = op("Concat", constant([directions], np.int64), batch, constant([len(rails)], np.int64), axis=0)
        expanded = op("Expand", constant(rails), shape)
        starts.append(op("Concat", start, expanded, axis=2) if start else expanded)
    attributes = {a.name: helper.get_attribute_value(a) for a in lstm.attribute} | {"hidden_size": size + 2}
    names = [f"{name}_grown" for name in lstm.output]
    nodes.append(
        helper.make_node("LSTM", [x, w, r, b, lengths, *starts, peepholes], names, name=f"{prefix}_grown", **attributes)
    )
    zero, end = constant([0], np.int64), constant([size], np.int64)
    for grown, name in zip(names, lstm.output, strict=True):
        axis = constant([3 if name == lstm.output[0] else 2], np.int64)
        op("Slice", grown, zero, end, axis, name=name)
    return nodes


def _grown(weights: np.ndarray) -> np.ndarray:
    """(directions, gates, units, inputs) with two units and two inputs more, zeros."""
    return np.pad(weights, ((0, 0), (0, 0), (0, 2), (0, 2)))


def lstm_matrices(path: Path, sizes: list[int]) -> Iterator[np.ndarray]:
    """The matrices of the LSTM operators of an int8 graph, as torch has them: gates i, f, c, o and what they read.

    Args:
        path: the graph.
        sizes: units of each operator, in their order.

    Returns:
        Of each operator, of each direction: W, (4 units, inputs), and U, (4 units, units), float32.
    """
    graph = onnx.load(path).graph
    constants = {constant.name: constant for constant in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "DynamicQuantizeLSTM"]
    for node, size in zip(nodes, sizes, strict=True):
        both = [
            [numpy_helper.to_array(constants[node.input[i]]) for i in places] for places in ((1, 8, 9), (2, 10, 11))
        ]
        for direction in range(len(both[0][0])):
            for values, steps, zeros in both:
                matrix = (values[direction].astype(np.float32) - zeros[direction]) * steps[direction]
                gates = matrix.T.reshape(4, -1, len(matrix))
                more = gates.shape[1] - size  # units that only hold the range, and as many inputs
                gates = gates[[0, 2, 3, 1], :size, : len(matrix) - more]
                yield np.ascontiguousarray(gates.reshape(4 * size, -1), np.float32)
