"""What runs a trained network: one interface, two engines."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from asr.errors import ConfigError, ModelError

State = tuple[np.ndarray, ...]  # batch first, constant shapes, zero at the start of a stream


class OfflineEngine(Protocol):
    """Reads whole utterances at 16 kHz, their edge silence included.

    Attributes:
        samples_per_frame: samples to one output frame.
        vocab_size: tokens, the blank first.
        phone_count: phones, their blank first, whose log-probabilities come behind the tokens'; 0: none do.
        joint_size: units of a transducer's joint, the encoder's share of which comes last; 0: it does not.
    """

    samples_per_frame: int
    vocab_size: int
    phone_count: int
    joint_size: int

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float32 (samples,) each -> float32 (samples // samples_per_frame, columns) each.

        Columns: log-probabilities of vocab_size tokens and phone_count phones, then joint_size of the joint.
        """
        ...


class StreamingEngine(Protocol):
    """Reads streams at 16 kHz in pieces, many in a batch; several threads may share one engine.

    Attributes:
        samples_per_frame: samples to one output frame.
        latency_frames: output lags by so many frames: the first ones of a stream are void, and after the last
            samples one step over so many frames of zeros with `flush` gives what is still held.
        vocab_size: tokens, the blank first.
        phone_count: phones, their blank first, whose log-probabilities come behind the tokens'; 0: none do.
        joint_size: units of a transducer's joint, the encoder's share of which comes last; 0: it does not.
    """

    samples_per_frame: int
    latency_frames: int
    vocab_size: int
    phone_count: int
    joint_size: int

    def initial_state(self, batch: int = 1) -> State:
        """The state at the start of `batch` streams."""
        ...

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        """Read float32 (batch, samples), samples a multiple of samples_per_frame above 0.

        Returns:
            (batch, samples // samples_per_frame, columns), with columns as in OfflineEngine.log_probs, and the new
            state; the one that went in is unchanged.
        """
        ...


def load_engine(
    network_dir: str | Path,
    *,
    engine: str = "onnx",
    precision: str | None = None,
    threads: int = 1,
    phones: bool = False,
    joint: bool = False,
) -> OfflineEngine | StreamingEngine:
    """Open one network of a model.

    Args:
        network_dir: MODEL/offline or MODEL/streaming.
        engine: "onnx" (ONNX Runtime) or "torch" (PyTorch, the reference; on a GPU where there is one).
        precision: "fp32" or "int8"; None: what the engine does best with what is there (ONNX Runtime: int8
            before fp32; PyTorch: always fp32).
        threads: for the arithmetic of one call.
        phones: whether log-probabilities of phones come behind those of the tokens, where the network has them.
        joint: whether the encoder's share of the transducer's joint comes behind both, where it has one.

    Raises:
        ModelError: the network cannot be opened so; the message says what is missing.
        ConfigError: no such engine or precision.
    """
    check_choice(engine=engine, precision=precision, threads=threads)
    network_dir = Path(network_dir)
    if engine == "torch":
        try:
            import torch  # noqa: F401
        except ImportError:
            raise ModelError("the engine torch needs PyTorch: pip install 'streaming-asr[train]'") from None
        from asr.runtime.torch import open_network

        return open_network(network_dir, threads=threads, phones=phones, joint=joint)
    from asr.runtime.folder import find_graph
    from asr.runtime.onnx import open_graph

    return open_graph(find_graph(network_dir, precision), threads=threads, phones=phones, joint=joint)


def check_choice(*, engine: str, precision: str | None, threads: int) -> None:
    """Refuse what `load_engine` cannot do.

    Raises:
        ConfigError: names the value and what is allowed.
    """
    if engine not in ("onnx", "torch"):
        raise ConfigError(f"engine = {engine!r}: must be onnx or torch")
    if precision not in ("fp32", "int8", None):
        raise ConfigError(f"precision = {precision!r}: must be fp32 or int8")
    if engine == "torch" and precision == "int8":
        raise ConfigError("precision = 'int8': the engine torch runs fp32 only")
    if threads < 1:
        raise ConfigError(f"threads = {threads!r}: must be at least 1")
