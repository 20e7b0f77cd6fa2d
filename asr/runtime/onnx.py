"""Networks on ONNX Runtime; the features are in the graph, so samples go in."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from asr.audio import SAMPLE_RATE
from asr.errors import ModelError
from asr.runtime import State
from asr.runtime.folder import FORMAT_VERSION

_ROWS = 4  # of whole utterances that are computed together
_GO_ON, _FLUSH = np.zeros(1, np.float32), np.ones(1, np.float32)


def open_graph(
    path: Path, *, threads: int = 1, phones: bool = False, joint: bool = False
) -> "OnnxOffline | OnnxStreaming":
    """Open an exported graph; its metadata says which kind it is.

    Args:
        path: the graph.
        threads: for the arithmetic of one call.
        phones, joint: what comes behind the tokens, where it has them (asr.runtime.load_engine).

    Raises:
        ModelError: it is damaged, of another version, or was not exported by this program.
    """
    session = _open_session(path, 1)
    metadata = session.get_modelmeta().custom_metadata_map
    version = metadata.get("format_version")
    if version != str(FORMAT_VERSION):
        raise ModelError(f"{path}: graph of format version {version}, this program reads {FORMAT_VERSION}")
    try:
        if int(metadata["sample_rate"]) != SAMPLE_RATE:
            raise ModelError(f"{path}: for {metadata['sample_rate']} Hz, this program reads {SAMPLE_RATE} Hz")
        kind = {"offline": OnnxOffline, "streaming": OnnxStreaming}[metadata["kind"]]
        outputs = _Outputs(metadata, phones, joint)
        if kind is OnnxOffline:
            return OnnxOffline(session, metadata, threads, outputs)
        return OnnxStreaming(session if threads == 1 else _open_session(path, threads), metadata, outputs)
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path}: the graph's metadata is wrong ({error})") from error


def _open_session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Waiting threads sleep: a live stream computes for a few milliseconds in every 160.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime raises many kinds of its own
        reason = str(error).splitlines()[0]
        raise ModelError(f"{path}: not a readable graph, the model may be half-written ({reason})") from error


class _Outputs:
    """Which of a graph's outputs are wanted: the tokens' log-probabilities, and what comes behind them."""

    def __init__(self, metadata: dict[str, str], phones: bool, joint: bool) -> None:
        has_joint = int(metadata.get("joint_size", 0))
        self.phone_count = int(metadata.get("phone_count", 0)) if phones else 0
        self.joint_size = has_joint if joint else 0
        behind = {"phone_log_probs": self.phone_count, "joint": self.joint_size}
        self.names = ["log_probs", *(name for name, columns in behind.items() if columns)]
        self.options = onnxruntime.RunOptions()
        # else what nobody asked for is computed as well; with little to leave out, finding out costs as much
        self.options.only_execute_path_to_fetches = has_joint > self.joint_size


class OnnxOffline:
    """A whole-utterance network (see asr.runtime.OfflineEngine).

    Utterances of like length go through it a few at a time, each such group on one of `threads` threads: that leaves
    less padding and keeps more in the caches than all in one batch with the threads inside the operators.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, metadata: dict[str, str], threads: int, outputs: _Outputs
    ) -> None:
        self._session = session
        self._pool = ThreadPoolExecutor(threads, "asr-offline") if threads > 1 else None
        self.samples_per_frame = int(metadata["samples_per_frame"])
        self.vocab_size = int(metadata["vocab_size"])
        self.phone_count, self.joint_size = outputs.phone_count, outputs.joint_size
        self._outputs, self._options = ["frames", *outputs.names], outputs.options

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float32 (samples,) each -> float32 (samples // samples_per_frame, columns) each."""
        order = sorted(range(len(batch)), key=lambda i: len(batch[i]))
        groups = [order[start : start + _ROWS] for start in range(0, len(order), _ROWS)]
        run = map if self._pool is None else self._pool.map
        rows = run(self._together, [[batch[i] for i in group] for group in groups])
        found = dict(zip((i for group in groups for i in group), (row for group in rows for row in group), strict=True))
        return [found[i] for i in range(len(batch))]

    def _together(self, group: Sequence[np.ndarray]) -> list[np.ndarray]:
        lengths = np.array([len(samples) for samples in group], np.int64)
        audio = np.zeros((len(group), lengths.max()), np.float32)
        for row, samples in zip(audio, group, strict=True):
            row[: len(samples)] = samples
        frames, *values = self._session.run(self._outputs, {"audio": audio, "lengths": lengths}, self._options)
        return [row[:n] for row, n in zip(side_by_side(values), np.asarray(frames), strict=True)]


class OnnxStreaming:
    """A network that reads streams (see asr.runtime.StreamingEngine)."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: dict[str, str], outputs: _Outputs) -> None:
        self._session = session
        self.samples_per_frame = int(metadata["samples_per_frame"])
        self.latency_frames = int(metadata["latency_frames"])
        self.vocab_size = int(metadata["vocab_size"])
        self.phone_count, self.joint_size = outputs.phone_count, outputs.joint_size
        self._shapes = [tuple(shape) for shape in json.loads(metadata["state_shapes"])]
        states = [f"new_state_{i}" for i in range(len(self._shapes))]
        self._outputs, self._options = [*states, *outputs.names], outputs.options

    def initial_state(self, batch: int = 1) -> State:
        """Zeros."""
        return tuple(np.zeros((batch, *shape), np.float32) for shape in self._shapes)

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        """Read (batch, samples) -> (batch, frames, columns), new state."""
        inputs = {f"state_{i}": part for i, part in enumerate(state)}
        inputs |= {"audio": audio, "flush": _FLUSH if flush else _GO_ON}
        results = self._session.run(self._outputs, inputs, self._options)
        states = len(self._shapes)
        return side_by_side(results[states:]), tuple(np.asarray(part) for part in results[:states])


def side_by_side(outputs: Sequence[Any]) -> np.ndarray:
    """What is written for tokens, and for what else was asked for, (batch, frames, columns)."""
    return np.asarray(outputs[0]) if len(outputs) == 1 else np.concatenate(outputs, axis=-1)
