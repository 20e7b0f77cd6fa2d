"""The LSTM family: one recurrent cell is one step's equations; a layer runs any of them over time.

Notation throughout: x_t input, h_t output, c_t cell, i input gate, f forget gate, o output gate, c~ candidate; W and U
multiply x_t and h_{t-1}, b is a bias, * is elementwise. A cell's docstring is what its `forward` computes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.errors import ModelError
from asr.nn.layer import State, StreamingLayer, valid
from asr.nn.recurrent import reverse


class Cell(nn.Module):
    """One step of a recurrence: `cell(W x_t + b, *state)` gives the new state, whose first tensor is h_t.

    The part that needs no memory, W x_t + b, is computed for all frames at once by `project`.

    Args:
        input_size: of x_t.
        size: units; c_t has as many.
        output_size: of h_t, where it is not `size`.

    Attributes:
        gates: names of the blocks of rows in W, U and b, in order.
        keep: the gate that holds the memory when it is open; None in a cell without one.
        fast: torch's own kernel for the same equations; None where torch has none.
    """

    gates: tuple[str, ...]
    keep: str | None = None
    fast: Callable[..., tuple[Tensor, ...]] | None = None

    def __init__(self, input_size: int, size: int, output_size: int | None = None) -> None:
        super().__init__()
        self.size, self.output_size = size, output_size or size
        self.w = nn.Linear(input_size, len(self.gates) * size)
        self.u = nn.Linear(self.output_size, len(self.gates) * size, bias=False)
        initialise(self)

    def project(self, x: Tensor) -> Tensor:
        """W x_t + b for all frames: (batch, time, input_size) -> (batch, time, gates * size)."""
        return self.w(x)

    def initial_state(self, batch_size: int) -> State:
        """h, and c in the cells that have one: zeros (batch, output_size), (batch, size)."""
        return self._zeros(batch_size, self.output_size), self._zeros(batch_size, self.size)

    def weights(self) -> list[Tensor]:
        """What `fast` takes: W, U, b and a second bias, beside U."""
        return [self.w.weight, self.u.weight, self.w.bias, torch.zeros_like(self.w.bias)]

    def rows(self, gate: str) -> slice:
        """The rows of W, U and b that belong to a gate."""
        start = self.gates.index(gate) * self.size
        return slice(start, start + self.size)

    def _zeros(self, batch_size: int, size: int) -> Tensor:
        return self.w.weight.new_zeros(batch_size, size)


class ElmanCell(Cell):
    """A plain recurrent network (Elman 1990): what a step remembers, the next one overwrites.

    h_t = tanh(W x_t + U h_{t-1} + b)
    """

    gates = ("h",)
    fast = staticmethod(torch.rnn_tanh)

    def forward(self, wx: Tensor, h: Tensor) -> State:
        return (torch.tanh(wx + self.u(h)),)

    def initial_state(self, batch_size: int) -> State:
        return (self._zeros(batch_size, self.size),)


class GRUCell(Cell):
    """A gated recurrent unit (Cho et al. 2014, in the form of cuDNN): one gate to keep, none between memory and output.

    r   = sigmoid(W x_t + U h_{t-1} + b)            reset gate
    z   = sigmoid(W x_t + U h_{t-1} + b)            update gate
    h~  = tanh(W x_t + b + r * (U h_{t-1} + b'))    candidate
    h_t = (1 - z) * h~ + z * h_{t-1}
    """

    gates = ("r", "z", "h~")
    keep = "z"
    fast = staticmethod(torch.gru)

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(input_size, size)
        self.u_bias = nn.Parameter(torch.zeros(size))

    def forward(self, wx: Tensor, h: Tensor) -> State:
        wx_r, wx_z, wx_h = wx.chunk(3, -1)
        uh_r, uh_z, uh_h = self.u(h).chunk(3, -1)
        r = torch.sigmoid(wx_r + uh_r)
        z = torch.sigmoid(wx_z + uh_z)
        candidate = torch.tanh(wx_h + r * (uh_h + self.u_bias))
        return ((1 - z) * candidate + z * h,)

    def initial_state(self, batch_size: int) -> State:
        return (self._zeros(batch_size, self.size),)

    def weights(self) -> list[Tensor]:
        return [self.w.weight, self.u.weight, self.w.bias, F.pad(self.u_bias, (2 * self.size, 0))]


class LSTMCell(Cell):
    """Long short-term memory (Hochreiter and Schmidhuber 1997) with a forget gate (Gers et al. 2000).

    i   = sigmoid(W x_t + U h_{t-1} + b)    what enters
    f   = sigmoid(W x_t + U h_{t-1} + b)    what stays
    c~  = tanh(W x_t + U h_{t-1} + b)
    o   = sigmoid(W x_t + U h_{t-1} + b)    what shows
    c_t = f * c_{t-1} + i * c~
    h_t = o * tanh(c_t)
    """

    gates = ("i", "f", "c~", "o")
    keep = "f"
    fast = staticmethod(torch.lstm)

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, candidate, o = (wx + self.u(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        return torch.sigmoid(o) * torch.tanh(c), c


class PeepholeCell(Cell):
    """An LSTM whose gates see the cell itself (Gers and Schmidhuber 2000); p is one weight a unit.

    i   = sigmoid(W x_t + U h_{t-1} + p_i * c_{t-1} + b)
    f   = sigmoid(W x_t + U h_{t-1} + p_f * c_{t-1} + b)
    c~  = tanh(W x_t + U h_{t-1} + b)
    c_t = f * c_{t-1} + i * c~
    o   = sigmoid(W x_t + U h_{t-1} + p_o * c_t + b)
    h_t = o * tanh(c_t)
    """

    gates = ("i", "f", "c~", "o")
    keep = "f"

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(input_size, size)
        self.p_i = nn.Parameter(torch.zeros(size))
        self.p_f = nn.Parameter(torch.zeros(size))
        self.p_o = nn.Parameter(torch.zeros(size))

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, candidate, o = (wx + self.u(h)).chunk(4, -1)
        i = torch.sigmoid(i + self.p_i * c)
        f = torch.sigmoid(f + self.p_f * c)
        c = f * c + i * torch.tanh(candidate)
        return torch.sigmoid(o + self.p_o * c) * torch.tanh(c), c


class CoupledCell(Cell):
    """An LSTM that lets in as much as it forgets: i = 1 - f, three quarters of the weights (Greff et al. 2017).

    f   = sigmoid(W x_t + U h_{t-1} + b)
    c~  = tanh(W x_t + U h_{t-1} + b)
    o   = sigmoid(W x_t + U h_{t-1} + b)
    c_t = f * c_{t-1} + (1 - f) * c~
    h_t = o * tanh(c_t)
    """

    gates = ("f", "c~", "o")
    keep = "f"

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        f, candidate, o = (wx + self.u(h)).chunk(3, -1)
        f = torch.sigmoid(f)
        c = f * c + (1 - f) * torch.tanh(candidate)
        return torch.sigmoid(o) * torch.tanh(c), c


class ProjectedCell(Cell):
    """An LSTM whose output is projected to fewer dimensions, which makes U smaller (Sak et al. 2014).

    i, f, c~, o and c_t as in the LSTM, with the projected h_{t-1}
    h_t = V (o * tanh(c_t))

    Args:
        output_size: of h_t; half of `size` where it is not given.
    """

    gates = ("i", "f", "c~", "o")
    keep = "f"
    fast = staticmethod(torch.lstm)

    def __init__(self, input_size: int, size: int, output_size: int | None = None) -> None:
        super().__init__(input_size, size, output_size or size // 2)
        self.v = nn.Linear(size, self.output_size, bias=False)

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, candidate, o = (wx + self.u(h)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        return self.v(torch.sigmoid(o) * torch.tanh(c)), c

    def weights(self) -> list[Tensor]:
        return [*super().weights(), self.v.weight]


class NormalisedCell(Cell):
    """An LSTM with layer normalisation N inside, over all gates together and over the cell (Ba et al. 2016).

    i, f, c~, o before their sigmoid or tanh = N(W x_t) + N(U h_{t-1}) + b
    c_t = f * c_{t-1} + i * c~
    h_t = o * tanh(N(c_t))
    """

    gates = ("i", "f", "c~", "o")
    keep = "f"

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(input_size, size)
        self.norm_w = nn.LayerNorm(4 * size, bias=False)
        self.norm_u = nn.LayerNorm(4 * size, bias=False)
        self.norm_c = nn.LayerNorm(size)

    def project(self, x: Tensor) -> Tensor:
        return self.norm_w(F.linear(x, self.w.weight)) + self.w.bias

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        i, f, candidate, o = (wx + self.norm_u(self.u(h))).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(candidate)
        return torch.sigmoid(o) * torch.tanh(self.norm_c(c)), c


class CarouselCell(Cell):
    """The cell of 1997: no forget gate, so that c carries its error back unchanged (the constant error carousel).

    i   = sigmoid(W x_t + U h_{t-1} + b)
    c~  = 2 tanh((W x_t + U h_{t-1} + b) / 2)    squashed to -2 ... 2, as in the paper
    o   = sigmoid(W x_t + U h_{t-1} + b)
    c_t = c_{t-1} + i * c~
    h_t = o * tanh(c_t / 2)

    Nothing ever leaves c: on a stream without end it drifts until tanh is flat, which is what the forget gate cured.
    Gradients are whole here; the paper cut those that leave the cell through the gates.
    """

    gates = ("i", "c~", "o")

    def forward(self, wx: Tensor, h: Tensor, c: Tensor) -> State:
        i, candidate, o = (wx + self.u(h)).chunk(3, -1)
        c = c + torch.sigmoid(i) * (2 * torch.tanh(candidate / 2))
        return torch.sigmoid(o) * torch.tanh(c / 2), c


CELLS: dict[str, type[Cell]] = {
    "rnn": ElmanCell,
    "gru": GRUCell,
    "lstm": LSTMCell,
    "lstm-peephole": PeepholeCell,
    "lstm-coupled": CoupledCell,
    "lstm-projection": ProjectedCell,
    "lstm-layernorm": NormalisedCell,
    "lstm-1997": CarouselCell,
}


def initialise(cell: Cell, *, forget_bias: float = 1.0, longest_memory: int = 0) -> None:
    """Draw a cell's W (Xavier) and U (orthogonal, each gate by itself) anew, and set its biases.

    Args:
        forget_bias: of the gate that keeps the memory, so that it starts open (Jozefowicz et al. 2015).
        longest_memory: in frames; where it is given, T, the units start with memories spread over 1 ... T frames
            (chrono initialisation, Tallec and Ollivier 2018): b_f = log(uniform(1, T - 1)), b_i = -b_f.

    Raises:
        ValueError: 0 < longest_memory < 3.
    """
    if 0 < longest_memory < 3:
        raise ValueError(f"longest_memory = {longest_memory}: must be 0 (none) or at least 3 frames")
    with torch.no_grad():
        nn.init.xavier_uniform_(cell.w.weight)
        for gate in cell.u.weight.chunk(len(cell.gates)):
            nn.init.orthogonal_(gate)
        cell.w.bias.zero_()
        if cell.keep is None:
            return
        keep = cell.w.bias[cell.rows(cell.keep)]
        keep.fill_(forget_bias)
        if longest_memory:
            keep.uniform_(1, longest_memory - 1).log_()
            if "i" in cell.gates:
                cell.w.bias[cell.rows("i")] = -keep


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
            h, *rest = state
            new = self.cell(wx, h * seen if dropout else h, *rest)
            state = self._zone_out(state, new) if self.zoneout else new
            outputs.append(state[0])
        return torch.stack(outputs, dim=1), state

    def _run_fast(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        assert self.cell.fast is not None
        first = tuple(s[None].to(x.dtype) for s in state)  # torch's kernels want (layers, batch, size)
        # one layer with biases, no dropout, forward in time, batch first
        options = True, 1, 0.0, self.training, False, True
        y, *last = self.cell.fast(x, first if len(first) > 1 else first[0], self.cell.weights(), *options)
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
    name: str, input_size: int, size: int, *, bidirectional: bool, dropout: float = 0.0, residual: bool = False
) -> Stacked:
    """One layer of a stack of cells of the kind `name` (CELLS), its residual path left out where sizes differ."""
    kind = CELLS[name]
    layer = Recurrent(kind(input_size, size))
    if bidirectional:
        layer = Bidirectional(layer, Recurrent(kind(input_size, size)))
    return Stacked(layer, dropout=dropout, residual=residual and layer.output_size == input_size)


class SelfAttention(StreamingLayer):
    """Each frame looks back at the frames before it and adds what it finds; placed after recurrent layers.

    q, k, v = Q x, K x, V x
    a_ts    = softmax over s of q_t . k_s / sqrt(size), t - past <= s <= t
    y_t     = x_t + O sum_s a_ts v_s

    Vaswani et al. 2017 with one head and a bounded past, so that a frame of a stream costs the same for ever: the
    state is the last `past` keys, values, and 1 where a frame was (batch, past). O starts at zero: so y = x.

    Args:
        size: of x, y, and of keys and values.
        past: frames before this one that are looked at.
        both: look as many frames ahead as well; such a layer reads whole utterances and cannot stream.
    """

    def __init__(self, size: int, past: int, *, both: bool = False) -> None:
        super().__init__()
        self.size, self.past, self.both = size, past, both
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.o = nn.Linear(size, size, bias=False)
        nn.init.zeros_(self.o.weight)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        there = valid(lengths, x.shape[1])
        x = torch.where(there[..., None], x, 0.0)  # a weight of zero times NaN in the padding would be NaN
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self._attend(q, k, v, there), lengths

    def initial_state(self, batch_size: int) -> State:
        if self.both:
            raise ModelError(
                "attention in both directions reads whole utterances and cannot stream; use the model's streaming "
                "network"
            )
        held = self.o.weight.new_zeros(batch_size, self.past, self.size)
        return held, held.clone(), held.new_zeros(batch_size, self.past)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        q, k, v = self.qkv(x).chunk(3, -1)
        new = k, v, x.new_ones(x.shape[:2])
        k, v, there = (torch.cat(pair, dim=1) for pair in zip(state, new, strict=True))
        kept = tuple(s[:, s.shape[1] - self.past :].clone() for s in (k, v, there))
        return x + self._attend(q, k, v, there > 0), kept

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, there: Tensor) -> Tensor:
        """O sum a v; q (batch, time, size) belongs to the last frames of k, v (batch, frames, size)."""
        frames = torch.arange(k.shape[1], device=k.device)
        lag = frames[k.shape[1] - q.shape[1] :, None] - frames  # (time, frames)
        near = (lag <= self.past) & (lag >= (-self.past if self.both else 0))
        scores = q @ k.transpose(1, 2) / math.sqrt(self.size)
        # finite, so that a frame of the padding, which sees nothing, has no NaN in its gradient
        weights = scores.masked_fill(~(near & there[:, None]), -1e9).softmax(-1)
        return self.o(weights @ v)

    def _nothing(self, batch_size: int) -> Tensor:
        return self.o.weight.new_zeros(batch_size, 0, self.size)
