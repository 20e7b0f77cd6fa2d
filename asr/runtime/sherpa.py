"""Graphs that the package sherpa-onnx runs unchanged: what two of its loaders do to audio is undone inside.

Streaming, `OnlineRecognizer.from_t_one_ctc`: it hands over 2400 samples at a time (300 ms at 8 kHz, whatever the
metadata say). Audio at 16 kHz is given to it as if it had 8 kHz; 2400 samples are then 150 ms, which is no whole number
of frames: a step reads as many frames as a block can complete, and rows that complete one less keep their state of the
frame before. It carries one float16 state: every number travels as two, the second what the first rounds off.

Offline, `OfflineRecognizer.from_omnilingual_asr_ctc`: it hands over any number of samples, shifted and scaled to mean 0
and variance 1. Its divisor is sqrt(variance + 1e-5), so what lacks to variance 1 tells how loud the recording was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.errors import ModelError
from asr.models import Network
from asr.runtime.export_graph import GraphBuilder
from asr.text import Tokenizer

_BLOCK = 2400  # samples that from_t_one_ctc takes at a time
_SLOTS = 5  # frames that it expects of a block: it counts 30 ms each, which is right for a block of 150 ms
_LOUDEST = 32_767  # it scales samples to 16 bits by this
_HALF_RANGE = 65_504.0  # the largest float16
_HALF_STEP = 2048.0  # float16 rounds to 11 bits; what is left is scaled by 2^11 and rounded in its turn
_EDGE = round(EDGE_SILENCE_SECONDS * SAMPLE_RATE)
_OFFLINE_FRAME = SAMPLE_RATE // 50  # from_omnilingual_asr_ctc counts 20 ms for a frame
_EPSILON = 1e-5  # that it adds to the variance


def build_sherpa_graph(network: Network) -> onnx.ModelProto:
    """The fp32 graph of a network in the form of sherpa-onnx's loader for its kind.

    Raises:
        ModelError: the network has a part that this form cannot hold.
    """
    return (_OfflineGraph if network.config.model.bidirectional else _StreamingGraph)(network).build()


def sherpa_tokens(tokenizer: Tokenizer) -> str:
    """tokens.txt as sherpa-onnx reads it: a token and its number a line; the blank is <blk>, a space is U+2581."""
    names = ["<blk>", *("▁" if token == " " else token for token in tokenizer.tokens[1:])]
    return "".join(f"{name} {i}\n" for i, name in enumerate(names))


class _StreamingGraph(GraphBuilder):
    """Inputs: samples int32 (batch, 2400, 1), one state float16 (batch, n). Outputs: log-probabilities, next state."""

    tokens_alone = True  # its loaders know of no other outputs

    def __init__(self, network: Network) -> None:
        super().__init__(network)
        layers = network._each()
        self.hop = layers[0].stride  # samples
        self.stride = network.stride // self.hop  # feature frames to an output frame
        self.new = _BLOCK // self.hop  # feature frames of a block
        self.most = -(-self.new // self.stride)  # output frames that a block can complete; the fewest are one less
        if _BLOCK % self.hop or self.stride > self.new:
            raise ModelError(
                f"sherpa-onnx feeds blocks of {_BLOCK} samples: that is no whole number of feature frames, or not one "
                f"output frame (hop {self.hop}, {network.stride} samples an output frame)"
            )
        self.new_states: list[str] = []
        self.size = 0  # numbers in the states so far
        self.packed = ""  # float32 (batch, size): the states as they came in
        self.short = ""  # bool (batch,): the row completes one frame less than `most`
        self.unit = 0  # frames of the current layer's input to an output frame, once rows are told apart

    def build(self) -> onnx.ModelProto:
        halves = self.op("Split", "state", outputs=2, axis=1, num_outputs=2)
        first, second = (self.op("Cast", half, to=TensorProto.FLOAT) for half in (halves, f"{halves}_1"))
        self.packed = self.op("Add", first, self.op("Mul", second, self.number(1 / _HALF_STEP)))
        # samples of 16 bits, s / 32768, arrive as s * 32767 / 32768 cut towards zero: s - 1 above zero, s + 1 below
        cut = self.op("Cast", "samples", to=TensorProto.FLOAT)
        samples = self.op("Mul", self.op("Add", cut, self.op("Sign", cut)), self.number(1 / 32_768))
        log_probs = self.add_layers(self.op("Squeeze", samples, self.ints([2])))
        self._spread(self._without_void(log_probs))
        self._pack()
        tokens = len(self.network.tokenizer)
        inputs = [
            helper.make_tensor_value_info("samples", TensorProto.INT32, ["batch", _BLOCK, 1]),
            helper.make_tensor_value_info("state", TensorProto.FLOAT16, ["batch", 2 * self.size]),
        ]
        outputs = [
            helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", max(_SLOTS, self.most), tokens]),
            helper.make_tensor_value_info("next_state", TensorProto.FLOAT16, ["batch", 2 * self.size]),
        ]
        metadata = {
            "model_type": "t-one",
            "frame_length_ms": "300",
            "state_dim": str(2 * self.size),
            "sample_rate": "8000",
            "comment": f"give it audio of {SAMPLE_RATE} Hz as if it had 8000 Hz",
            "precision": "fp32",
        }
        return self.model(inputs, outputs, metadata)

    def add_layers(self, x: str, name: str | None = None) -> str:
        layers = self.network._each()
        for i, layer in enumerate(layers):
            if i == 2:  # after the features and their normalisation
                x = self._whole_frames_of_rows(x)
            if i == self.network.first_recurrent:
                x = self.op("Transpose", x, perm=[1, 0, 2])
            x = self.add(layer, x)
            self.unit //= layer.stride
        return self.op("Transpose", x, perm=[1, 0, 2], name=name)

    def _whole_frames_of_rows(self, x: str) -> str:
        """Cut each row's feature frames, what waits from earlier blocks in front, to whole output frames.

        Where a row completes one output frame less than `most`, its last one is void: nothing of it is kept.
        """
        if self.new % self.stride == 0:
            return x
        bands = self.network.config.features.bands
        x = self.with_history(x, self.stride - 1, [bands])
        old, new = self.state([1])
        there = self.op("Add", old, self.number(self.new))
        whole = self.op("Floor", self.op("Mul", there, self.number(1 / self.stride)))
        self.op("Sub", there, self.op("Mul", whole, self.number(self.stride)), name=new)
        self.short = self.op("Less", self.op("Squeeze", whole, self.ints([1])), self.number(self.most))
        self.row_frames = self.op("Cast", self.op("Squeeze", whole, self.ints([1])), to=TensorProto.INT32)
        # the frames that wait stand before the new ones, at the end of the history
        ahead = self.constant(np.arange(self.most * self.stride, dtype=np.float32)[None] + (self.stride - 1))
        index = self.op("Min", self.op("Sub", ahead, old), self.number(self.stride + self.new - 2))
        index = self.op("Unsqueeze", self.op("Cast", index, to=TensorProto.INT64), self.ints([2]))
        self.unit = self.stride
        return self.op("GatherND", x, index, batch_dims=1)

    def _without_void(self, log_probs: str) -> str:
        """What comes out before the look-ahead has filled becomes the blank."""
        latency = self.network.latency
        if not latency:
            return log_probs
        old, new = self.state([1])
        if self.row_frames:
            count = self.op("Unsqueeze", self.op("Cast", self.row_frames, to=TensorProto.FLOAT), self.ints([1]))
        else:
            count = self.number(self.most)
        self.op("Min", self.op("Add", old, count), self.number(latency), name=new)
        number = self.op("Add", old, self.constant(np.arange(self.most, dtype=np.float32)[None]))
        void = self.op("Unsqueeze", self.op("Less", number, self.number(latency)), self.ints([2]))
        blank = np.full(len(self.network.tokenizer), -100, np.float32)
        blank[0] = 0
        return self.op("Where", void, self.constant(blank), log_probs)

    def _spread(self, log_probs: str) -> None:
        """Repeat frames so that each row gives as many; CTC reads a frame that stands twice as one."""
        slots = max(_SLOTS, self.most)
        spread = self.op("Gather", log_probs, self.ints(_repeats(self.most, slots)), axis=1)
        if self.short:
            fewer = self.op("Gather", log_probs, self.ints(_repeats(self.most - 1, slots)), axis=1)
            spread = self.op("Where", self._of_rank(self.short, 3), fewer, spread)
        self.op("Identity", spread, name="log_probs")

    def _pack(self) -> None:
        flat = [self.op("Flatten", state, axis=1) for state in self.new_states]
        packed = self.op("Concat", *flat, axis=1)
        packed = self.op("Clip", packed, self.number(-_HALF_RANGE), self.number(_HALF_RANGE))
        first = self.op("Cast", packed, to=TensorProto.FLOAT16)
        rest = self.op("Sub", packed, self.op("Cast", first, to=TensorProto.FLOAT))
        rest = self.op("Mul", rest, self.number(_HALF_STEP))
        self.op("Concat", first, self.op("Cast", rest, to=TensorProto.FLOAT16), axis=1, name="next_state")

    def state(self, shape: list[int]) -> tuple[str, str]:
        """A state is a piece of the packed one."""
        count = int(np.prod(shape))
        piece = self.cut(self.packed, 1, self.size, self.size + count)
        old, new = self.op("Reshape", piece, self.ints([0, *shape])), f"new_state_{len(self.new_states)}"
        self.size += count
        self.state_shapes.append(shape)
        self.new_states.append(new)
        return old, new

    def keep_last(self, x: str, size: int, new: str) -> None:
        if not self.unit:
            return super().keep_last(x, size, new)
        rank = 2 + len(self.state_shapes[self.new_states.index(new)]) - 1
        late, early = self.cut(x, 1, -size), self.cut(x, 1, -size - self.unit, -self.unit)
        self.op("Where", self._of_rank(self.short, rank), early, late, name=new)

    def _of_rank(self, rows: str, rank: int) -> str:
        return self.op("Reshape", rows, self.ints([-1] + [1] * (rank - 1)))


def _repeats(frames: int, slots: int) -> list[int]:
    """Which of `frames` frames stands in each of `slots` slots: all of them, in order, evenly."""
    return [slot * frames // slots for slot in range(slots)]


class _OfflineGraph(GraphBuilder):
    """Input: samples float32 (batch, time) of mean 0 and variance 1. Output: log-probabilities, 20 ms a frame."""

    def build(self) -> onnx.ModelProto:
        wide = self.op("Cast", "samples", to=TensorProto.DOUBLE)  # the last digits of the variance count
        variance = self.op("ReduceMean", self.op("Mul", wide, wide), self.ints([1]), keepdims=1)
        lacking = self.op("Sub", self.constant(np.array(1.0)), variance)
        lacking = self.op("Max", lacking, self.constant(np.array(_EPSILON)))  # no louder than variance 1
        gain = self.op("Sqrt", self.op("Div", self.constant(np.array(_EPSILON)), lacking))
        audio = self.op("Mul", "samples", self.op("Cast", gain, to=TensorProto.FLOAT))
        audio = self.whole_frames(self.op("Pad", audio, self.ints([0, _EDGE, 0, _EDGE])))
        batch, samples = self.op("Shape", audio, start=0, end=1), self.op("Shape", audio, start=1, end=2)
        frames = self.op("Div", samples, self.ints([self.network.stride]))
        self.lengths = self.op("Cast", self.op("Expand", frames, batch), to=TensorProto.INT32)
        log_probs = self.add_layers(audio)
        # every 20 ms the frame that is there: CTC reads a frame that stands twice as one
        slot, tokens = self.ints([_slot(self.network)]), len(self.network.tokenizer)
        slots = self.op("Squeeze", self.op("Div", samples, slot))
        times = self.op("Mul", self.op("Range", self.constant(np.array(0)), slots, self.constant(np.array(1))), slot)
        self.op("Gather", log_probs, self.op("Div", times, self.ints([self.network.stride])), axis=1, name="log_probs")
        inputs = [helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["batch", "time"])]
        outputs = [helper.make_tensor_value_info("log_probs", TensorProto.FLOAT, ["batch", "frames", tokens])]
        return self.model(inputs, outputs, {"model_type": "omnilingual-asr", "precision": "fp32"})


def _slot(network: Network) -> int:
    """Samples to a frame of the offline graph; a network of shorter frames than sherpa-onnx's keeps its own."""
    return min(_OFFLINE_FRAME, network.stride)


def read_as_sherpa(path: Path, audio: np.ndarray, network: Network) -> np.ndarray:
    """What a graph of this form writes for float32 (n,) at 16 kHz, edge silence included: log-probabilities of the
    network's own frames (n // stride, tokens), as far as sherpa-onnx's way of reading gives them.
    """
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read: Callable[..., np.ndarray] = _read_offline if network.config.model.bidirectional else _read_streaming
    return read(session, audio, network)


def _read_offline(session: Any, audio: np.ndarray, network: Network) -> np.ndarray:
    samples = audio[_EDGE : len(audio) - _EDGE]  # the graph adds the edges itself
    normalised = (samples - samples.mean()) / np.sqrt(samples.var() + np.float32(_EPSILON))
    (log_probs,) = session.run(None, {"samples": normalised[None].astype(np.float32)})
    first = -(-np.arange(len(audio) // network.stride) * network.stride // _slot(network))  # slot of each frame
    return log_probs[0][first]


def _read_streaming(session: Any, audio: np.ndarray, network: Network) -> np.ndarray:
    """Feeds silence after the audio until all of it has passed the look-ahead."""
    wanted = len(audio) // network.stride
    silence = np.zeros(network.latency * network.stride + _BLOCK, np.float32)
    blocks = np.concatenate([audio, silence])
    blocks = blocks[: len(blocks) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)
    state = np.zeros((1, session.get_inputs()[1].shape[1]), np.float16)
    frames: list[np.ndarray] = []
    read = 0  # samples
    for block in blocks:
        samples = (np.clip(block, -1, 1) * _LOUDEST).astype(np.int32)[None, :, None]
        log_probs, state = session.run(None, {"samples": samples, "state": state})
        count = (read + _BLOCK) // network.stride - read // network.stride
        repeats = _repeats(count, log_probs.shape[1])
        frames += [log_probs[0, repeats.index(i)] for i in range(count)]
        read += _BLOCK
    return np.stack(frames[network.latency : network.latency + wanted])
