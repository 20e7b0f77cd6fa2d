"""Networks on PyTorch: the reference, and the engine on a GPU."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from asr.errors import AsrError, ModelError
from asr.models import Network, load_network
from asr.runtime import State


def open_network(
    network_dir: Path, *, threads: int = 1, phones: bool = False, joint: bool = False
) -> "TorchOffline | TorchStreaming":
    """Load a network from its weights; `threads` holds for all of torch in this process.

    With `phones` and `joint`, what asr.runtime.load_engine says comes behind the tokens, where it has them.

    Raises:
        ModelError: a file is missing, damaged or does not fit.
    """
    torch.set_num_threads(threads)
    try:
        network = load_network(network_dir)
    except ModelError:
        raise
    except AsrError as error:
        raise ModelError(f"{error}; the model is damaged") from error
    network.to("cuda" if torch.cuda.is_available() else "cpu").requires_grad_(False)
    kind = TorchOffline if network.config.model.kind == "offline" else TorchStreaming
    return kind(network, phones, joint)


class TorchOffline:
    """A whole-utterance network (see asr.runtime.OfflineEngine)."""

    def __init__(self, network: Network, phones: bool, joint: bool) -> None:
        self._network = network
        self.samples_per_frame = network.stride
        self.vocab_size = len(network.tokenizer)
        self.phone_count = network.phone_count if phones else 0
        self.joint_size = network.joint_size if joint else 0

    def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Float32 (samples,) each -> float32 (samples // samples_per_frame, columns) each."""
        if not batch:
            return []
        device = _device(self._network)
        lengths = torch.tensor([len(samples) for samples in batch])
        rows = [torch.from_numpy(samples) for samples in batch]
        audio = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        with torch.inference_mode():
            values, frames = self._network(audio.to(device), lengths.to(device))
        values = _chosen(values, self)
        return [row[:n] for row, n in zip(values.float().cpu().numpy(), frames.tolist(), strict=True)]


class TorchStreaming:
    """A network that reads streams (see asr.runtime.StreamingEngine)."""

    def __init__(self, network: Network, phones: bool, joint: bool) -> None:
        self._network = network
        self.samples_per_frame = network.stride
        self.latency_frames = network.latency
        self.vocab_size = len(network.tokenizer)
        self.phone_count = network.phone_count if phones else 0
        self.joint_size = network.joint_size if joint else 0

    def initial_state(self, batch: int = 1) -> State:
        """Zeros."""
        return tuple(part.cpu().numpy() for part in self._network.initial_state(batch))

    def step(self, audio: np.ndarray, state: State, flush: bool = False) -> tuple[np.ndarray, State]:
        """Read (batch, samples) -> (batch, frames, columns), new state."""
        device = _device(self._network)
        parts = tuple(torch.from_numpy(part).to(device) for part in state)
        with torch.inference_mode():
            if flush:
                values, _ = self._network.finish(parts)
            else:
                values, parts = self._network.step(torch.from_numpy(audio).to(device), parts)
        values = _lagging(_chosen(values, self), audio.shape[1] // self.samples_per_frame)
        return values.float().cpu().numpy(), tuple(part.cpu().numpy() for part in parts)


def _device(network: Network) -> torch.device:
    return next(network.parameters()).device


def _chosen(values: Tensor, engine: TorchOffline | TorchStreaming) -> Tensor:
    """Those columns of what the network writes, (batch, time, all), that the engine gives."""
    chosen = values[..., : engine.vocab_size + engine.phone_count]
    return torch.cat([chosen, values[..., -engine.joint_size :]], dim=-1) if engine.joint_size else chosen


def _lagging(values: Tensor, frames: int) -> Tensor:
    """Put the frames that the look-ahead holds back at a stream's start in front as void ones."""
    return torch.nn.functional.pad(values, (0, 0, frames - values.shape[1], 0))
