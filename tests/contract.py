"""The streaming contract's one checker: used on every layer, on the networks and wherever else frames stream."""

import random

import torch
from torch import Tensor

from asr.nn import StreamingLayer

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 31)


def check_streaming(layer: StreamingLayer, x: Tensor, *, tolerance: float, seed: int = 0) -> None:
    """Assert all that the contract promises of `layer` on x (batch >= 3, time, ...).

    Steps and finish joined equal forward for many chunkings; padding leaks nowhere, not even as NaN; a row alone equals
    the row in its batch; the state that went in is unchanged; interleaved streams don't touch each other; what
    comes after t + latency never changes the output up to t.
    """
    layer.eval()
    batch, time = x.shape[:2]
    full = torch.full((batch,), time)
    with torch.no_grad():
        whole, lengths = layer(x, full)
        assert lengths.tolist() == [time // layer.stride] * batch
        assert whole.shape[1] == time // layer.stride
        rng = random.Random(seed)
        chunkings = [
            [time],
            [1] * min(time, 40) + [time],
            [0, 1, 0, time // 2, 0, time, 0],
            [p * layer.stride for p in PRIMES] * (time // (sum(PRIMES) * layer.stride) + 1),
            [*(rng.randint(0, 4 * layer.stride) for _ in range(time // layer.stride)), time],
        ]
        for sizes in chunkings:
            _near(_stream(layer, x, sizes), whole, tolerance, f"chunks {sizes[:12]}")
        _check_padding(layer, x, whole, tolerance)
        _check_interleaving(layer, x, tolerance)
        _check_causality(layer, x, whole)


def check_whole(layer: StreamingLayer, x: Tensor, *, tolerance: float) -> None:
    """Assert what holds for a layer that reads whole utterances only: padding and company have no effect."""
    layer.eval()
    with torch.no_grad():
        whole, _ = layer(x, torch.full((x.shape[0],), x.shape[1]))
        _check_padding(layer, x, whole, tolerance, prefixes_agree=False)


def _stream(layer: StreamingLayer, x: Tensor, sizes: list[int]) -> Tensor:
    state = layer.initial_state(x.shape[0])
    shapes = [s.shape for s in state]
    outputs, start = [], 0
    for size in sizes:
        before = tuple(s.clone() for s in state)
        y, new = layer.step(x[:, start : start + size], state)
        assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True)), "step changed the state it was given"
        assert [s.shape for s in new] == shapes, "a state tensor changed its shape"
        outputs.append(y)
        state, start = new, start + size
    assert start >= x.shape[1], "the test's chunking is too short"
    y, lengths = layer.finish(state)
    assert not state or lengths.tolist() == [y.shape[1]] * x.shape[0]
    return torch.cat([*outputs, y], dim=1) if y.shape[1] else torch.cat(outputs, dim=1)


def _check_padding(
    layer: StreamingLayer, x: Tensor, whole: Tensor, tolerance: float, *, prefixes_agree: bool = True
) -> None:
    batch, time = x.shape[:2]
    lengths = torch.tensor([time - (time * i) // (batch + 1) for i in range(batch)])
    padded = x.clone()
    for i, n in enumerate(lengths):
        padded[i, n:] = float("nan")
    y, out = layer(padded, lengths)
    assert out.tolist() == (lengths // layer.stride).tolist()
    for i, n in enumerate(lengths):
        alone, _ = layer(x[i : i + 1, :n], n[None])
        m = int(out[i])
        _near(y[i : i + 1, :m], alone[:, :m], tolerance, f"row {i} of {n} frames in a padded batch")
        if prefixes_agree and m > layer.latency:
            _near(y[i, : m - layer.latency], whole[i, : m - layer.latency], tolerance, f"row {i}, shortened")


def _check_interleaving(layer: StreamingLayer, x: Tensor, tolerance: float) -> None:
    one, other = x[:1], x[1:2]
    half = x.shape[1] // 2
    expected = [_stream(layer, row, [half, x.shape[1]]) for row in (one, other)]
    states = [layer.initial_state(1), layer.initial_state(1)]
    outputs: list[list[Tensor]] = [[], []]
    for start, end in ((0, half), (half, x.shape[1])):
        for i, row in enumerate((one, other)):
            y, states[i] = layer.step(row[:, start:end], states[i])
            outputs[i].append(y)
    for i in range(2):
        y, _ = layer.finish(states[i])
        joined = torch.cat([*outputs[i], y], dim=1) if y.shape[1] else torch.cat(outputs[i], dim=1)
        _near(joined, expected[i], tolerance, "interleaved streams")


def _check_causality(layer: StreamingLayer, x: Tensor, whole: Tensor) -> None:
    for t in (0, whole.shape[1] // 2, whole.shape[1] - 1 - layer.latency):
        if t < 0:
            continue
        changed = x.clone()
        changed[:, (t + layer.latency + 1) * layer.stride :] = 1.0
        y, _ = layer(changed, torch.full((x.shape[0],), x.shape[1]))
        assert torch.equal(y[:, : t + 1], whole[:, : t + 1]), f"frame {t} depends on more than {layer.latency} to come"


def _near(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    if got.numel():
        difference = float((got - expected).abs().max())
        assert difference <= tolerance, f"{what}: differs by {difference:.3g}"
