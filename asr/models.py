"""The networks: an offline BiLSTM and a streaming LSTM, from samples to log-probabilities of tokens."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from asr.config import NetworkConfig, from_dict, read_toml, to_toml
from asr.errors import ModelError
from asr.features import LogMel
from asr.files import replacing_folder
from asr.nn import (
    LSTM,
    BiLSTM,
    Chain,
    LookAhead,
    Normalise,
    RunningNormalise,
    SelfAttention,
    State,
    StreamingLayer,
    StridedConvolution,
    UtteranceNormalise,
    stacked,
)
from asr.nn.layer import valid
from asr.nn.transducer import Transducer
from asr.runtime.folder import (
    FORMAT_VERSION,
    PREDICTION_FILE,
    WEIGHTS_FILE,
    read_phones,
    read_priors,
    write_priors,
)
from asr.text import Tokenizer
from asr.weights import read_weights, save_weights


class Output(StreamingLayer):
    """A linear layer and log-softmax: (batch, time, size) -> log-probabilities (batch, time, tokens + phones + joint).

    Those of the tokens come first, those of the phones, where there are any, behind them: two distributions. The
    encoder's share of a transducer's joint (asr.nn.transducer), which is linear, comes last.
    """

    def __init__(self, size: int, tokens: int, phones: int = 0, joint: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(size, tokens)
        self.phones = nn.Linear(size, phones) if phones else None
        self.joint = nn.Linear(size, joint) if joint else None
        self.size = tokens + phones + joint

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._log_probs(x), lengths

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        return self._log_probs(x), state

    def _log_probs(self, x: Tensor) -> Tensor:
        outputs = [self.linear] if self.phones is None else [self.linear, self.phones]
        logits = [output(x) for output in outputs]
        dtype = torch.promote_types(logits[0].dtype, torch.float32)
        parts = [each.log_softmax(-1, dtype=dtype) for each in logits]
        if self.joint is not None:
            parts.append(self.joint(x).to(dtype))
        return torch.cat(parts, dim=-1)

    def _nothing(self, batch_size: int) -> Tensor:
        return self.linear.weight.new_zeros(batch_size, 0, self.size)


class Network(Chain):
    """Samples -> log-mel -> strided convolutions -> recurrent layers -> token log-probabilities.

    `forward` takes audio (batch, samples) and lengths (batch,) in samples, edge silence included, and gives
    log-probabilities (batch, samples // stride, tokens), blank first, with their lengths; with `model.phone_output`
    those of the phones, their blank first, come behind the tokens', and with `model.prediction` the encoder's share of
    the transducer's joint behind both. A streaming network also has `initial_state`, `step` and `finish`
    (asr.nn.StreamingLayer).

    Args:
        config: features and layers.
        tokenizer: the vocabulary.
        mean, variance: of the features, (bands,).
        phones: names of the auxiliary phone targets, blank first; empty without them.
        states: how many phone states are frame-wise targets beside the phones (asr.training.align); 0 without them.

    Attributes:
        log_priors: the natural logarithm of the mean probability of each token, and phone, over speech, (tokens +
            phones,), which a beam search takes off (asr.decoding.beam); None where it was not measured.
    """

    def __init__(
        self,
        config: NetworkConfig,
        tokenizer: Tokenizer,
        mean: Tensor,
        variance: Tensor,
        phones: tuple[str, ...] = (),
        states: int = 0,
    ) -> None:
        model = config.model
        normalise = Normalise(mean, variance)
        if model.utterance_norm:
            frames = model.utterance_norm * 1000 / config.features.hop_ms
            if model.bidirectional:
                normalise = UtteranceNormalise(mean, variance, frames, math.prod(model.strides))
            else:
                normalise = RunningNormalise(mean, variance, frames)
        layers: list[StreamingLayer] = [LogMel(config.features), normalise]
        size = config.features.bands
        for channels, kernel, stride in zip(model.channels, model.kernels, model.strides, strict=True):
            layers.append(StridedConvolution(size, channels, kernel, stride))
            size = channels
        self.first_recurrent = len(layers)
        for _ in range(model.layers):
            starts: Any = {"forget_bias": model.forget_bias, "longest_memory": model.chrono_frames}
            if model.cell == "lstm" and not (model.residual or model.variational_dropout or model.zoneout):
                layers.append((BiLSTM if model.bidirectional else LSTM)(size, model.hidden, model.dropout, **starts))
                size = model.hidden * (2 if model.bidirectional else 1)
            else:
                layer = stacked(
                    model.cell, size, model.hidden, bidirectional=model.bidirectional, dropout=model.dropout,
                    residual=model.residual, variational_dropout=model.variational_dropout, zoneout=model.zoneout,
                    **starts,
                )  # fmt: skip
                layers.append(layer)
                size = layer.output_size
        if model.attention:
            layers.append(SelfAttention(size, model.attention, both=model.bidirectional))
        if model.look_ahead:
            layers.append(LookAhead(size, model.look_ahead))
        layers.append(Output(size, len(tokenizer), len(phones) if model.phone_output else 0, model.prediction))
        super().__init__(layers)
        self.config, self.tokenizer, self.phones = config, tokenizer, phones
        self.log_priors: np.ndarray | None = None
        self.phone_count = len(phones) if model.phone_output else 0  # columns behind those of the tokens
        self.phone_output = Output(size, len(phones)) if model.phone_layer and phones else None
        self.state_output = Output(size, states) if model.phone_layer and states else None
        self.joint_size = model.prediction  # columns behind those of the phones
        self.transducer = Transducer(len(tokenizer), model.prediction, model.dropout) if model.prediction else None

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        features, frames = self.normalised_features(x, lengths)
        for layer in self._each()[2:]:
            features, frames = layer(features, frames)
        return features, frames

    def normalised_features(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Audio (batch, samples), lengths -> features (batch, frames, bands) of mean 0 and variance 1, lengths."""
        log_mel, normalise = self._each()[:2]
        audio = torch.where(valid(lengths, audio.shape[1]), audio, 0.0)
        return normalise(*log_mel(audio, lengths))

    def read_features(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Features -> token log-probabilities, lengths, and those of its other outputs by name.

        "phones" and "states" are read off the phone layer, "final phones" and "joint", the encoder's share of the
        transducer's, come beside the tokens.
        """
        auxiliary = {}
        phone_layer = self.first_recurrent + self.config.model.phone_layer - 1
        for i, layer in enumerate(self._each()[2:], start=2):
            x, lengths = layer(x, lengths)
            if i == phone_layer:
                heads = {"phones": self.phone_output, "states": self.state_output}
                auxiliary = {name: head(x, lengths)[0] for name, head in heads.items() if head is not None}
        tokens = len(self.tokenizer)
        if self.phone_count:
            auxiliary["final phones"] = x[..., tokens : tokens + self.phone_count]
        if self.joint_size:
            auxiliary["joint"] = x[..., -self.joint_size :]
        return x[..., :tokens], lengths, auxiliary


def save_network(network: Network, folder: str | Path) -> None:
    """Write config.toml, tokens.txt, weights.safetensors and what else it has into `folder`, replacing it whole.

    Of a transducer, the prediction network is also written by itself, for those who recognize without torch.
    """
    weights = {name: value.detach().cpu().contiguous() for name, value in network.state_dict().items()}
    with replacing_folder(Path(folder)) as temporary:
        (temporary / "config.toml").write_text(to_toml(network.config), encoding="utf-8")
        network.tokenizer.save(temporary / "tokens.txt")
        if network.phones:
            (temporary / "phones.txt").write_text("\n".join(network.phones) + "\n", encoding="utf-8")
        if network.log_priors is not None:
            write_priors(temporary, network.log_priors)
        save_weights(weights, temporary / WEIGHTS_FILE)
        if network.transducer is not None:
            np.savez(temporary / PREDICTION_FILE, allow_pickle=False, **network.transducer.arrays())


def load_network(folder: str | Path, *, dithered: bool = False) -> Network:
    """Read a network folder: the module in evaluation mode, float32; `dithered` as of asr.weights.read_weights.

    Raises:
        ModelError: a file is missing, unreadable, or does not fit the configuration.
    """
    folder = Path(folder)
    for name in ("config.toml", "tokens.txt", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: {name} is missing; the model is incomplete")
    values = read_toml(folder / "config.toml")
    if values.get("format_version") != FORMAT_VERSION:
        raise ModelError(
            f"{folder}: format version {values.get('format_version')}, this program reads {FORMAT_VERSION}"
        )
    config = from_dict(NetworkConfig, values, where=str(folder / "config.toml"))
    tokenizer = Tokenizer.load(folder / "tokens.txt")
    names = tuple(read_phones(folder))
    bands = torch.zeros(config.features.bands)
    try:
        weights = read_weights(folder / WEIGHTS_FILE, dithered=dithered)
        states = len(weights.get("state_output.linear.bias", ()))
        network = Network(config, tokenizer, bands, bands, names, states)
        network.load_state_dict(weights)
    except ModelError:
        raise
    except Exception as error:  # safetensors raises its own kinds, torch RuntimeError
        raise ModelError(f"{folder}/{WEIGHTS_FILE}: {str(error).splitlines()[0]}") from error
    network.log_priors = read_priors(folder)
    return network.eval()
