"""Sections "exactness" and "stream": reading in blocks against whole, and what one live stream costs. One core."""

import subprocess
import sys
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.config import FeatureConfig
from asr.features import LogMel
from asr.models import load_network
from asr.recognizer import Recognizer
from asr.runtime import StreamingEngine, load_engine
from asr.runtime.reader import usual_block
from pipelines.bench.figures import Figure, interleaved, single
from pipelines.bench.limits import lstm_stack, measured, work_of
from pipelines.bench.setting import Setting

_SECONDS = 8.0
# A process that only recognizes: its memory with the model, and with 200 streams that have heard a second each.
_MEMORY = """
import sys, numpy, asr
from pathlib import Path
def megabytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
recognizer = asr.load(sys.argv[1])
second = numpy.zeros(16000, "float32")
sessions = [recognizer.stream()]
sessions[0].feed(second)
one = megabytes()
for _ in range(200):
    sessions.append(recognizer.stream())
    sessions[-1].feed(second)
print(one, (megabytes() - one) / 200)
"""


def exactness(setting: Setting) -> list[Figure]:
    """Largest differences between reading whole and in blocks of 160 ms, and how many texts differ."""
    folder = setting.network("streaming")
    network, features = load_network(folder), LogMel(FeatureConfig())
    edge = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
    largest = {"features": 0.0, "log-probabilities": 0.0}
    with torch.no_grad():
        for samples in setting.speech:
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
    recognizer = Recognizer.load(folder.parent, decoding="greedy")
    differing = 0
    for samples in setting.speech:
        live = recognizer.stream()
        for start in range(0, len(samples), 777):
            live.feed(samples[start : start + 777])
        differing += live.finish().text != recognizer.transcribe(samples, network="streaming").text
    section = "streaming against whole"
    figures = [single(section, f"{name}, largest difference", value, "") for name, value in largest.items()]
    return [*figures, single(section, "texts that differ, live against file", differing, f"of {len(setting.speech)}")]


def run(setting: Setting) -> list[Figure]:
    """Microseconds a frame, in blocks of one frame and of as many as a session reads at a time; memory."""
    folder = setting.network("streaming")
    network = load_network(folder).requires_grad_(False)
    frame, limits = network.stride, measured(1)[0]
    block = usual_block(frame) * frame
    one, more = (f"{1000 * size / SAMPLE_RATE:g} ms" for size in (frame, block))
    samples = np.resize(np.concatenate(setting.speech), int(_SECONDS * SAMPLE_RATE) // block * block)
    frames = len(samples) // frame
    tensor = torch.from_numpy(samples)[None]
    engine = cast(StreamingEngine, load_engine(folder))
    recognizer = Recognizer.load(folder.parent, decoding="greedy", endpoint=None)
    lstms = lstm_stack(network)

    def stepping_lstms() -> None:
        """The recurrent layers alone, frame by frame: what many a tutorial does."""
        states: list = [None] * len(lstms)
        first = torch.zeros(1, 1, lstms[0].input_size)
        for _ in range(frames):
            x = first
            for i, lstm in enumerate(lstms):
                x, states[i] = lstm(x, states[i])

    def stepping(size: int) -> None:
        state = network.initial_state(1)
        for start in range(0, len(samples), size):
            _, state = network.step(tensor[:, start : start + size], state)

    def graph(size: int) -> None:
        state = engine.initial_state(1)
        for start in range(0, len(samples), size):
            _, state = engine.step(samples[None, start : start + size], state)

    def session(size: int) -> None:
        live = recognizer.stream()
        for start in range(0, len(samples), size):
            live.feed(samples[start : start + size])

    precision = setting.precision("streaming")
    parts: dict[str, tuple[Callable[[], object], str, int]] = {}  # each with its precision, and frames to a block
    if lstms:
        parts["stepping torch.nn.LSTM, its layers alone"] = (stepping_lstms, "fp32", 1)
    parts |= {
        f"stepping PyTorch, whole network, {one} blocks": (lambda: stepping(frame), "fp32", 1),
        f"stepping PyTorch, whole network, {more} blocks": (lambda: stepping(block), "fp32", block // frame),
        f"the graph alone, {one} blocks": (lambda: graph(frame), precision, 1),
        f"the graph alone, {more} blocks": (lambda: graph(block), precision, block // frame),
        f"a session, fed {one} at a time": (lambda: session(frame), precision, block // frame),
        f"a session, fed {more} at a time": (lambda: session(block), precision, block // frame),
    }
    work, seconds = work_of(network), len(samples) / SAMPLE_RATE
    least = {
        name: seconds * work.seconds_alone(limits, computed_in, SAMPLE_RATE / frame, together)
        for name, (_, computed_in, together) in parts.items()
    }
    timed = {name: part for name, (part, _, _) in parts.items()}
    section = f"one live stream, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M weights, {precision}"
    with torch.no_grad():
        unit = f"us a frame of {one}"
        figures = interleaved(section, unit, frames, timed, setting.rounds, per=True, ideal=least)
    return [*figures, *_memory(section, setting)]


def _memory(section: str, setting: Setting) -> list[Figure]:
    command = [sys.executable, "-c", _MEMORY, str(setting.network("streaming").parent)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    if told.returncode:  # on a system without /proc, for one
        setting.tell(f"memory of streams: {(told.stderr.strip() or 'failed').splitlines()[-1]}")
        return []
    one, each = map(float, told.stdout.split())
    return [
        single(section, "memory of a process with one stream", one, "MB"),
        single(section, "memory of each stream more, after a second", each, "MB"),
    ]
