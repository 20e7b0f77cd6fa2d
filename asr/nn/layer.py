"""The contract that everything streams on: a layer that reads a batch whole or in steps, alike."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]


def detach(state: State) -> State:
    """The same state without its past: where back-propagation through time is cut.

    Training on a long sequence piece by piece (truncated back-propagation through time, Williams and Peng 1990), the
    memory goes on and the gradient ends with the piece:

        state = layer.initial_state(batch_size)
        for x, target in pieces:
            y, state = layer.step(x, detach(state))
            loss(y, target).backward()
            ...
    """
    return tuple(part.detach() for part in state)


class StreamingLayer(nn.Module):
    """A layer over time whose `step`s and `finish`, joined, equal its `forward`.

    Axis 0 is the batch and axis 1 is time, in every input and output. All rows of a step are in phase: they
    have seen the same number of frames. A state is a tuple of plain tensors of constant shapes, batch first,
    zero at the start; `step` returns a new one and leaves the one that went in unchanged.

    Attributes:
        latency: look-ahead in output frames: `step` gives out frame t when it has read frame t + latency.
        stride: input frames to an output frame.
    """

    latency: int = 0
    stride: int = 1

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Read a padded batch: x (batch, time, ...), lengths (batch,) -> y (batch, time // stride, ...), lengths.

        What y holds past its lengths means nothing; what x holds past its lengths has no effect.
        """
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> State:
        """The state before the first frame."""
        return ()

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Read any number of frames, also none: x (batch, time, ...) -> what is ready of y, and the new state."""
        raise NotImplementedError

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        """What the look-ahead still holds at the end of the stream: y (batch, time, ...), lengths (batch,)."""
        batch_size = state[0].shape[0] if state else 1
        return self._nothing(batch_size), torch.zeros(batch_size, dtype=torch.long)

    def _nothing(self, batch_size: int) -> Tensor:
        """An empty output: (batch, 0, ...)."""
        raise NotImplementedError


def windows(x: Tensor, state: State | None, kernel: int, stride: int) -> tuple[Tensor, State]:
    """Frames to slide a causal window over, and what to keep for the next call.

    The window has `kernel` frames, moves by `stride` and starts with `kernel - stride` zeros before the stream,
    so n frames give n // stride windows.

    Args:
        x: (batch, time, ...), new frames.
        state: (the last kernel - 1 frames, how many frames came since the last window (batch,)), or None at
            the start of a stream that is read whole.

    Returns:
        Frames (batch, kernel - stride + m * stride, ...) for m windows, and the new state.
    """
    history, pending = state or window_state(x[:, :0], kernel)
    waiting = int(pending[0]) if state and len(pending) else 0  # at the start none, and a GPU need not be asked
    joined = torch.cat([history, x], dim=1)
    count = (waiting + x.shape[1]) // stride
    start = history.shape[1] - (kernel - stride) - waiting
    frames = joined[:, start : start + kernel - stride + count * stride]
    kept = joined[:, joined.shape[1] - (kernel - 1) :].clone()
    return frames, (kept, torch.full_like(pending, (waiting + x.shape[1]) % stride))


def window_state(empty: Tensor, kernel: int) -> State:
    """The state of `windows` at the start of a stream; `empty` (batch, 0, ...) gives batch, channels and type."""
    history = empty.new_zeros((empty.shape[0], kernel - 1, *empty.shape[2:]))
    return history, torch.zeros(empty.shape[0], dtype=torch.long, device=empty.device)


class Chain(StreamingLayer):
    """Layers one after another, as one layer."""

    def __init__(self, layers: Iterable[StreamingLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.stride = 1
        latency, factor = 0, 1
        for layer in self._each():
            if latency and layer.stride != 1:
                raise ValueError("a layer with a stride cannot follow a look-ahead")
            latency += layer.latency
            factor *= layer.stride
        self.stride, self.latency = factor, latency

    def _each(self) -> "list[StreamingLayer]":
        return list(self.layers)  # type: ignore[arg-type]

    def _split(self, state: State) -> list[State]:
        parts, start = [], 0
        for layer in self._each():
            size = len(layer.initial_state(1))
            parts.append(state[start : start + size])
            start += size
        return parts

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self._each():
            x, lengths = layer(x, lengths)
        return x, lengths

    def initial_state(self, batch_size: int) -> State:
        return tuple(s for layer in self._each() for s in layer.initial_state(batch_size))

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        new: list[Tensor] = []
        for layer, part in zip(self._each(), self._split(state), strict=True):
            x, part = layer.step(x, part)
            new.extend(part)
        return x, tuple(new)

    def finish(self, state: State) -> tuple[Tensor, Tensor]:
        # What one layer held back still has to pass through those after it, which then finish in turn.
        batch_size = state[0].shape[0]
        late: Tensor | None = None
        for layer, part in zip(self._each(), self._split(state), strict=True):
            ready = None
            if late is not None and late.shape[1]:
                ready, part = layer.step(late, part)
            held, _ = layer.finish(part) if part else (layer._nothing(batch_size), None)
            late = held if ready is None else torch.cat([ready, held], dim=1)
        assert late is not None
        return late, torch.full((batch_size,), late.shape[1], dtype=torch.long, device=late.device)

    def _nothing(self, batch_size: int) -> Tensor:
        return self._each()[-1]._nothing(batch_size)


def valid(lengths: Tensor, time: int) -> Tensor:
    """True inside each row: (batch, time) bool."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]
