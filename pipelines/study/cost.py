"""What a cell costs: time and memory of a training step, and of one more frame of a long stream."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from asr.nn import CELLS, LSTM, Recurrent
from pipelines.study.baselines import HEADS, Transformer
from pipelines.study.plan import Decision, Row, Setting, Table, pick, verdict

FRAMES_PER_SECOND = 25  # of the networks' recurrent layers: 40 ms each
MINUTE, HOUR = 60 * FRAMES_PER_SECOND, 3600 * FRAMES_PER_SECOND


def run(*, what: str, **options: Any) -> dict[str, Any]:
    """ "training" or "stream": see those functions."""
    return {"training": training, "stream": stream}[what](**options)


def training(*, units: int, batch: int, frames: int, rounds: int) -> dict[str, Any]:
    """Forward and backward of every cell, at equal width and at the LSTM's number of weights, timed in turn.

    Each runs twice: on torch's kernel where there is one, and as the plain loop over its equations, in which all
    cells are written alike. Input and output are as wide as the cell.

    Returns:
        `cells`: for each cell, width and kernel: weights, milliseconds forward and backward (medians of the
        rounds), and megabytes kept from forward for backward.
    """
    wanted = _weights(CELLS["lstm"](units, units))
    parts = []
    for name, kind in CELLS.items():
        equal = equal_width(lambda width, kind=kind: _weights(kind(width, width)), wanted, step=2)
        for match, width in (("width", units), ("weights", equal)):
            for kernel in ("torch", "loop"):
                cell = kind(width, width)
                if kernel == "loop":
                    cell.fast = None
                elif cell.fast is None:
                    continue
                x = torch.randn(batch, frames, width, requires_grad=True)
                told = {"cell": name, "match": match, "kernel": kernel, "units": width, "weights": _weights(cell)}
                parts.append((told, Recurrent(cell), x))
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in parts]
    for i in range(rounds + 1):
        for (_, layer, x), (ahead, back) in zip(parts, times, strict=True):
            clock = time.process_time()
            y, _ = layer.step(x, layer.initial_state(batch))
            middle = time.process_time()
            y.sum().backward()
            if i:  # the first round warms up
                ahead.append(1e3 * (middle - clock))
                back.append(1e3 * (time.process_time() - middle))
    cells = []
    for (told, layer, x), (ahead, back) in zip(parts, times, strict=True):
        kept = kept_for_backward(lambda layer=layer, x=x: layer.step(x, layer.initial_state(batch))[0])
        cells.append(
            {**told, "forward": statistics.median(ahead), "backward": statistics.median(back), "kept": kept / 1e6}
        )
    return {"cells": cells}


def kept_for_backward(forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that a forward pass keeps for the backward pass, weights included."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = forward()  # noqa: F841 (holds the graph, so that no address is used twice)
    return sum(kept.values())


@torch.no_grad()
def stream(*, units: int, layers: int, rounds: int) -> dict[str, Any]:
    """One more frame after a minute and after an hour: LSTM layers, and a causal Transformer of as many weights.

    Both in PyTorch on one thread. The Transformer's cache is made before, so no frame pays for its growth.

    Returns:
        `weights` of both, `state` in bytes and `frame` in milliseconds (median), each by network and frames so far.
    """
    lstm = [LSTM(units, units, 0.0).eval() for _ in range(layers)]
    wanted = sum(map(_weights, lstm))
    size = equal_width(lambda size: _weights(Transformer(units, size, layers, 0.0)), wanted, step=HEADS)
    transformer = Transformer(units, size, layers, 0.0).eval()
    x = torch.randn(1, 1, units)
    state: dict[str, dict[str, int]] = {"lstm": {}, "transformer": {}}
    frame: dict[str, dict[str, float]] = {"lstm": {}, "transformer": {}}
    for seen in (MINUTE, HOUR):
        cache = transformer.cache(1, seen + 1)
        for keys, values in cache:
            keys.normal_()
            values.normal_()
        memory = [layer.initial_state(1) for layer in lstm]

        def step_lstm(memory: Sequence[tuple[Tensor, ...]] = memory) -> None:
            y = x
            for layer, held in zip(lstm, memory, strict=True):
                y, _ = layer.step(y, held)

        def step_transformer(cache: list[tuple[Tensor, Tensor]] = cache, seen: int = seen) -> None:
            transformer.one(x, cache, seen)

        times: dict[str, list[float]] = {"lstm": [], "transformer": []}
        for name, step in (("lstm", step_lstm), ("transformer", step_transformer)):  # not in turn: an hour of keys
            for i in range(rounds + 2):  # and values drives the LSTM's weights out of the processor's caches
                clock = time.process_time()
                step()
                if i > 1:
                    times[name].append(1e3 * (time.process_time() - clock))
        held = {"lstm": memory, "transformer": cache}
        for name, spent in times.items():
            frame[name][str(seen)] = statistics.median(spent)
            state[name][str(seen)] = sum(part.nbytes for parts in held[name] for part in parts)
    return {"weights": {"lstm": wanted, "transformer": _weights(transformer)}, "state": state, "frame": frame}


def _weights(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def equal_width(weights: Callable[[int], int], wanted: int, step: int = 1) -> int:
    """The width, a multiple of `step`, whose number of weights comes nearest to `wanted`."""
    width = step
    while weights(width) < wanted:
        width += step
    return min(width, max(width - step, step), key=lambda w: abs(weights(w) - wanted))


def settings(quick: bool) -> list[Setting]:
    """The timing of training steps."""
    options = {
        "what": "training",
        "units": 128,
        "batch": 8,
        "frames": 50 if quick else 200,
        "rounds": 5 if quick else 15,
    }
    return [Setting(name="cost-training", run="cost", options=options, alone=True)]


def stream_settings(quick: bool) -> list[Setting]:
    """The timing of one more frame."""
    options = {"what": "stream", "units": 64 if quick else 128, "layers": 2, "rounds": 31 if quick else 101}
    return [Setting(name="cost-stream", run="cost", options=options, alone=True)]


def decide(row: Row) -> list[Decision]:
    """The LSTM's cost against the plain RNN's and the GRU's."""

    def step(cell: str, kernel: str) -> float:
        (found,) = pick(row["cells"], cell=cell, kernel=kernel, match="width")
        return found["forward"] + found["backward"]

    rnn, gru = (
        {kernel: step("lstm", kernel) / step(cell, kernel) for kernel in ("torch", "loop")} for cell in ("rnn", "gru")
    )
    return [
        Decision(
            statement="an LSTM costs two to three times a plain RNN",
            verdict=verdict(all(1.75 <= ratio <= 3.25 for ratio in rnn.values())),
            rule="time forward and backward at equal width, by torch's kernels and by the same loop, is 2 to 3 "
            "times (1.75 to 3.25)",
            evidence=f"{rnn['torch']:.2f} times by torch's kernels, {rnn['loop']:.2f} in the loop; weights 4 : 1",
        ),
        Decision(
            statement="a GRU costs less than an LSTM",
            verdict=verdict(all(ratio > 1.05 for ratio in gru.values())),
            rule="time forward and backward at equal width is 5 % less or better, by torch's kernels and in the loop",
            evidence=f"LSTM over GRU {gru['torch']:.2f} by torch's kernels, {gru['loop']:.2f} in the loop; weights "
            "4 : 3",
        ),
    ]


def table(row: Row) -> Table:
    """Every cell's cost."""
    lines = [
        [c["cell"], c["match"], c["kernel"], str(c["units"]), f"{c['weights'] / 1000:.0f}", f"{c['forward']:.1f}",
         f"{c['backward']:.1f}", f"{c['kept']:.1f}"]
        for c in row["cells"]
    ]  # fmt: skip
    title = (
        f"A batch of {row['batch']} x {row['frames']} frames, one thread, processor time (median of {row['rounds']})"
    )
    head = ("cell", "equal", "kernel", "units", "weights, k", "forward, ms", "backward, ms", "kept for backward, MB")
    return Table(title=title, head=head, rows=lines)


def draw(time_axes: Axes, memory_axes: Axes, row: Row) -> None:
    """Time and memory of each cell, in the loop and by torch's kernel, at equal width."""
    names = list(CELLS)
    for kernel, shift in (("loop", 0.2), ("torch", -0.2)):
        found = {c["cell"]: c for c in pick(row["cells"], kernel=kernel, match="width")}
        at = [i + shift for i, name in enumerate(names) if name in found]
        kept = [found[name] for name in names if name in found]
        time_axes.barh(at, [c["forward"] + c["backward"] for c in kept], height=0.38, label=kernel)
        memory_axes.barh(at, [c["kept"] for c in kept], height=0.38, label=kernel)
    for axes, text in ((time_axes, "forward and backward, ms"), (memory_axes, "kept for backward, MB")):
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel(text)
    time_axes.legend(fontsize=8)


def stream_table(row: Row) -> Table:
    """State and cost of a frame."""
    lines = []
    for name in ("lstm", "transformer"):
        states = [f"{row['state'][name][str(n)] / 1e3:,.1f}" for n in (MINUTE, HOUR)]
        frames = [f"{row['frame'][name][str(n)]:.3f}" for n in (MINUTE, HOUR)]
        lines.append([name, f"{row['weights'][name] / 1000:.0f}", *states, *frames])
    head = (
        "layers",
        "weights, k",
        "state after a minute, kB",
        "after an hour, kB",
        "a frame after a minute, ms",
        "after an hour, ms",
    )
    return Table(
        title="One stream, one more frame of 40 ms, PyTorch on one thread, processor time (median)",
        head=head,
        rows=lines,
    )


def stream_figure() -> Figure:
    """An empty one, for two axes."""
    return Figure(figsize=(10, 3.6), layout="constrained")
