"""What a trained network does while it listens: the gates and cells of its layers, and where it looks for each word."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import TokenSpan, Word, words_from_tokens
from asr.decoding.greedy import GreedyDecoder
from asr.features import LogMel
from asr.models import Network
from asr.nn import LSTM, Bidirectional, BiLSTM, Recurrent, Stacked, State, StreamingLayer, cell_of

_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
_SILENT_DB = 30.0  # below the loudest frames; the quiet between words is at least so far below speech
_PITCH_HZ = (60, 400)  # of human voices
_WORDS_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What one recurrent layer did, in one direction.

    Attributes:
        number: 1 for the first recurrent layer.
        direction: "forwards" or "backwards" in time.
        keep: the name of the gate that keeps the memory; None in a cell without one.
        signals: by their names in the cell's equations (asr.nn.cells): float32 (frames, units). Gates lie in [0, 1].
        memory_ms: (units,) how long each unit remembers, from the gate that keeps (see `memory_ms`); else None.
    """

    number: int
    direction: str
    keep: str | None
    signals: dict[str, np.ndarray]
    memory_ms: np.ndarray | None


@dataclass(frozen=True, kw_only=True)
class Follower:
    """A unit whose memory goes along with something that has a name.

    Attributes:
        what: a name from `named_events`.
        layer, direction, unit: which one.
        correlation: Pearson's, of the unit's c (h where there is no c) with it over the frames.
        chance: what the most similar of all units reaches with the same thing moved in time, in 19 cases of 20.
    """

    what: str
    layer: int
    direction: str
    unit: int
    correlation: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a network did on one recording. Frame t of a signal spans start + t * frame ... start + (t + 1) * frame.

    Attributes:
        kind: "offline" or "streaming".
        cell: its name in a configuration.
        start: seconds of frame 0, negative: silence comes before a recording.
        frame: seconds to a frame of the recurrent layers.
        hop: seconds to a frame of the features.
        duration: of the recording, seconds.
        words: as the network writes them, greedily and uncut.
        features: log-mel energies (feature frames, bands), as they come from the audio.
        looks: for each word, how much its score changes with each feature frame: (words, feature frames), the
            Euclidean norm over the bands of the gradient of the summed log-probabilities of its tokens.
        layers: the first one first; of two directions forwards before backwards.
        events: what units are compared with, by name: (frames,).
        followers: of each event the units that follow it most, and more than by chance; the strongest first.
        live: the text as it grew: seconds of audio heard, text; empty where the recording was read whole.
    """

    kind: str
    cell: str
    start: float
    frame: float
    hop: float
    duration: float
    words: tuple[Word, ...]
    features: np.ndarray
    looks: np.ndarray
    layers: tuple[Layer, ...]
    events: dict[str, np.ndarray]
    followers: tuple[Follower, ...]
    live: tuple[tuple[float, str], ...]


def inspect(network: Network, samples: np.ndarray, *, block_frames: int | None = None) -> Inspection:
    """Run a network over a recording and keep what happens inside.

    The gates are computed from the trained weights by the cell's equations (asr.nn.cells).

    Args:
        samples: float32 (n,) at 16 kHz.
        block_frames: feed a streaming network in blocks of so many of its frames, as live audio comes; None: whole.
    """
    padded = np.concatenate([_EDGE, samples, _EDGE])
    padded = padded[: len(padded) // network.stride * network.stride]
    audio = torch.from_numpy(padded)[None]
    frame, duration = network.stride / SAMPLE_RATE, len(samples) / SAMPLE_RATE
    decoder, tokens = GreedyDecoder(), len(network.tokenizer)
    live: list[tuple[float, str]] = []
    recorder = _Recorder(network)
    with torch.no_grad():
        if block_frames is None:
            decoder.accept(_read_whole(network, audio, recorder)[:, :tokens].numpy())
        else:
            for heard, log_probs in _read_live(network, audio, block_frames * network.stride, recorder):
                decoder.accept(log_probs[:, :tokens].numpy())
                text = network.tokenizer.decode(span.token for span in decoder.tokens())
                live.append((heard / SAMPLE_RATE - EDGE_SILENCE_SECONDS, " ".join(text.split())))
        log_mel, _ = LogMel(network.config.features)(audio, torch.tensor([len(padded)]))
    spans = decoder.tokens()
    words = words_from_tokens(
        spans, network.tokenizer.tokens, start=0.0, end=duration, frame=frame, edge=EDGE_SILENCE_SECONDS
    )
    by_word = _spans_of_words(spans, network.tokenizer.tokens)
    layers = recorder.layers(frame)
    ends = [spans[-1].end_frame for spans in by_word]
    events = named_events(padded, network.stride, ends)
    return Inspection(
        kind=network.config.model.kind,
        cell=network.config.model.cell,
        start=-EDGE_SILENCE_SECONDS,
        frame=frame,
        hop=network.config.features.hop / SAMPLE_RATE,
        duration=duration,
        words=tuple(words),
        features=log_mel[0].numpy(),
        looks=_looks(network, audio, by_word),
        layers=layers,
        events=events,
        followers=tuple(find_followers(layers, events)),
        live=tuple(live),
    )


def is_gate(signal: str) -> bool:
    """Whether a signal lies in [0, 1]: the gates of asr.nn.cells."""
    return signal in ("f", "i", "o", "r", "z")


def loudness_range(features: np.ndarray) -> tuple[float, float]:
    """The lowest and highest log-mel energy to draw: 60 dB below the highest is black."""
    high = float(features.max())
    return max(float(features.min()), high - 60 / 10 * np.log(10)), high


def memory_ms(keep: np.ndarray, frame_ms: float) -> np.ndarray:
    """How long each unit remembers: the time in which c falls to 1/e while nothing enters, -frame / ln(mean gate).

    Args:
        keep: the gate that keeps the memory, (frames, units) in [0, 1].

    Returns:
        (units,) milliseconds; infinite where the gate never closes at all.
    """
    with np.errstate(divide="ignore"):
        return frame_ms / np.abs(np.log(keep.mean(axis=0, dtype=np.float64)))


def named_events(samples: np.ndarray, stride: int, word_ends: list[int]) -> dict[str, np.ndarray]:
    """What happens in a recording, frame by frame: (frames,) each; what never changes is left out.

    Args:
        samples: float32 (n,) at 16 kHz.
        stride: samples to a frame.
        word_ends: the frame after the last one of each word.

    Returns:
        silence: 1 where a frame is 30 dB or more below the loudest twentieth, else 0.
        voicing: how periodic a frame is at a voice's pitch, 0 to 1: its autocorrelation at the best lag.
        word ends: 1 from the last frame of a word to the one after the next, else 0.
        position: 0 at the start, 1 at the end.
    """
    frames = samples[: len(samples) // stride * stride].reshape(-1, stride).astype(np.float64)
    power = (frames**2).mean(axis=1)
    silence = 10 * np.log10(power + 1e-12) < 10 * np.log10(np.quantile(power, 0.95) + 1e-12) - _SILENT_DB
    spectra = np.fft.rfft(frames - frames.mean(axis=1, keepdims=True), 2 * stride)
    correlation = np.fft.irfft(np.abs(spectra) ** 2)[:, :stride]
    shortest, longest = (SAMPLE_RATE // hz for hz in _PITCH_HZ[::-1])
    lags = np.arange(shortest, min(longest, stride - 1))
    unbiased = correlation[:, lags] / (1 - lags / stride) / (correlation[:, :1] + 1e-9)
    ends = np.zeros(len(frames))
    for end in word_ends:
        ends[max(end - 1, 0) : end + 2] = 1.0
    events = {
        "silence": silence.astype(np.float64),
        "voicing": np.where(silence, 0.0, np.clip(unbiased.max(axis=1, initial=0.0), 0.0, 1.0)),
        "word ends": ends,
        "position": np.linspace(0.0, 1.0, len(frames)),
    }
    return {name: values for name, values in events.items() if len(values) and np.ptp(values) > 0}


def find_followers(layers: tuple[Layer, ...], events: dict[str, np.ndarray], most: int = 6) -> Iterator[Follower]:
    """The units that follow each event more than by chance, the strongest first, `most` of each event."""
    units = [(layer, unit) for layer in layers for unit in range(_memory(layer).shape[1])]
    values = _standardised(np.concatenate([_memory(layer) for layer in layers], axis=1))
    frames = len(values)
    spectra = np.fft.rfft(values, axis=0)
    for what, event in events.items():
        # the correlation of every unit with the event moved by 0, 1, ... frames, in a circle
        moved = np.fft.rfft(_standardised(event[:, None]), axis=0)
        correlations = np.fft.irfft(spectra * moved.conj(), frames, axis=0) / frames
        far = np.abs(correlations[frames // 10 + 1 : frames - frames // 10]).max(axis=1, initial=0.0)
        chance = float(np.quantile(far, 0.95)) if len(far) else 1.0
        here = correlations[0]
        for index in np.argsort(-np.abs(here))[:most].tolist():
            layer, unit = units[index]
            if abs(here[index]) > chance:
                yield Follower(
                    what=what, layer=layer.number, direction=layer.direction, unit=unit,
                    correlation=float(here[index]), chance=chance,
                )  # fmt: skip


def _memory(layer: Layer) -> np.ndarray:
    return layer.signals["c" if "c" in layer.signals else "h"]


def _standardised(values: np.ndarray) -> np.ndarray:
    """Each column with mean 0 and variance 1; a column that never changes is 0."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 1e-9, deviation, np.inf)


class _Recorder:
    """Collects what the cells of a network's recurrent layers compute, piece by piece."""

    def __init__(self, network: Network) -> None:
        self._directions = {i: found for i, layer in enumerate(network.layers) if (found := _directions(layer))}
        self._parts: dict[tuple[int, str], list[dict[str, Tensor]]] = {}

    def record(self, index: int, x: Tensor, state: State | None) -> None:
        """Take what layer `index` is about to read: x (1, time, size), after `state`, None at the start."""
        for direction, layer in self._directions.get(index, {}).items():
            backwards = direction == "backwards"
            if x.shape[1]:
                start = layer.initial_state(1) if state is None else state
                inside, _ = layer.inside(x.flip(1) if backwards else x, start)
                part = {name: (y.flip(1) if backwards else y)[0] for name, y in inside.items()}
                self._parts.setdefault((index, direction), []).append(part)

    def layers(self, frame: float) -> tuple[Layer, ...]:
        """What was recorded; `frame` in seconds."""
        made = []
        for number, (index, directions) in enumerate(self._directions.items(), start=1):
            for direction, layer in directions.items():
                parts = self._parts[index, direction]
                signals = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
                keep = layer.cell.keep
                lasting = None if keep is None else memory_ms(signals[keep], 1000 * frame)
                made.append(Layer(number=number, direction=direction, keep=keep, signals=signals, memory_ms=lasting))
        return tuple(made)


def _directions(layer: torch.nn.Module) -> dict[str, Recurrent]:
    """The cells of a recurrent layer, run by their equations, by direction; nothing of another layer."""
    match layer:
        case LSTM():
            return {"forwards": Recurrent(cell_of(layer.lstm)).eval()}
        case BiLSTM():
            ends = ("forwards", layer.ahead), ("backwards", layer.back)
            return {direction: Recurrent(cell_of(lstm)).eval() for direction, lstm in ends}
        case Stacked(layer=Recurrent() as one):
            return {"forwards": one}
        case Stacked(layer=Bidirectional() as both):
            return {"forwards": both.ahead, "backwards": both.back}
    return {}


def _read_whole(network: Network, audio: Tensor, recorder: _Recorder) -> Tensor:
    """Log-probabilities (frames, tokens) of audio (1, samples)."""
    x, lengths = audio, torch.tensor([audio.shape[1]])
    for index, layer in enumerate(_layers(network)):
        recorder.record(index, x, None)
        x, lengths = layer(x, lengths)
    return x[0]


def _read_live(network: Network, audio: Tensor, block: int, recorder: _Recorder) -> Iterator[tuple[int, Tensor]]:
    """Feed audio (1, samples) block by block: samples heard so far, the log-probabilities that they brought."""
    layers = _layers(network)
    states = [layer.initial_state(1) for layer in layers]
    for start in range(0, audio.shape[1], block):
        x = audio[:, start : start + block]
        heard = start + x.shape[1]
        for index, layer in enumerate(layers):
            recorder.record(index, x, states[index])
            x, states[index] = layer.step(x, states[index])
        yield heard, x[0]
    last, _ = network.finish(tuple(part for state in states for part in state))
    yield audio.shape[1], last[0]


def _layers(network: Network) -> list[StreamingLayer]:
    return list(network.layers)  # type: ignore[arg-type]


def _spans_of_words(spans: list[TokenSpan], tokens: tuple[str, ...]) -> list[list[TokenSpan]]:
    """The tokens of each word, without the spaces between them; words as words_from_tokens makes them."""
    words: list[list[TokenSpan]] = [[]]
    for span in spans:
        token = tokens[span.token]
        if token.startswith(" "):
            words.append([])
        if token.strip():
            words[-1].append(span)
        if token.endswith(" "):
            words.append([])
    return [word for word in words if word]


def _looks(network: Network, audio: Tensor, by_word: list[list[TokenSpan]]) -> np.ndarray:
    """The gradient of each word's score: (words, feature frames), its norm over the bands."""
    with torch.no_grad():
        features, frames = network.normalised_features(audio, torch.tensor([audio.shape[1]]))
    norms = [torch.zeros(0, features.shape[1])]
    for first in range(0, len(by_word), _WORDS_AT_ONCE):
        words = by_word[first : first + _WORDS_AT_ONCE]
        rows = features.repeat(len(words), 1, 1).requires_grad_()  # a word's score depends on its own row
        log_probs, _, _ = network.read_features(rows, frames.repeat(len(words)))
        tokens = [(i, span) for i, word in enumerate(words) for span in word]
        scores = [log_probs[i, span.start_frame : span.end_frame, span.token].sum() for i, span in tokens]
        (gradient,) = torch.autograd.grad(torch.stack(scores).sum(), rows)
        norms.append(gradient.norm(dim=2))
    return torch.cat(norms).numpy()
