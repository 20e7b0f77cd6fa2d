"""Export: a trained network as an ONNX graph that takes samples and keeps its state outside.

The graph is built node by node, so that it holds what inference needs and no more: features as a matrix
product, batch normalisation folded into the convolutions, one LSTM operator a layer (of the other cells, ONNX's
operator where it has one, else a Scan with the cell's equations).
"""

import json
import logging
import os
import shutil
from functools import singledispatchmethod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from asr.errors import ModelError
from asr.features import FLOOR, LogMel
from asr.files import replace_folder, write_atomically
from asr.models import FORMAT_VERSION, Network, Output, load_network, save_network
from asr.nn import LSTM, BiLSTM, LookAhead, Normalise, StreamingLayer, StridedConvolution
from asr.nn.attention import SelfAttention
from asr.nn.stack import Bidirectional, Recurrent, Stacked
from asr.runtime.export_cells import run_cell
from asr.runtime.folder import LM_FOLDER

_OPSET = 20
_INT_MAX = np.iinfo(np.int64).max
_TOLERANCE = 1e-3  # largest difference in log-probability between PyTorch and the exported graph


def write_graphs(network_folder: str | Path, *, precisions: tuple[str, ...] = ("fp32", "int8")) -> None:
    """Write model.onnx (fp32) and model.int8.onnx beside a network's weights, checked against PyTorch first.

    Raises:
        ModelError: the folder holds no complete network, or the graph's output differs from PyTorch's.
    """
    folder = Path(network_folder)
    network = load_network(folder)
    graph = build_graph(network)
    _check(network, graph, folder)
    for precision in precisions:
        model = graph if precision == "fp32" else quantise(graph)
        name = "model.onnx" if precision == "fp32" else "model.int8.onnx"
        temporary = folder / f".{name}.tmp-{os.getpid()}"
        onnx.save(model, str(temporary))
        os.replace(temporary, folder / name)


def build_graph(network: Network) -> onnx.ModelProto:
    """The fp32 graph of a network; inputs, outputs and metadata as asr.runtime describes them."""
    return _Builder(network).build()


def quantise(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with int8 weights in its LSTM operators, activations quantised as they come.

    What has no int8 kernel stays fp32: RNN, GRU, and the cells that run in a Scan.
    """
    import tempfile

    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = f"{folder}/fp32.onnx", f"{folder}/int8.onnx"
        onnx.save(model, source)
        quiet = logging.getLogger()
        level = quiet.level
        quiet.setLevel(logging.ERROR)  # it advises a pre-processing step that this graph does not need
        quantize_dynamic(source, target, op_types_to_quantize=["LSTM"], weight_type=QuantType.QInt8, per_channel=True)
        quiet.setLevel(level)
        quantised = onnx.load(target)
    metadata = {p.key: p.value for p in model.metadata_props} | {"precision": "int8"}
    helper.set_model_props(quantised, metadata)
    return quantised


class _Builder:
    """Collects the nodes of one graph. Inside the recurrent part time comes first: (time, batch, size)."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.streaming = not network.config.model.bidirectional
        self.nodes: list[onnx.NodeProto] = []
        self.named = 0  # nodes so far, those inside a Scan among them
        self.constants: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.state_shapes: list[list[int]] = []

    def build(self) -> onnx.ModelProto:
        network, layers = self.network, list(self.network._each())
        self.inputs.append(helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"]))
        x = "audio"
        if self.streaming:
            self.inputs.append(helper.make_tensor_value_info("flush", TensorProto.FLOAT, [1]))
        else:
            self.inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]))
            frames = self.op("Div", "lengths", self.constant(np.array(network.stride, np.int64)), name="frames")
            self.lengths = self.op("Cast", frames, to=TensorProto.INT32)
            # whole output frames only
            samples = self.op("Shape", x, start=1, end=2)
            stride = self.constant(np.array([network.stride], np.int64))
            whole = self.op("Mul", self.op("Div", samples, stride), stride)
            x = self.op("Slice", x, self.ints([0]), whole, self.ints([1]))
        for i, layer in enumerate(layers):
            if i == network.first_recurrent:
                x = self.op("Transpose", x, perm=[1, 0, 2])
            x = self.add(layer, x)
        self.op("Transpose", x, perm=[1, 0, 2], name="log_probs")
        tokens = len(network.tokenizer)
        outputs = [helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", "frames_out", tokens])]
        if not self.streaming:
            outputs.append(helper.make_tensor_value_info("frames", TensorProto.INT64, ["batch"]))
        graph = helper.make_graph(self.nodes, "network", self.inputs, outputs + self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="streaming-asr")
        model.ir_version = 10
        features = network.config.features
        helper.set_model_props(
            model,
            {
                "format_version": str(FORMAT_VERSION),
                "kind": network.config.model.kind,
                "sample_rate": str(features.sample_rate),
                "samples_per_frame": str(network.stride),
                "latency_frames": str(network.latency),
                "vocab_size": str(tokens),
                "precision": "fp32",
                "state_shapes": json.dumps(self.state_shapes),
            },
        )
        onnx.checker.check_model(model)
        return model

    def op(self, kind: str, *inputs: str, name: str | None = None, outputs: int = 1, **attributes: Any) -> str:
        """Add a node; gives the name of its first output."""
        first = name or f"{kind.lower()}_{self.named}"
        self.named += 1
        names = [first, *(f"{first}_{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=first, **attributes))
        return first

    def constant(self, value: np.ndarray | Tensor) -> str:
        """Add a constant; gives its name."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def ints(self, values: list[int]) -> str:
        return self.constant(np.array(values, np.int64))

    def cut(self, x: str, axis: int, start: int, end: int = _INT_MAX) -> str:
        """x[start:end] along an axis."""
        return self.op("Slice", x, self.ints([start]), self.ints([end]), self.ints([axis]))

    def state(self, shape: list[int]) -> tuple[str, str]:
        """Add a state of a shape (without the batch); gives the names of what comes in and what goes out."""
        number = len(self.state_shapes)
        self.state_shapes.append(shape)
        old, new = f"state_{number}", f"new_state_{number}"
        self.inputs.append(helper.make_tensor_value_info(old, TensorProto.FLOAT, ["batch", *shape]))
        self.outputs.append(helper.make_tensor_value_info(new, TensorProto.FLOAT, ["batch", *shape]))
        return old, new

    def with_history(self, x: str, size: int, shape: list[int]) -> str:
        """Put the `size` frames before x in front of it, axis 1: zeros, or what the state holds."""
        if not size:
            return x
        if self.streaming:
            old, new = self.state([size, *shape])
            joined = self.op("Concat", old, x, axis=1)
            self.op("Slice", joined, self.ints([-size]), self.ints([_INT_MAX]), self.ints([1]), name=new)
            return joined
        rank = 2 + len(shape)
        before = [0, size, *[0] * (rank - 2)]
        return self.op("Pad", x, self.ints(before + [0] * rank))

    @singledispatchmethod
    def add(self, layer: StreamingLayer, x: str) -> str:
        """Add a layer's nodes; gives the name of its output."""
        raise ModelError(f"a layer of kind {type(layer).__name__} cannot be exported")

    @add.register
    def _(self, layer: LogMel, x: str) -> str:
        window, hop = layer.window, layer.stride
        hops = -(-window // hop)
        x = self.with_history(x, window - hop, [])
        x = self.op("Pad", x, self.ints([0, 0, 0, hops * hop - window]))
        x = self.op("Reshape", x, self.ints([0, -1, hop]))
        parts = [self.cut(x, 1, i, i + 1 - hops if i + 1 < hops else _INT_MAX) for i in range(hops)]
        parts[-1] = self.cut(parts[-1], 2, 0, window - (hops - 1) * hop)
        x = self.op("Concat", *parts, axis=2)
        x = self.op("MatMul", x, self.constant(layer.dft_matrix().float()))
        # the power is the sum of the squares of both parts, so the filters stand twice
        x = self.op("MatMul", self.op("Mul", x, x), self.constant(torch.cat([layer.filters, layer.filters])))
        return self.op("Log", self.op("Add", x, self.constant(np.array(FLOOR, np.float32))))

    @add.register
    def _(self, layer: Normalise, x: str) -> str:
        return self.op("Mul", self.op("Sub", x, self.constant(layer.mean)), self.constant(layer.scale))

    @add.register
    def _(self, layer: StridedConvolution, x: str) -> str:
        norm, weight = layer.norm, layer.convolution.weight
        x = self.with_history(x, layer.kernel - layer.stride, [weight.shape[1]])
        scale = norm.weight * (norm.running_variance + norm.epsilon).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        x = self.op("Transpose", x, perm=[0, 2, 1])
        x = self.op(
            "Conv", x, self.constant(weight * scale[:, None, None]), self.constant(bias),
            kernel_shape=[layer.kernel], strides=[layer.stride],
        )  # fmt: skip
        return self.op("Transpose", self.op("Relu", x), perm=[0, 2, 1])

    @add.register
    def _(self, layer: LSTM, x: str) -> str:
        size = layer.lstm.hidden_size
        (old_h, new_h), (old_c, new_c) = self.state([size]), self.state([size])
        axis = self.ints([0])
        starts = [self.op("Unsqueeze", old, axis) for old in (old_h, old_c)]
        y = self.op("LSTM", x, *self.lstm_weights([layer.lstm]), "", *starts, outputs=3, hidden_size=size)
        self.op("Squeeze", f"{y}_1", axis, name=new_h)
        self.op("Squeeze", f"{y}_2", axis, name=new_c)
        return self.layer_norm(layer.norm, self.op("Squeeze", y, self.ints([1])))

    @add.register
    def _(self, layer: BiLSTM, x: str) -> str:
        size = layer.ahead.hidden_size
        weights = self.lstm_weights([layer.ahead, layer.back])
        y = self.op("LSTM", x, *weights, self.lengths, hidden_size=size, direction="bidirectional")
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), self.ints([0, 0, 2 * size]))
        return self.layer_norm(layer.norm, y)

    @add.register
    def _(self, layer: Recurrent, x: str) -> str:
        shapes = [s.shape[1] for s in layer.initial_state(1)]
        if self.streaming:
            olds, news = zip(*(self.state([size]) for size in shapes), strict=True)
        else:
            batch = self.op("Shape", x, start=1, end=2)
            sizes = [self.op("Concat", batch, self.ints([size]), axis=0) for size in shapes]
            olds, news = [self.op("ConstantOfShape", size) for size in sizes], [None] * len(shapes)  # zeros
        y, results = run_cell(self, layer, x, olds)
        for result, new in zip(results, news, strict=True):
            if new:
                self.op("Identity", result, name=new)
        return y

    @add.register
    def _(self, layer: Bidirectional, x: str) -> str:
        lengths = self.op("Cast", self.lengths, to=TensorProto.INT64)
        ahead = self.add(layer.ahead, x)
        back = self.add(layer.back, self.op("ReverseSequence", x, lengths, batch_axis=1, time_axis=0))
        back = self.op("ReverseSequence", back, lengths, batch_axis=1, time_axis=0)
        return self.op("Concat", ahead, back, axis=2)

    @add.register
    def _(self, layer: Stacked, x: str) -> str:
        y = self.layer_norm(layer.norm, self.add(layer.layer, x))
        return self.op("Add", x, y) if layer.residual else y

    @add.register
    def _(self, layer: SelfAttention, x: str) -> str:
        qkv = self.linear(layer.qkv, self.op("Transpose", x, perm=[1, 0, 2]))
        q = self.op("Split", qkv, outputs=3, axis=2, num_outputs=3)
        k, v = f"{q}_1", f"{q}_2"
        if self.streaming:
            one = numpy_helper.from_array(np.ones(1, np.float32))
            there = self.op("ConstantOfShape", self.op("Shape", q, start=0, end=2), value=one)
            k, v = (self.with_history(part, layer.past, [layer.size]) for part in (k, v))
            there = self.op("Cast", self.with_history(there, layer.past, []), to=TensorProto.BOOL)
        zero, one = (self.constant(np.array(i, np.int32)) for i in (0, 1))
        count = self.op("Cast", self.op("Squeeze", self.op("Shape", k, start=1, end=2)), to=TensorProto.INT32)
        frames = self.op("Range", zero, count, one)
        if self.streaming:
            own = self.cut(frames, 0, layer.past)
        else:
            own, there = frames, self.op("Less", frames, self.op("Unsqueeze", self.lengths, self.ints([1])))
        lag = self.op("Sub", self.op("Unsqueeze", own, self.ints([1])), frames)
        past, ahead = (self.constant(np.array(n, np.int32)) for n in (layer.past, -layer.past if layer.both else 0))
        near = self.op("And", self.op("LessOrEqual", lag, past), self.op("GreaterOrEqual", lag, ahead))
        scale = self.constant(np.array(layer.size**-0.5, np.float32))
        scores = self.op("Mul", self.op("MatMul", q, self.op("Transpose", k, perm=[0, 2, 1])), scale)
        seen = self.op("And", near, self.op("Unsqueeze", there, self.ints([1])))
        weights = self.op("Softmax", self.op("Where", seen, scores, self.constant(np.array(-1e9, np.float32))), axis=-1)
        found = self.linear(layer.o, self.op("MatMul", weights, v))
        return self.op("Add", x, self.op("Transpose", found, perm=[1, 0, 2]))

    @add.register
    def _(self, layer: LookAhead, x: str) -> str:
        frames, size = layer.weight.shape
        old, new = self.state([frames - 1, size])
        # at the end of a stream what lies ahead is nothing, not what the layers below make of silence
        keep = self.op("Sub", self.constant(np.ones(1, np.float32)), "flush")
        x = self.op("Transpose", self.op("Mul", x, keep), perm=[1, 0, 2])
        joined = self.op("Concat", old, x, axis=1)
        self.op("Slice", joined, self.ints([1 - frames]), self.ints([_INT_MAX]), self.ints([1]), name=new)
        y = ""
        for k in range(frames):
            part = self.cut(joined, 1, k, k + 1 - frames if k + 1 < frames else _INT_MAX)
            part = self.op("Mul", part, self.constant(layer.weight[k]))
            y = self.op("Add", y, part) if y else part
        return self.op("Transpose", y, perm=[1, 0, 2])

    @add.register
    def _(self, layer: Output, x: str) -> str:
        return self.op("LogSoftmax", self.linear(layer.linear, x), axis=-1)

    def linear(self, layer: nn.Linear, x: str) -> str:
        y = self.op("MatMul", x, self.constant(layer.weight.T))
        return y if layer.bias is None else self.op("Add", y, self.constant(layer.bias))

    def lstm_weights(self, directions: list[nn.LSTM]) -> list[str]:
        """W, R and B of ONNX's LSTM from torch's, whose gates come as i, f, c, o and there as i, o, f, c."""

        def reordered(weight: Tensor) -> Tensor:
            i, f, c, o = weight.chunk(4)
            return torch.cat([i, o, f, c])

        weights = [d.state_dict() for d in directions]
        w = torch.stack([reordered(v["weight_ih_l0"]) for v in weights])
        r = torch.stack([reordered(v["weight_hh_l0"]) for v in weights])
        b = torch.stack([torch.cat([reordered(v["bias_ih_l0"]), reordered(v["bias_hh_l0"])]) for v in weights])
        return [self.constant(w), self.constant(r), self.constant(b)]

    def layer_norm(self, norm: nn.LayerNorm, x: str) -> str:
        weights = [self.constant(v) for v in (norm.weight, norm.bias) if v is not None]
        return self.op("LayerNormalization", x, *weights, axis=-1, epsilon=norm.eps)


def _check(network: Network, model: onnx.ModelProto, folder: Path) -> None:
    """Compare the graph's log-probabilities with PyTorch's on two seconds of noise that swells and fades."""
    time = torch.arange(32_000) / 16_000
    noise = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0)) * 0.1 * torch.sin(3 * time) ** 2
    lengths = torch.tensor([32_000])
    with torch.no_grad():
        expected = network(noise, lengths)[0].numpy()
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed: dict[str, np.ndarray] = {"audio": noise.numpy()}
    if network.config.model.bidirectional:
        got = session.run(["log_probs"], {**feed, "lengths": lengths.numpy()})[0]
    else:
        shapes = json.loads(session.get_modelmeta().custom_metadata_map["state_shapes"])
        state = {f"state_{i}": np.zeros((1, *shape), np.float32) for i, shape in enumerate(shapes)}
        names = ["log_probs", *(f"new_{name}" for name in state)]
        got, *after = session.run(names, {**feed, **state, "flush": np.zeros(1, np.float32)})
        if network.latency:
            silence = np.zeros((1, network.latency * network.stride), np.float32)
            state = dict(zip(state, after, strict=True))
            last = session.run(["log_probs"], {"audio": silence, **state, "flush": np.ones(1, np.float32)})[0]
            got = np.concatenate([np.asarray(got), np.asarray(last)], axis=1)[:, network.latency :]
    difference = float(np.abs(np.asarray(got) - expected).max())
    if not difference <= _TOLERANCE:
        raise ModelError(f"{folder}: the exported graph differs from PyTorch by {difference:.2g} in log-probability")


def export_model(sources: list[Path], out: Path, to: str = "model", *, small: bool = False) -> list[Path]:
    """Join the networks of runs and model folders into one model folder, or write their graphs alone.

    Args:
        sources: run folders (with model/ inside) or model folders; a later one's network replaces an earlier one's.
        small: a whole model in a quarter of the size: weights in float16, int8 graphs alone.
        to: "model" for a whole model folder, "onnx" or "onnx-int8" for OUT/(offline|streaming).onnx.

    Returns:
        What was written.

    Raises:
        ModelError: a source holds no network.
    """
    out = out.absolute()
    if to == "model":
        _check_replaceable(out)
    networks: dict[str, Path] = {}
    card = json.dumps({"name": out.name}) + "\n"  # what several sources say of themselves is true of none of the joined
    language_model = out / LM_FOLDER if (out / LM_FOLDER).is_dir() else None
    for source in sources:
        folder = source / "model" if (source / "model").is_dir() else source
        found = [kind for kind in ("offline", "streaming") if (folder / kind / "weights.safetensors").is_file()]
        if not found:
            raise ModelError(f"{source}: neither a run nor a model folder (no offline/ or streaming/ network in it)")
        networks |= {kind: folder / kind for kind in found}
        if len(sources) == 1 and (folder / "card.json").is_file():
            card = (folder / "card.json").read_text(encoding="utf-8")
        if (folder / LM_FOLDER).is_dir():
            language_model = folder / LM_FOLDER
    if to == "model":
        return [_write_model(networks, card, language_model, out, small)]
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, folder in networks.items():
        network = load_network(folder)
        graph = build_graph(network)
        _check(network, graph, folder)
        path = out / f"{kind}.{'int8.' if to == 'onnx-int8' else ''}onnx"
        temporary = path.with_suffix(f".tmp-{os.getpid()}")
        onnx.save(quantise(graph) if to == "onnx-int8" else graph, str(temporary))
        os.replace(temporary, path)
        written.append(path)
    return written


def _check_replaceable(out: Path) -> None:
    """Refuse to put a model where something else lies."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ModelError(f"{out}: is a file; name a folder to write")
    others = sorted({p.name for p in out.iterdir()} - {"offline", "streaming", "card.json", LM_FOLDER})
    if others:
        raise ModelError(f"{out}: holds other things than a model ({', '.join(others[:3])}); name another folder")


def _write_model(networks: dict[str, Path], card: str, language_model: Path | None, out: Path, small: bool) -> Path:
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for kind, folder in networks.items():
        save_network(load_network(folder), temporary / kind, dtype=torch.float16 if small else torch.float32)
        write_graphs(temporary / kind, precisions=("int8",) if small else ("fp32", "int8"))
    if language_model is not None:
        shutil.copytree(language_model, temporary / LM_FOLDER)
    write_atomically(temporary / "card.json", card)
    replace_folder(temporary, out)
    return out
