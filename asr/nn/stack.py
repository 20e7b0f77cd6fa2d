"""Any cell run over time: forwards, in both directions, and as a layer of a stack."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.errors import ModelError
from asr.nn.cells import CELLS, Cell, initialise
from asr.nn.layer import State, StreamingLayer
from asr.nn.recurrent import reverse


class Recurrent(StreamingLayer):
    """A cell run over time: (batch, time, input_size) -> h (batch, time, output_size). The state is the cell's.

    torch's kernel runs it where there is one; else, and where the options below need it, a loop over the frames.

    Args:
        cell: the equations.
        variational_dropout: while training, the share of x_t's and of h_{t-1}'s units that are hidden from the cell,
            the same ones at every frame (Gal and Ghahramani 2016).
        zoneout: while training, the probability that a unit of the state keeps its value for one frame; after it,
            old and new are mixed in that proportion (Krueger et al. 2017).
    """

    def __init__(self, cell: Cell, *, variational_dropout: float = 0.0, zoneout: float = 0.0) -> None:
        super().__init__()
        self.cell = cell
        self.variational_dropout, self.zoneout = variational_dropout, zoneout
        self.output_size = cell.output_size

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = self.step(x, self.initial_state(x.shape[0]))
        return y, lengths

    def initial_state(self, batch_size: int) -> State:
        return self.cell.initial_state(batch_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        if not x.shape[1]:
            return self._nothing(x.shape[0]), state
        dropout = self.variational_dropout if self.training else 0.0
        if self.cell.fast and not dropout and not self.zoneout:
            return self._run_fast(x, state)
        if dropout:
            x = x * F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), dropout)
        seen = F.dropout(torch.ones_like(state[0]), dropout)
        outputs = []
        for wx in self.cell.project(x).unbind(1):
            new = self.cell.masked(wx, seen, *state) if dropout else self.cell(wx, *state)
            state = self._zone_out(state, new) if self.zoneout else new
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state

    def inside(self, x: Tensor, state: State) -> tuple[dict[str, Tensor], State]:
        """As `step` does when it does not train, with all that the cell computes: (batch, time, size) by its name."""
        frames = []
        for wx in self.cell.project(x).unbind(1):
            now = self.cell.inside(wx, *state)
            if self.zoneout:
                new = self._zone_out(state, tuple(now[name] for name in self.cell.state))
                now = now | dict(zip(self.cell.state, new, strict=True))
            state = tuple(now[name] for name in self.cell.state)
            frames.append(now)
        return {name: torch.stack([frame[name] for frame in frames], dim=1) for name in frames[0]}, state

    def _run_fast(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert self.cell.fast is not None
        first = tuple(s[None].to(x.dtype) for s in state)  # torch's kernels want (layers, batch, size)
        # one layer with biases, no dropout, forward in time, batch first
        options = True, 1, 0.0, self.training, False, True
        y, *last = self.cell.fast(x, first if len(state) > 1 else first[0], self.cell.weights(), *options)
        return y, tuple(s[0] for s in last)

    def _zone_out(self, old: State, new: State) -> State:
        if not self.training:
            return tuple(self.zoneout * a + (1 - self.zoneout) * b for a, b in zip(old, new, strict=True))
        return tuple(
            torch.where(torch.rand_like(b) < self.zoneout, a.to(b.dtype), b) for a, b in zip(old, new, strict=True)
        )

    def _nothing(self, batch_size: int) -> Tensor:
        return self.cell.w.weight.new_zeros(batch_size, 0, self.output_size)


class Bidirectional(StreamingLayer):
    """Two recurrent layers over a whole utterance, one in each direction, joined: (batch, time, both outputs).

    Exact for padded batches without packing: the backward layer reads each row's valid part reversed, so that
    padding comes last for it as well (Schuster and Paliwal 1997).
    """

    def __init__(self, ahead: Recurrent, back: Recurrent) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back
        self.output_size = ahead.output_size + back.output_size

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        ahead, _ = self.ahead(x, lengths)
        back, _ = self.back(reverse(x, lengths), lengths)
        return torch.cat([ahead, reverse(back, lengths)], dim=-1), lengths

    def initial_state(self, batch_size: int) -> State:
        raise ModelError(
            "a bidirectional layer reads whole utterances and cannot stream; use the model's streaming network"
        )


class Stacked(StreamingLayer):
    """A recurrent layer as it stands in a stack: layer-normalised, with dropout, and with a residual path if wanted.

    y = dropout(N(layer(x))), and x + y with a residual path (He et al. 2016), which needs the sizes to be equal.
    """

    def __init__(self, layer: Recurrent | Bidirectional, *, dropout: float = 0.0, residual: bool = False) -> None:
        super().__init__()
        self.layer, self.residual = layer, residual
        self.output_size = layer.output_size
        self.norm = nn.LayerNorm(self.output_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        y, lengths = self.layer(x, lengths)
        return self._after(x, y), lengths

    def initial_state(self, batch_size: int) -> State:
        return self.layer.initial_state(batch_size)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        y, state = self.layer.step(x, state)
        return self._after(x, y), state

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.dropout(self.norm(y))
        return x + y if self.residual else y

    def _nothing(self, batch_size: int) -> Tensor:
        return self.norm.weight.new_zeros(batch_size, 0, self.output_size)


def stacked(
    name: str,
    input_size: int,
    size: int,
    *,
    bidirectional: bool,
    dropout: float = 0.0,
    residual: bool = False,
    forget_bias: float = 1.0,
    longest_memory: int = 0,
    variational_dropout: float = 0.0,
    zoneout: float = 0.0,
) -> Stacked:
    """One layer of a stack of cells of the kind `name` (CELLS), its residual path left out where sizes differ.

    How the gates start is `initialise`'s, variational dropout and zoneout are `Recurrent`'s.
    """

    def one_direction() -> Recurrent:
        cell = CELLS[name](input_size, size)
        initialise(cell, forget_bias=forget_bias, longest_memory=longest_memory)
        return Recurrent(cell, variational_dropout=variational_dropout, zoneout=zoneout)

    layer = Bidirectional(one_direction(), one_direction()) if bidirectional else one_direction()
    return Stacked(layer, dropout=dropout, residual=residual and layer.output_size == input_size)
