"""Greedy transducer decoding: at each frame the likeliest next token, given all that were written before."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from asr.decoding import Best, Decoder, Hypothesis, TokenSpan
from asr.decoding.lstm import lstm_step
from asr.errors import ModelError

_BLANK = 0
_MOST = 4  # tokens on one frame: a network that finds no end must not hold up the stream
_EPSILON = 1e-5  # of the layer normalisation, as torch has it

Memory = tuple[np.ndarray, np.ndarray]  # of the prediction network's LSTM: h, c, (units,) each


class TransducerSearch:
    """The prediction network and the joint of a transducer, shared by all decoders; call it for a new one.

    Args:
        weights: those of asr.nn.transducer.Transducer.arrays, whose equations are computed here without torch.

    Attributes:
        units: of the prediction network and the joint.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]) -> None:
        names = ("tokens", "memory", "project", "project_bias", "output", "output_bias")
        arrays = (np.ascontiguousarray(weights[name], np.float32) for name in names)
        self._tokens, self._memory, self._project, self._project_bias, self._output, self._output_bias = arrays
        self.units = len(self._memory)

    @classmethod
    def load(cls, path: Path) -> "TransducerSearch":
        """Read the file of a network's folder.

        Raises:
            ModelError: it is damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls({name: file[name] for name in file.files})
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ModelError(f"{path}: not a readable prediction network, the model is damaged ({error})") from error

    def __call__(self) -> "TransducerDecoder":
        return TransducerDecoder(self)

    def start(self) -> tuple[np.ndarray, Memory]:
        """The prediction network's share of the joint before anything is written, (units,), and its memory then."""
        nothing = np.zeros(self.units, np.float32)
        return self.write(_BLANK, (nothing, nothing))

    def write(self, token: int, memory: Memory) -> tuple[np.ndarray, Memory]:
        """Its share of the joint after one token more, (units,), and its memory then."""
        h, c = memory
        h, c = lstm_step(self._tokens[token] + h @ self._memory, c)
        centred = h - h.mean()
        normalised = centred / np.sqrt((centred * centred).mean() + _EPSILON)
        return normalised @ self._project + self._project_bias, (h, c)

    def log_probs(self, encoder: np.ndarray, prediction: np.ndarray) -> np.ndarray:
        """Of the next token, (tokens,), from the two shares of the joint, (units,) each."""
        logits = np.tanh(encoder + prediction) @ self._output + self._output_bias
        logits -= logits.max()
        return logits - math.log(np.exp(logits).sum())


class TransducerDecoder:
    """Greedy search of one segment that continues across block borders (see asr.decoding.Decoder).

    The prediction network's memory is carried from token to token, so a block costs the same wherever it comes. What is
    written stays, and lies on the frame on which it was written. A frame of NaN says nothing.
    """

    weighs = False
    shared = ("_search",)  # not of the state that asr.snapshot keeps

    def __init__(self, search: TransducerSearch) -> None:
        self.written: list[TokenSpan] = []
        self._search = search
        self._share, self._memory = search.start()
        self._frames = 0
        self._score = 0.0  # log-probability of the path

    def accept(self, log_probs: np.ndarray, best: Best | None = None) -> None:
        """Take the next frames, (frames, tokens + units), also none: the encoder's share of the joint comes last."""
        for encoder in log_probs[:, -self._search.units :]:
            if not math.isnan(encoder[0]):
                self._read(encoder)
            self._frames += 1

    def _read(self, encoder: np.ndarray) -> None:
        for _ in range(_MOST):
            log_probs = self._search.log_probs(encoder, self._share)
            token = int(log_probs.argmax())
            value = float(log_probs[token])
            self._score += value
            if token == _BLANK:
                break
            self.written.append(TokenSpan(token, self._frames, self._frames + 1, min(math.exp(value), 1.0)))
            self._share, self._memory = self._search.write(token, self._memory)

    def pending(self) -> list[TokenSpan]:
        """None: nothing that was written changes."""
        return []

    def tokens(self) -> list[TokenSpan]:
        """The tokens so far."""
        return self.written.copy()

    def finish(self, again: np.ndarray | None = None, other: Decoder | None = None) -> list[Hypothesis]:
        """The tokens; their score is that of the best path."""
        return [Hypothesis(tuple(self.written), self._score)]

    def copy(self) -> "TransducerDecoder":
        """The decoder as it stands now."""
        other = TransducerDecoder(self._search)
        other.__dict__.update(self.__dict__ | {"written": self.written.copy()})
        return other
