"""Recurrent cells in ONNX: its own operator where it has one, else a Scan with the cell's equations as its body.

The body is traced from the cell's own `inside`: what torch runs frame by frame is what the exported graph runs.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from onnx import GraphProto, TensorProto, helper
from torch import Tensor, fx, nn

from asr.errors import ModelError
from asr.nn.cells import Cell, CoupledCell, ElmanCell, GRUCell, LSTMCell, NormalisedCell, PeepholeCell
from asr.nn.stack import Recurrent
from asr.runtime.graph import Graph

_OPERATORS = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.truediv: "Div",
    torch.sigmoid: "Sigmoid", torch.tanh: "Tanh",
}  # fmt: skip


class _Tracer(fx.Tracer):
    traced_func_name = "inside"


def run_cell(graph: Graph, layer: Recurrent, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    """Add a cell run over x (time, batch, size) from a state; gives the names of h over time and of the last state.

    Raises:
        ModelError: the cell does something that has no translation to ONNX; the message names both.
    """
    native = None if layer.zoneout else _native(layer.cell)
    return _scan(graph, layer, x, state) if native is None else _add_native(graph, layer, x, state, *native)


def _native(cell: Cell) -> tuple[str, list[Tensor], dict[str, Any]] | None:
    """ONNX's own operator for a cell: its name, W, R, B (and P), and attributes; None where it has none."""

    def arranged(gates: str, *values: Tensor) -> Tensor:
        return torch.cat([value[cell.rows(gate)] for value in values for gate in gates.split()])

    w, u, b, u_b = cell.weights()[:4]
    match cell:
        case ElmanCell():
            gates, kind, attributes = "h", "RNN", {}
        case GRUCell():
            gates, kind, attributes = "z r h~", "GRU", {"linear_before_reset": 1}
        case LSTMCell() | PeepholeCell():
            gates, kind, attributes = "i o f c~", "LSTM", {}
        case CoupledCell():  # ONNX computes i and takes f = 1 - i; sigmoid(-a) = 1 - sigmoid(a); its own f is unused
            keep = cell.rows("f")
            w, u, b = (v.clone() for v in (w, u, b))
            for value in (w, u, b):
                value[keep] *= -1
            gates, kind, attributes = "f o f c~", "LSTM", {"input_forget": 1}
        case _:
            return None
    weights = [arranged(gates, w), arranged(gates, u), arranged(gates, b, u_b)]
    if isinstance(cell, PeepholeCell):
        weights.append(torch.cat([cell.p_i, cell.p_o, cell.p_f]))
    return kind, weights, attributes


def _add_native(
    graph: Graph, layer: Recurrent, x: str, state: Sequence[str], kind: str, weights: list[Tensor],
    attributes: dict[str, Any],
) -> tuple[str, list[str]]:  # fmt: skip
    first, direction = graph.ints([0]), graph.ints([1])
    starts = [graph.op("Unsqueeze", s, first) for s in state]
    w, u, b, *peepholes = (graph.constant(weight[None]) for weight in weights)
    y = graph.op(
        kind, x, w, u, b, graph.row_frames, *starts, *peepholes,
        outputs=1 + len(state), hidden_size=layer.cell.size, **attributes,
    )  # fmt: skip
    last = [graph.op("Squeeze", f"{y}_{i}", first) for i in range(1, 1 + len(state))]
    return graph.op("Squeeze", y, direction), last


def _scan(graph: Graph, layer: Recurrent, x: str, state: Sequence[str]) -> tuple[str, list[str]]:
    cell = layer.cell
    if graph.row_frames:
        raise ModelError(f"a {type(cell).__name__} runs as a Scan, whose rows cannot have different numbers of frames")
    wx = graph.op("MatMul", x, graph.constant(cell.w.weight.T))
    if isinstance(cell, NormalisedCell):
        wx = graph.layer_norm(cell.norm_w, wx)
    wx = graph.op("Add", wx, graph.constant(cell.w.bias))
    body = _body(graph, layer)
    y = graph.op("Scan", *state, wx, outputs=len(state) + 1, num_scan_inputs=1, body=body)
    last = [y, *(f"{y}_{i}" for i in range(1, len(state)))]
    return f"{y}_{len(state)}", last


def _body(graph: Graph, layer: Recurrent) -> GraphProto:
    """The graph of one frame: the cell's state and one frame's projection -> the new state and h."""
    outside, graph.nodes = graph.nodes, []
    try:
        inputs, outputs = _add_step(graph, layer)
        h = graph.op("Identity", outputs[0])
        infos = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
            for names in ([*inputs[1:], inputs[0]], [*outputs, h])
        ]
        return helper.make_graph(graph.nodes, "step", infos[0], infos[1])
    finally:
        graph.nodes = outside


def _add_step(graph: Graph, layer: Recurrent) -> tuple[list[str], list[str]]:
    """Add the nodes of one frame; gives the names of W x_t + b and the state, and of the new state."""
    cell, prefix = layer.cell, f"step_{graph.named}"
    names: dict[fx.Node, Any] = {}  # the name of each value; of chunks, a list of them
    inputs: list[str] = []

    def name(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        return graph.constant(torch.tensor(float(value)))

    for node in _Tracer().trace(cell).nodes:
        args: tuple[Any, ...] = node.args
        if node.op == "placeholder":
            names[node] = f"{prefix}_{node.name}"
            inputs.append(names[node])
        elif node.op == "get_attr":
            names[node] = graph.constant(getattr(cell, str(node.target)))
        elif node.op == "call_module" and isinstance(module := cell.get_submodule(str(node.target)), nn.Linear):
            names[node] = graph.linear(module, name(args[0]))
        elif node.op == "call_module" and isinstance(module, nn.LayerNorm):
            names[node] = graph.layer_norm(module, name(args[0]))
        elif node.op == "call_method" and node.target == "chunk":
            x, count, axis = args
            first = graph.op("Split", name(x), outputs=count, axis=axis, num_outputs=count)
            names[node] = [first, *(f"{first}_{i}" for i in range(1, count))]
        elif node.target is operator.getitem:
            chunks, index = args
            names[node] = names[chunks][index]
        elif node.target in _OPERATORS:
            names[node] = graph.op(_OPERATORS[node.target], *map(name, args))
        elif node.op == "output":
            new = [name(args[0][part]) for part in cell.state]
            return inputs, [_zone_out(graph, layer.zoneout, *pair) for pair in zip(inputs[1:], new, strict=True)]
        else:
            raise ModelError(f"a {type(cell).__name__} cannot be exported: {node.target} has no translation to ONNX")
    raise AssertionError("a traced graph ends with its output")


def _zone_out(graph: Graph, share: float, old: str, new: str) -> str:
    if not share:
        return new
    kept = graph.op("Mul", old, graph.constant(torch.tensor(share)))
    return graph.op("Add", kept, graph.op("Mul", new, graph.constant(torch.tensor(1 - share))))
