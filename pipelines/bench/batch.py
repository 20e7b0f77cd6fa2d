"""Section "batch": FLAC files to text, by stage, against plain PyTorch eager with the same weights."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE, read_audio
from asr.decoding.greedy import GreedyDecoder
from asr.manifest import Utterance
from asr.models import Network, load_network
from asr.recognizer import Recognizer
from asr.runtime import load_engine
from pipelines.bench.figures import Figure, interleaved
from pipelines.bench.limits import measured, work_of
from pipelines.bench.setting import Setting
from pipelines.decoder import stop_decoder
from pipelines.predictions import recognize_rows

_LEAST_SECONDS = 120.0  # of audio in a round; recordings are repeated to make it up
_ROWS = 16  # in a batch of the network
_EDGE = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)


def run(setting: Setting) -> list[Figure]:
    """Audio seconds a second with `setting.threads` threads."""
    folder = setting.network("offline")
    network = load_network(folder).requires_grad_(False)
    recognizer = Recognizer.load(setting.model, decoding="greedy", threads=setting.threads, endpoint=None)
    engine = load_engine(folder, threads=setting.threads)
    limits, _ = measured(setting.threads)
    torch.set_num_threads(setting.threads)
    precision = setting.precision("offline")
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        rows = _as_flac(setting.speech, Path(temporary))
        seconds = sum(row.duration or 0.0 for row in rows)
        least = {form: work_of(network).seconds(limits, form) * seconds for form in ("fp32", "int8")}
        decoded = sorted((read_audio(row.audio) for row in rows), key=len)
        batches = [[np.concatenate([_EDGE, x, _EDGE]) for x in group] for group in _groups(decoded)]
        found = [x for batch in batches for x in engine.log_probs(batch)]  # type: ignore[union-attr]
        stages: dict[str, Callable[[], object]] = {
            "decoding FLAC, one thread": lambda: [read_audio(row.audio) for row in rows],
            "network and features, PyTorch eager fp32": lambda: [_eager(network, batch) for batch in batches],
            f"network and features, ONNX Runtime {precision}": lambda: [engine.log_probs(b) for b in batches],  # type: ignore[union-attr]
            "features of them, PyTorch": lambda: [network.normalised_features(*_padded(batch)) for batch in batches],
            "greedy search": lambda: [_search(log_probs) for log_probs in found],
        }
        shown = f"{len(rows)} files, {setting.threads} thread{'s' if setting.threads > 1 else ''}"
        ideal = dict(zip(list(stages)[1:3], (least["fp32"], least[precision]), strict=True))
        figures = interleaved(
            f"batch by stage, {shown}", "audio s a second", seconds, stages, setting.rounds, ideal=ideal
        )
        whole: dict[str, Callable[[], object]] = {
            "PyTorch eager fp32": lambda: _plain(network, rows),
            "ours": lambda: recognize_rows(recognizer, rows, "offline"),
        }
        figures += interleaved(
            f"batch from file to text, {shown}", "audio s a second", seconds, whole, setting.rounds,
            ideal={"PyTorch eager fp32": least["fp32"], "ours": least[precision]},
        )  # fmt: skip
    torch.set_num_threads(1)
    stop_decoder()
    return figures


def _as_flac(speech: Sequence[np.ndarray], folder: Path) -> list[Utterance]:
    """The recordings as FLAC files, each as often as makes up the time."""
    rows: list[Utterance] = []
    seconds = 0.0
    while seconds < _LEAST_SECONDS:
        for samples in speech:
            path = folder / f"{len(rows):04}.flac"
            soundfile.write(path, samples, SAMPLE_RATE)
            duration = len(samples) / SAMPLE_RATE
            rows.append(Utterance(id=path.stem, audio=str(path), text=None, duration=duration, where=str(path)))
            seconds += duration
    return rows


def _groups(audios: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    return [audios[i : i + _ROWS] for i in range(0, len(audios), _ROWS)]


def _padded(batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    tensors = [torch.from_numpy(x) for x in batch]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), torch.tensor([len(x) for x in batch])


def _eager(network: Network, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
    log_probs, frames = network(*_padded(batch))
    return [row[:n] for row, n in zip(log_probs.numpy(), frames.tolist(), strict=True)]


def _search(log_probs: np.ndarray) -> None:
    decoder = GreedyDecoder()
    decoder.accept(log_probs)
    decoder.finish()


def _plain(network: Network, rows: Sequence[Utterance]) -> None:
    """What a script would do: decode, sort by length, pad, run, take the best path."""
    for group in _groups(sorted((read_audio(row.audio) for row in rows), key=len)):
        for log_probs in _eager(network, [np.concatenate([_EDGE, x, _EDGE]) for x in group]):
            _search(log_probs)
