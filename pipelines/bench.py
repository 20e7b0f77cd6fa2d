"""`asr bench`: what recognition and training cost on this machine, each beside what it is compared with.

Everything that is compared runs interleaved in one process, round after round, so that a machine whose speed
drifts changes a ratio little. Figures are medians over the rounds.
"""

import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torchaudio
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE, read_audio
from asr.config import FeatureConfig
from asr.features import LogMel
from asr.models import Network, load_network
from asr.nn import BiLSTM
from asr.recognizer import Recognizer
from asr.runtime import StreamingEngine, load_engine
from asr.runtime.folder import find_networks
from asr.training.data import Batch
from asr.training.step import Losses, choose_precision

_BLOCK_FRAMES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured line: the median over the rounds with its extremes, and what it is compared with."""

    section: str
    name: str
    value: float
    low: float
    high: float
    unit: str
    ratio: float | None = None  # against the section's first line; above 1 is faster


def bench(audio: Sequence[Path], *, model: Path | None = None, rounds: int = 5, threads: int = 1) -> list[Figure]:
    """Measure features, training, one live stream and whole files, on the speech in `audio`.

    Raises:
        AudioError: a recording cannot be read.
        ModelError: the model lacks a network.
    """
    torch.set_num_threads(threads)
    speech = [read_audio(path) for path in audio]
    folders = find_networks(model)
    figures = [*_features(speech, rounds)]
    if "streaming" in folders:
        figures += _exactness(folders["streaming"], speech)
        figures += _one_stream(folders["streaming"], speech, rounds, threads)
    if "offline" in folders:
        figures += _whole_files(folders["offline"], speech, rounds, threads)
        figures += _training(load_network(folders["offline"]), rounds)
    return figures


def table(figures: Sequence[Figure]) -> Table:
    """The figures as a table for people."""
    shown = Table("what", "median", "lowest to highest", "unit", "times the first")
    section = ""
    for f in figures:
        if f.section != section:
            shown.add_section()
            shown.add_row(f"[bold]{f.section}[/bold]")
            section = f.section
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        shown.add_row(f.name, f"{f.value:,.4g}", f"{f.low:,.4g} to {f.high:,.4g}", f.unit, ratio)
    return shown


def report(figures: Sequence[Figure]) -> dict[str, Any]:
    """The figures and the machine, as JSON holds them."""
    return {
        "machine": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "figures": [dataclasses.asdict(f) for f in figures],
    }


def _interleaved(
    section: str, unit: str, work: float, parts: dict[str, Callable[[], object]], rounds: int, *, per: bool = False
) -> list[Figure]:
    """Time the parts in turn; `work` units of work in each: the figure is work a second, or with `per` us a unit."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for part in parts.values():
        part()  # warm-up
    for _ in range(rounds):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            times[name].append(time.perf_counter() - start)
    first = statistics.median(next(iter(times.values())))
    figures = []
    for name, seconds in times.items():
        values = sorted(s / work * 1e6 if per else work / s for s in seconds)
        ratio = first / statistics.median(seconds)
        figures.append(
            Figure(
                section=section,
                name=name,
                value=statistics.median(values),
                low=values[0],
                high=values[-1],
                unit=unit,
                ratio=ratio,
            )
        )
    return figures


def _features(speech: list[np.ndarray], rounds: int) -> list[Figure]:
    samples = torch.from_numpy(np.concatenate(speech))[None, : 20 * SAMPLE_RATE]
    seconds = samples.shape[1] / SAMPLE_RATE
    layer = LogMel(FeatureConfig())
    lengths = torch.tensor([samples.shape[1]])
    theirs = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80, center=False, norm="slaney", mel_scale="slaney"
    )

    def in_blocks(size: int) -> None:
        state = layer.initial_state(1)
        for start in range(0, samples.shape[1], size):
            _, state = layer.step(samples[:, start : start + size], state)

    parts: dict[str, Callable[[], object]] = {
        "torchaudio MelSpectrogram, whole": lambda: torch.log(theirs(samples) + 1e-7),
        "ours, whole": lambda: layer(samples, lengths),
        "ours, 160 ms blocks": lambda: in_blocks(2_560),
        "ours, 40 ms blocks": lambda: in_blocks(640),
    }
    with torch.no_grad():
        return _interleaved("features", "x real time", seconds, parts, rounds)


def _exactness(folder: Path, speech: list[np.ndarray]) -> list[Figure]:
    """Largest differences between reading whole and in blocks of 160 ms, and how many texts differ."""
    network, features = load_network(folder), LogMel(FeatureConfig())
    edge = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
    largest = {"features": 0.0, "log-probabilities": 0.0}
    with torch.no_grad():
        for samples in speech:
            audio = torch.from_numpy(np.concatenate([edge, samples, edge]))[None]
            for name, layer in (("features", features), ("log-probabilities", network)):
                whole, _ = layer(audio, torch.tensor([audio.shape[1]]))
                state, parts = layer.initial_state(1), []
                for start in range(0, audio.shape[1], 2_560):
                    y, state = layer.step(audio[:, start : start + 2_560], state)
                    parts.append(y)
                if layer.latency:
                    parts.append(layer.finish(state)[0])
                largest[name] = max(largest[name], float((torch.cat(parts, 1) - whole).abs().max()))
    recognizer = Recognizer.load(folder.parent)
    differing = 0
    for samples in speech:
        live = recognizer.stream()
        for start in range(0, len(samples), 777):
            live.feed(samples[start : start + 777])
        differing += live.finish().text != recognizer.transcribe(samples, network="streaming").text
    section = "streaming against whole"
    lines = [(f"{name}, largest difference", value, "") for name, value in largest.items()]
    lines.append(("texts that differ, live against file", float(differing), f"of {len(speech)}"))
    return [Figure(section=section, name=n, value=v, low=v, high=v, unit=u) for n, v, u in lines]


def _one_stream(folder: Path, speech: list[np.ndarray], rounds: int, threads: int) -> list[Figure]:
    network = load_network(folder)
    samples = np.concatenate(speech)[: 8 * SAMPLE_RATE]
    samples = samples[: len(samples) // 2_560 * 2_560]
    frames = len(samples) // network.stride
    recognizer = Recognizer.load(folder.parent, threads=threads, endpoint=None)
    engine = cast(StreamingEngine, load_engine(folder, threads=threads))
    block = _BLOCK_FRAMES * network.stride

    def session() -> None:
        live = recognizer.stream()
        for start in range(0, len(samples), block):
            live.feed(samples[start : start + block])

    def graph() -> None:
        state = engine.initial_state(1)
        for start in range(0, len(samples), block):
            _, state = engine.step(samples[None, start : start + block], state)

    def stepping() -> None:
        state = network.initial_state(1)
        tensor = torch.from_numpy(samples)[None]
        for start in range(0, len(samples), block):
            _, state = network.step(tensor[:, start : start + block], state)

    with torch.no_grad():
        return _interleaved(
            "one live stream, blocks of 160 ms", "us a frame of 40 ms", frames,
            {"stepping PyTorch": stepping, "the graph alone": graph, "a session": session}, rounds, per=True,
        )  # fmt: skip


def _whole_files(folder: Path, speech: list[np.ndarray], rounds: int, threads: int) -> list[Figure]:
    network = load_network(folder)
    recognizer = Recognizer.load(folder.parent, threads=threads, endpoint=None)
    edge = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
    padded = [torch.from_numpy(np.concatenate([edge, s, edge])) for s in speech]
    lengths = torch.tensor([len(p) for p in padded])
    batch = nn.utils.rnn.pad_sequence(padded, batch_first=True)
    with torch.no_grad():
        return _interleaved(
            f"whole utterances, {len(speech)} in a batch", "audio s a second", sum(map(len, speech)) / SAMPLE_RATE,
            {
                "PyTorch eager, network alone": lambda: network(batch, lengths),
                "recognizer, samples to text": lambda: recognizer.transcribe_batch(speech),
            },
            rounds,
        )  # fmt: skip


class _PackedBiLSTM(BiLSTM):
    """The same layer, with the same weights, by torch's own means for padded batches.

    Args:
        layer: whose weights are shared.
    """

    def __init__(self, layer: BiLSTM) -> None:
        nn.Module.__init__(self)
        self.norm, self.dropout = layer.norm, layer.dropout
        self.both = nn.LSTM(layer.ahead.input_size, layer.ahead.hidden_size, batch_first=True, bidirectional=True)
        ahead, back = layer.ahead.named_parameters(), layer.back.named_parameters()
        for name, value in [*ahead, *((f"{name}_reverse", value) for name, value in back)]:
            setattr(self.both, name, value)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.both(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.dropout(self.norm(y)), lengths


def _training(network: Network, rounds: int) -> list[Figure]:
    """Forward, backward and update of the offline network on a batch of 12 x 8 s, most rows a little shorter."""
    rows, seconds = 12, 8.0
    lengths = torch.tensor([int(seconds * SAMPLE_RATE * (1 - 0.02 * i)) for i in range(rows)])
    tokens = torch.randint(1, len(network.tokenizer), (rows, 100))
    longest = int(lengths.max())
    batch = Batch(
        audio=torch.randn(rows, longest) * 0.1, features=None, lengths=lengths, tokens=tokens,
        token_lengths=torch.full((rows,), 100), counts=torch.ones(rows, dtype=torch.bool),
        phones=torch.zeros(rows, 1, dtype=torch.long),
        phone_lengths=torch.zeros(rows, dtype=torch.long),
        hidden_frames=torch.zeros(rows, longest // 160, dtype=torch.bool),
        hidden_bands=torch.zeros(rows, network.config.features.bands, dtype=torch.bool),
        token_count=rows * 100, phone_count=0,
    )  # fmt: skip
    precision = choose_precision("auto", torch.device("cpu"))

    def step(network: Network, precision: str) -> Callable[[], None]:
        losses = Losses(network, 0.0, precision).train()
        optimizer = torch.optim.AdamW(network.parameters(), 1e-9)

        def run() -> None:
            losses(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    packed = copy.deepcopy(network)
    for i, layer in enumerate(packed.layers):
        if isinstance(layer, BiLSTM):
            packed.layers[i] = _PackedBiLSTM(layer)
    parts: dict[str, Callable[[], object]] = {
        "pack_padded_sequence, fp32": step(packed, "fp32"),
        "ours, fp32": step(network, "fp32"),
    }
    if precision == "bf16":
        parts["ours, bf16"] = step(network, "bf16")
    return _interleaved(
        "training, offline network", "audio s a second", float(lengths.sum()) / SAMPLE_RATE, parts, rounds
    )


def run_bench(audio: Sequence[Path], *, model: Path | None, rounds: int, threads: int, json_file: Path | None) -> None:
    """Measure, print the table, and write the JSON where it is asked for."""
    figures = bench(audio, model=model, rounds=rounds, threads=threads)
    Console().print(table(figures))
    if json_file is not None:
        from pipelines.formats import write_text

        write_text(json_file, json.dumps(report(figures), indent=1) + "\n")
