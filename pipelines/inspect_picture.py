"""The picture of `asr inspect`: spectrogram, words, where the network looks, and its gates, on one time axis."""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from asr.inspect import Inspection, Layer, is_gate, loudness_range

if TYPE_CHECKING:
    from pipelines.inspect import Seen

_DRAWN = {
    "f": "forget gate f",
    "i": "input gate i",
    "o": "output gate o",
    "z": "update gate z",
    "r": "reset gate r",
    "c": "cell, tanh(c)",
    "h": "output h",
}
_LINES = 64  # of a heat map
_KEY = "Gates: dark is closed, bright is open. Cell: blue is negative, red positive. The longest memories are on top."
_ARROWS = {"forwards": "→", "backwards": "←"}


def draw(seen: Sequence["Seen"], path: Path) -> None:
    """Write a PNG with a column for each network; units with the longest memory are on top."""
    rows = max(2 + sum(len(_signals(layer)) for layer in one.inspection.layers) for one in seen)
    size = (11.0 if len(seen) == 1 else 8.0 * len(seen), 2.6 + 1.05 * (rows - 1))
    figure, grid = plt.subplots(
        rows, len(seen), figsize=size, squeeze=False, height_ratios=[1.5] + [1.0] * (rows - 1), layout="constrained"
    )
    for one, column in zip(seen, grid.T, strict=True):
        _column(one, list(column))
    figure.supxlabel(_KEY, fontsize=9)
    with warnings.catch_warnings(record=True) as told:
        figure.savefig(path, format="png", dpi=90, pil_kwargs={"optimize": True})
    if any("missing from font" in str(warning.message) for warning in told):
        print(
            f"{path}: the font of pictures lacks some letters of these words; a page (.html) has all", file=sys.stderr
        )
    plt.close(figure)


def _column(seen: "Seen", axes: list[Axes]) -> None:
    found = seen.inspection
    low, high = loudness_range(found.features)
    _heat(axes[0], found, found.features.T[::-1], found.hop, "inferno", (low, high))
    axes[0].set_title(f"{seen.recording} · {seen.name}", loc="left", fontsize=10, pad=20)
    _label(axes[0], "spectrogram")
    for word in found.words:
        middle = (word.start + word.end) / 2
        axes[0].annotate(
            word.text, (middle, 1.03), xycoords=("data", "axes fraction"), ha="center", annotation_clip=False
        )
    looks = found.looks / found.looks.max(axis=1, keepdims=True, initial=1e-30)
    _heat(axes[1], found, looks, found.hop, "inferno", (0.0, 1.0))
    _label(axes[1], "where it looks,\na row a word")
    rest = iter(axes[2:])
    for layer in found.layers:
        order = _memory_order(layer)
        for name in _signals(layer):
            values = layer.signals[name].T
            values = values[[unit for unit in order if unit < len(values)]]
            axis = next(rest)
            if is_gate(name):
                _heat(axis, found, values, found.frame, "viridis", (0.0, 1.0))
            else:
                _heat(axis, found, np.tanh(values) if name == "c" else values, found.frame, "RdBu_r", (-1.0, 1.0))
            _label(axis, f"layer {layer.number} {_ARROWS[layer.direction]}\n{_DRAWN[name]}")
    used = 2 + sum(len(_signals(layer)) for layer in found.layers)
    axes[used - 1].tick_params(labelbottom=True)
    axes[used - 1].set_xlabel("seconds")
    for axis in axes[used:]:
        axis.set_axis_off()


def _signals(layer: Layer) -> list[str]:
    """What is drawn of a layer: its gates, and the cell; the output where there is no cell."""
    memory = "c" if "c" in layer.signals else "h"
    return [name for name in _DRAWN if name in layer.signals and name not in {"c", "h"} - {memory}]


def _memory_order(layer: Layer) -> np.ndarray:
    """The units by their memory, the longest first; as they are numbered where no gate keeps it."""
    units = max(values.shape[1] for values in layer.signals.values())
    return np.arange(units) if layer.memory_ms is None else np.argsort(-layer.memory_ms, kind="stable")


def _heat(
    axis: Axes, found: Inspection, values: np.ndarray, step: float, colours: str, limits: tuple[float, float]
) -> None:
    """Values (rows, columns), a column each `step` seconds from the start, the first row on top.

    Of more rows than there is room for, each line is the mean of neighbours: blurring would blur time as well.
    """
    if len(values) > 2 * _LINES:
        values = np.stack([part.mean(axis=0) for part in np.array_split(values, _LINES)])
    end = found.start + step * values.shape[1]
    axis.imshow(
        values, extent=(found.start, end, 0, 1), aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1],
        interpolation="nearest",
    )  # fmt: skip
    axis.set_xlim(found.start, found.start + found.hop * len(found.features))
    axis.set_yticks([])
    axis.tick_params(labelbottom=False)
    for word in found.words:
        axis.axvline(word.start, color="white", alpha=0.35, linewidth=0.8)


def _label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, rotation=0, ha="right", va="center")
