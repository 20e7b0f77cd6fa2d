"""The picture in docs/live.md: one recording, and the segments that each endpoint rule makes of it.

python -m pipelines.endpoint_picture docs/endpointing.svg
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from asr.audio import SAMPLE_RATE, read_audio
from asr.endpoint import EndpointConfig
from asr.recognizer import Recognizer

SAMPLES = Path(__file__).parents[1] / "scripts" / "samples" / "audio"
ROWS = {
    "energy alone: vad=energy, blanks=false": EndpointConfig(blanks=False),
    "energy and the network's blanks, the default: noise ends a segment too": EndpointConfig(),
    "vad=silero": EndpointConfig(vad="silero"),
    "reset=true: the network starts anew after every pause": EndpointConfig(reset=True),
    "trailing_silence=1.6: short pauses end nothing": EndpointConfig(trailing_silence=1.6),
    "leading_silence=2: after silence, segments begin closer to the words": EndpointConfig(leading_silence=2),
    "max_segment=3: the quietest 10 ms before the limit": EndpointConfig(max_segment=3),
}
_ENVELOPE = SAMPLE_RATE // 20  # samples to a line of the waveform


def conversation() -> tuple[np.ndarray, list[tuple[float, str]]]:
    """A recording with all kinds of pauses, and what sounds where: (second, label)."""
    rng = np.random.default_rng(7)

    def room(seconds: float) -> np.ndarray:
        return np.zeros(round(seconds * SAMPLE_RATE), np.float32)

    hammering = room(3.0)
    strokes = np.arange(len(hammering)) % (SAMPLE_RATE // 2) < SAMPLE_RATE // 6
    hammering[strokes] = rng.normal(0, 0.08, int(strokes.sum()))
    parts = [
        (room(0.5), ""), (read_audio(SAMPLES / "00000.flac"), ""), (room(1.2), "pause"),
        (read_audio(SAMPLES / "00003.flac"), ""), (hammering, "hammering"),
        (read_audio(SAMPLES / "00004.flac"), ""), (room(7.0), "long silence"),
        (read_audio(SAMPLES / "00006.flac"), ""), (room(1.5), ""),
    ]  # fmt: skip
    ends = np.cumsum([len(audio) for audio, _ in parts]) / SAMPLE_RATE
    labels = [
        (end - len(audio) / SAMPLE_RATE / 2, label) for (audio, label), end in zip(parts, ends, strict=True) if label
    ]
    audio = np.concatenate([audio for audio, _ in parts])
    return audio + rng.normal(0, 0.0005, len(audio)).astype(np.float32), labels


def draw(path: Path) -> None:
    """Write the picture, in the format that the path's suffix names.

    Raises:
        ConfigError: silero's network is not installed (extra [vad]).
    """
    recognizer = Recognizer.load(decoding="greedy")
    audio, labels = conversation()
    seconds = np.arange(len(audio) // _ENVELOPE) * _ENVELOPE / SAMPLE_RATE
    loudest = np.abs(audio[: len(seconds) * _ENVELOPE]).reshape(-1, _ENVELOPE).max(axis=1)
    plt.rcParams |= {"svg.hashsalt": "endpointing", "svg.fonttype": "none"}  # small, and the same file every time
    figure, axes = plt.subplots(len(ROWS), 1, figsize=(11, 1.25 * len(ROWS)), sharex=True, layout="constrained")
    for axis, (title, rules) in zip(axes, ROWS.items(), strict=True):
        session = recognizer.stream(endpoint=rules)
        session.feed(audio)
        axis.fill_between(seconds, -loudest, loudest, color="0.55", linewidth=0)
        for number, segment in enumerate(session.finish().segments):
            axis.axvspan(segment.start, segment.end, color=("tab:blue", "tab:orange")[number % 2], alpha=0.25, lw=0)
            axis.text(segment.start + 0.1, 0.72, segment.text, fontsize=8, clip_on=True)
        axis.set_title(title, loc="left", fontsize=9)
        axis.set(ylim=(-1.0, 1.1), yticks=[], xlim=(0, len(audio) / SAMPLE_RATE))
    for second, label in labels:
        axes[0].text(second, -0.9, label, ha="center", fontsize=8, style="italic")
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
