"""The graph of a network, built node by node: samples go in, log-probabilities come out, the state stays outside.

It holds what inference needs and no more: features as a matrix product, batch normalisation folded into the
convolutions, one LSTM operator a layer (of the other cells, ONNX's operator where it has one, else a Scan with the
cell's equations).
"""

import json
import math
import wave
from functools import singledispatchmethod
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from asr.errors import ModelError
from asr.features import FLOOR, LogMel
from asr.models import FORMAT_VERSION, Network, Output
from asr.nn import (
    LSTM,
    BiLSTM,
    LookAhead,
    Normalise,
    RunningNormalise,
    StreamingLayer,
    StridedConvolution,
    UtteranceNormalise,
)
from asr.nn.attention import SelfAttention
from asr.nn.convolution import LARGEST_RISE, LEVEL_ABOVE_MEAN, MEMORY_FRAMES, NO_POWER, RUNNING_LEVEL_ABOVE_MEAN
from asr.nn.stack import Bidirectional, Recurrent, Stacked
from asr.runtime.export_cells import run_cell
from asr.runtime.graph import INT_MAX, WEIGHTS, Graph

_OPSET = 20
_RELU_DEVIATIONS = 5.0  # standard deviations that what leaves a convolution and ReLU nearly always lies within
_SPEECH = Path(__file__).with_name("check.wav")  # a sentence, by espeak-ng: installations carry no recordings


class GraphBuilder(Graph):
    """A network's graph. Inside the recurrent part time comes first: (time, batch, size).

    What asr.runtime.sherpa makes otherwise it overrides: how samples come in, where states are kept, what goes out.
    """

    tokens_alone = False

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        self.streaming = not network.config.model.bidirectional
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.state_shapes: list[list[int]] = []
        self.lengths = ""  # int32 (batch,): each row's frames, in whole utterances
        self.phones = ""  # log-probabilities (time, batch, phones), where the network writes them
        self.joint = ""  # the encoder's share of a transducer's joint (time, batch, units), where it has one
        self.flush = ""  # 1 where a stream is over and its look-ahead is read out

    def build(self) -> onnx.ModelProto:
        """The graph: inputs, outputs and metadata as asr.runtime describes them."""
        self.inputs.append(helper.make_tensor_value_info("audio", TensorProto.FLOAT, ["batch", "samples"]))
        tokens = len(self.network.tokenizer)
        outputs = [helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", "frames_out", tokens])]
        if self.streaming:
            self.inputs.append(helper.make_tensor_value_info("flush", TensorProto.FLOAT, [1]))
            self.flush = "flush"
            x = "audio"
        else:
            self.inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT64, ["batch"]))
            outputs.append(helper.make_tensor_value_info("frames", TensorProto.INT64, ["batch"]))
            stride = self.constant(np.array(self.network.stride, np.int64))
            self.lengths = self.op("Cast", self.op("Div", "lengths", stride, name="frames"), to=TensorProto.INT32)
            x = self.whole_frames("audio")
        self.add_layers(x, name="log_probs")
        behind = {
            "phone_log_probs": (self.phones, self.network.phone_count),
            "joint": (self.joint, self.network.joint_size),
        }
        for name, (written, columns) in behind.items():
            if written:
                self.op("Transpose", written, perm=[1, 0, 2], name=name)
                shape = ["batch", "frames_out", columns]
                outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        if self.state_shapes:
            self.pack_states(self.state_shapes)
            self.state_shapes = [[sum(map(math.prod, self.state_shapes))]]
        return self.model(self.inputs, outputs + self.outputs, {"precision": "fp32"})

    def whole_frames(self, audio: str) -> str:
        """Samples (batch, time) as far as whole output frames go."""
        stride = self.ints([self.network.stride])
        whole = self.op("Mul", self.op("Div", self.op("Shape", audio, start=1, end=2), stride), stride)
        return self.op("Slice", audio, self.ints([0]), whole, self.ints([1]))

    def add_layers(self, x: str, name: str | None = None) -> str:
        """Samples (batch, time) -> log-probabilities (batch, frames, tokens), with all layers between."""
        for i, layer in enumerate(self.network._each()):
            if i == self.network.first_recurrent:
                x = self.op("Transpose", x, perm=[1, 0, 2])
            x = self.add(layer, x)
        return self.op("Transpose", x, perm=[1, 0, 2], name=name)

    def model(
        self, inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto], metadata: dict[str, str]
    ) -> onnx.ModelProto:
        """The graph of all nodes so far; `metadata` joins what every graph says of its network."""
        network = self.network
        graph = helper.make_graph(self.nodes, "network", inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], producer_name="streaming-asr")
        model.ir_version = 10
        lstms = {node.name: node.input[0] for node in self.nodes if node.op_type == "LSTM"}
        properties = {
            "format_version": str(FORMAT_VERSION),
            "kind": network.config.model.kind,
            "sample_rate": str(network.config.features.sample_rate),
            "samples_per_frame": str(network.stride),
            "latency_frames": str(network.latency),
            "vocab_size": str(len(network.tokenizer)),
            "phone_count": str(network.phone_count if self.phones else 0),
            "joint_size": str(network.joint_size if self.joint else 0),
            "state_shapes": json.dumps(self.state_shapes),
            "lstm_input_ranges": json.dumps({n: self.ranges[x] for n, x in lstms.items() if x in self.ranges}),
        }
        helper.set_model_props(model, properties | metadata)
        onnx.checker.check_model(model)
        return model

    def state(self, shape: list[int]) -> tuple[str, str]:
        """Add a state of a shape (without the batch); gives the names of what comes in and what goes out."""
        number = len(self.state_shapes)
        self.state_shapes.append(shape)
        return f"old_{number}", f"new_{number}"

    def pack_states(self, shapes: list[list[int]]) -> None:
        """All states travel as one, state_0 (batch, size): a call costs less; streams are joined and parted by row."""
        sizes = [math.prod(shape) for shape in shapes]
        names = [f"old_{i}" if len(shape) == 1 else f"flat_{i}" for i, shape in enumerate(shapes)]
        split = helper.make_node("Split", ["state_0", self.ints(sizes)], names, name="split_states", axis=1)
        nodes, flat = [split], []
        for i, shape in enumerate(shapes):
            if len(shape) > 1:
                whole = self.ints([0, *shape])
                nodes.append(helper.make_node("Reshape", [names[i], whole], [f"old_{i}"], name=f"old_{i}"))
            flat.append(f"new_{i}" if len(shape) == 1 else self.op("Flatten", f"new_{i}", axis=1))
        self.nodes[:0] = nodes
        self.op("Concat", *flat, axis=1, name="new_state_0")
        value = helper.make_tensor_value_info
        self.inputs.append(value("state_0", TensorProto.FLOAT, ["batch", sum(sizes)]))
        self.outputs.append(value("new_state_0", TensorProto.FLOAT, ["batch", sum(sizes)]))

    def with_history(self, x: str, size: int, shape: list[int]) -> str:
        """Put the `size` frames before x in front of it, axis 1: zeros, or what the state holds."""
        if not size:
            return x
        if self.streaming:
            old, new = self.state([size, *shape])
            joined = self.op("Concat", old, x, axis=1)
            self.keep_last(joined, size, new)
            return joined
        rank = 2 + len(shape)
        before = [0, size, *[0] * (rank - 2)]
        return self.op("Pad", x, self.ints(before + [0] * rank))

    def keep_last(self, x: str, size: int, new: str) -> None:
        """The last `size` frames of x, axis 1, become the new state `new`."""
        self.op("Slice", x, self.ints([-size]), self.ints([INT_MAX]), self.ints([1]), name=new)

    @singledispatchmethod
    def add(self, layer: StreamingLayer, x: str) -> str:
        """Add a layer's nodes; gives the name of its output."""
        raise ModelError(f"a layer of kind {type(layer).__name__} cannot be exported")

    def windows(self, x: str, window: int, hop: int, shape: list[int]) -> str:
        """(batch, time, *shape) -> (batch, time // hop, window * size): what each frame of the output sees."""
        size, hops, rank = math.prod(shape), -(-window // hop), 2 + len(shape)
        x = self.with_history(x, window - hop, shape)
        if hops * hop > window:
            x = self.op("Pad", x, self.ints([0] * rank + [0, hops * hop - window] + [0] * (rank - 2)))
        x = self.op("Reshape", x, self.ints([0, -1, hop * size]))
        parts = [self.cut(x, 1, i, i + 1 - hops if i + 1 < hops else INT_MAX) for i in range(hops)]
        parts[-1] = self.cut(parts[-1], 2, 0, (window - (hops - 1) * hop) * size)
        return self.op("Concat", *parts, axis=2)

    @add.register
    def _(self, layer: LogMel, x: str) -> str:
        x = self.windows(x, layer.window, layer.stride, [])
        used = layer.filters.any(dim=1)
        real, imaginary = (part[:, used] for part in layer.dft_matrix().chunk(2, dim=1))
        if layer.window % 2 == 0:
            # The taper and the cosines are even about the middle of the window, the sines odd: half the products do.
            half = layer.window // 2
            ahead = self.cut(x, 2, 1, half + 1)
            back = self.op("Slice", x, self.ints([-1]), self.ints([half - 1]), self.ints([2]), self.ints([-1]))
            even, odd = self.op("Add", ahead, back), self.op("Sub", ahead, back)
            real, imaginary = real[1 : half + 1].clone(), imaginary[1 : half + 1]
            real[-1] /= 2  # the middle met itself
        else:
            even = odd = x
        parts = [(even, real), (odd, imaginary)]
        parts = [self.op("MatMul", samples, self.constant(matrix.float())) for samples, matrix in parts]
        power = self.op("Add", *(self.op("Mul", part, part) for part in parts))
        x = self.op("MatMul", power, self.constant(layer.filters[used]))
        return self.op("Log", self.op("Add", x, self.constant(np.array(FLOOR, np.float32))))

    @add.register
    def _(self, layer: Normalise, x: str) -> str:
        return self.op("Mul", self.op("Sub", x, self.constant(layer.mean)), self.constant(layer.scale))

    @add.register
    def _(self, layer: RunningNormalise, x: str) -> str:
        bands = len(layer.mean)
        power = self.op("Exp", x)
        loudness = self.op("ReduceSum", power, self.ints([2]), keepdims=1)
        weight = self.op("Sqrt", loudness)
        counted = self.op("Concat", self.op("Mul", weight, power), weight, loudness, axis=2)
        old, new = self.state([bands + 2])
        # frame by frame, so that blocks of any size give the same bits
        body = self.leaky_sum(math.exp(-1 / MEMORY_FRAMES))
        axes = {"scan_input_axes": [1], "scan_output_axes": [1]}
        self.op("Scan", old, counted, name=new, outputs=2, num_scan_inputs=1, body=body, **axes)
        so_far = f"{new}_1"
        least = self.number(NO_POWER)
        weights, squares = (self.op("Max", self.cut(so_far, 2, i, i + 1), least) for i in (bands, bands + 1))
        count = self.op("Div", self.op("Mul", weights, weights), squares)
        level = self.op("Log", self.op("Max", self.op("Div", self.cut(so_far, 2, 0, bands), weights), least))
        differs = self.op("Sub", level, self.constant(layer.mean + RUNNING_LEVEL_ABOVE_MEAN))
        differs = self.op("Max", differs, self.number(-LARGEST_RISE))
        return self.evened(layer, x, count, differs)

    def leaky_sum(self, kept: float) -> onnx.GraphProto:
        """The body of a Scan: what was summed up, times `kept`, and the next row."""
        factor = self.number(kept)
        outside, self.nodes = self.nodes, []
        total = self.op("Add", self.op("Mul", "sum_before", factor), "sum_next")
        self.op("Identity", total, name=f"{total}_shown")
        inside, self.nodes = self.nodes, outside
        infos = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
            for names in (["sum_before", "sum_next"], [total, f"{total}_shown"])
        ]
        return helper.make_graph(inside, "leaky_sum", infos[0], infos[1])

    def evened(self, layer: RunningNormalise | UtteranceNormalise, x: str, count: str, differs: str) -> str:
        """x, normalised, without the share of what its levels differ by that so many frames can tell."""
        share = self.op("Div", count, self.op("Add", count, self.number(layer.frames)))
        x = self.op("Sub", self.op("Sub", x, self.constant(layer.mean)), self.op("Mul", share, differs))
        return self.op("Mul", x, self.constant(layer.scale))

    @add.register
    def _(self, layer: UtteranceNormalise, x: str) -> str:
        frames = self.op("Mul", self.op("Cast", self.lengths, to=TensorProto.FLOAT), self.number(layer.whole))
        frames = self.op("Reshape", frames, self.ints([-1, 1, 1]))
        time = self.op("Squeeze", self.op("Shape", x, start=1, end=2), self.ints([0]))
        place = self.op("Range", self.constant(np.array(0)), time, self.constant(np.array(1)))
        place = self.op("Reshape", self.op("Cast", place, to=TensorProto.FLOAT), self.ints([1, 1, -1]))
        counts = self.op("Cast", self.op("Less", place, frames), to=TensorProto.FLOAT)
        # a product, whose sum, unlike ReduceSum's, is bit for bit the same beside a longer utterance
        power = self.op("MatMul", counts, self.op("Exp", x))
        count = self.op("Max", frames, self.number(1.0))
        level = self.op("Log", self.op("Max", self.op("Div", power, count), self.number(NO_POWER)))
        differs = self.op("Sub", level, self.constant(layer.mean + LEVEL_ABOVE_MEAN))
        return self.evened(layer, x, count, differs)

    @add.register
    def _(self, layer: StridedConvolution, x: str) -> str:
        norm, weight = layer.norm, layer.convolution.weight
        scale = norm.weight * (norm.running_variance + norm.epsilon).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        # a matrix product: on the few frames of a live block it is twice as fast as ONNX Runtime's Conv
        matrix = (weight * scale[:, None, None]).permute(2, 1, 0).flatten(0, 1)
        x = self.windows(x, layer.kernel, layer.stride, [weight.shape[1]])
        y = self.op("Relu", self.op("Add", self.op("MatMul", x, self.constant(matrix, WEIGHTS)), self.constant(bias)))
        expected = float((norm.bias + _RELU_DEVIATIONS * norm.weight.abs()).max().detach())
        self.ranges[y] = (0.0, max(expected, self.largest(layer)))
        return y

    def largest(self, layer: StreamingLayer) -> float:
        """The largest value that comes out of a layer while the network hears a sentence."""
        found: list[float] = []
        hook = layer.register_forward_hook(lambda _, inputs, output: found.append(float(output[0].max())))
        speech = torch.from_numpy(check_speech())
        with torch.no_grad():
            self.network(speech[None], torch.tensor([len(speech)]))
        hook.remove()
        return max(found)

    @add.register
    def _(self, layer: LSTM, x: str) -> str:
        size = layer.lstm.hidden_size
        (old_h, new_h), (old_c, new_c) = self.state([size]), self.state([size])
        axis = self.ints([0])
        starts = [self.op("Unsqueeze", old, axis) for old in (old_h, old_c)]
        y = self.op("LSTM", x, *self.lstm_weights([layer.lstm]), self.row_frames, *starts, outputs=3, hidden_size=size)
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
        if self.flush:  # at the end of a stream what lies ahead is nothing, not what the layers below make of silence
            x = self.op("Mul", x, self.op("Sub", self.constant(np.ones(1, np.float32)), self.flush))
        joined = self.op("Concat", old, self.op("Transpose", x, perm=[1, 0, 2]), axis=1)
        self.keep_last(joined, frames - 1, new)
        y = ""
        for k in range(frames):
            part = self.cut(joined, 1, k, k + 1 - frames if k + 1 < frames else INT_MAX)
            part = self.op("Mul", part, self.constant(layer.weight[k]))
            y = self.op("Add", y, part) if y else part
        return self.op("Transpose", y, perm=[1, 0, 2])

    @add.register
    def _(self, layer: Output, x: str) -> str:
        if layer.phones is not None and not self.tokens_alone:
            self.phones = self.op("LogSoftmax", self.linear(layer.phones, x), axis=-1)
        if layer.joint is not None and not self.tokens_alone:
            self.joint = self.linear(layer.joint, x)
        return self.op("LogSoftmax", self.linear(layer.linear, x), axis=-1)

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


def check_speech() -> np.ndarray:
    """The sentence that comes along: float32 (n,) at 16 kHz."""
    with wave.open(str(_SPEECH)) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    return samples.astype(np.float32) / 32_768
