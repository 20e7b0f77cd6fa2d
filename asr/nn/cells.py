"""The LSTM family: each recurrent cell is the equations of one step (asr.nn.stack runs them over time).

Notation throughout: x_t input, h_t output, c_t cell, i input gate, f forget gate, o output gate, c~ candidate; W and U
multiply x_t and h_{t-1}, b is a bias, * is elementwise. A cell's docstring is what its `inside` computes.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.nn.layer import State

# Where oneDNN lacks the projected LSTM, torch takes its own kernel and says so; nobody has to do anything about it.
warnings.filterwarnings("ignore", message="LSTM with projections is not supported with oneDNN")


class Cell(nn.Module):
    """One step of a recurrence: `cell(W x_t + b, *state)` gives the new state, whose first tensor is h_t.

    The part that needs no memory, W x_t + b, is computed for all frames at once by `project`. `inside` gives all that
    a step computes by its name in the equations, which is what `asr inspect` shows.

    Args:
        input_size: of x_t.
        size: units; c_t has as many.
        output_size: of h_t, where it is not `size`.

    Attributes:
        gates: names of the blocks of rows in W, U and b, in order.
        keep: the gate that holds the memory when it is open; None in a cell without one.
        state: names of what a step hands to the next one, h first.
        fast: torch's own kernel for the same equations; None where torch has none.
    """

    gates: tuple[str, ...]
    keep: str | None = None
    state: tuple[str, ...] = ("h", "c")
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

    def forward(self, wx: Tensor, *state: Tensor) -> State:
        """One step: W x_t + b (batch, gates * size) and the state -> the new state."""
        step = self.inside(wx, *state)
        return tuple(step[name] for name in self.state)

    def masked(self, wx: Tensor, mask: Tensor, h: Tensor, *rest: Tensor) -> State:
        """One step in which U sees h_{t-1} through a mask (batch, output_size), and the memory stays whole."""
        return self(wx, h * mask, *rest)

    def inside(self, wx: Tensor, *state: Tensor) -> dict[str, Tensor]:
        """All that one step computes by its name, (batch, size) each; gates in [0, 1], the new state among them."""
        raise NotImplementedError

    def initial_state(self, batch_size: int) -> State:
        """h, and c in the cells that have one: zeros (batch, output_size), (batch, size)."""
        sizes = {"h": self.output_size, "c": self.size}
        return tuple(self.w.weight.new_zeros(batch_size, sizes[name]) for name in self.state)

    def weights(self) -> list[Tensor]:
        """What `fast` takes: W, U, b and a second bias, beside U."""
        return [self.w.weight, self.u.weight, self.w.bias, torch.zeros_like(self.w.bias)]

    def rows(self, gate: str) -> slice:
        """The rows of W, U and b that belong to a gate."""
        start = self.gates.index(gate) * self.size
        return slice(start, start + self.size)


class ElmanCell(Cell):
    """A plain recurrent network (Elman 1990): what a step remembers, the next one overwrites.

    h_t = tanh(W x_t + U h_{t-1} + b)
    """

    gates = ("h",)
    state = ("h",)
    fast = staticmethod(torch.rnn_tanh)

    def inside(self, wx: Tensor, h: Tensor) -> dict[str, Tensor]:
        return {"h": torch.tanh(wx + self.u(h))}


class GRUCell(Cell):
    """A gated recurrent unit (Cho et al. 2014, in the form of cuDNN): one gate to keep, none between memory and output.

    r   = sigmoid(W x_t + U h_{t-1} + b)            reset gate
    z   = sigmoid(W x_t + U h_{t-1} + b)            update gate
    h~  = tanh(W x_t + b + r * (U h_{t-1} + b'))    candidate
    h_t = (1 - z) * h~ + z * h_{t-1}
    """

    gates = ("r", "z", "h~")
    keep = "z"
    state = ("h",)
    fast = staticmethod(torch.gru)

    def __init__(self, input_size: int, size: int) -> None:
        super().__init__(input_size, size)
        self.u_bias = nn.Parameter(torch.zeros(size))

    def masked(self, wx: Tensor, mask: Tensor, h: Tensor) -> State:
        return (self._step(wx, h * mask, h)["h"],)

    def inside(self, wx: Tensor, h: Tensor) -> dict[str, Tensor]:
        return self._step(wx, h, h)

    def _step(self, wx: Tensor, h: Tensor, memory: Tensor) -> dict[str, Tensor]:
        wx_r, wx_z, wx_h = wx.chunk(3, -1)
        uh_r, uh_z, uh_h = self.u(h).chunk(3, -1)
        r = torch.sigmoid(wx_r + uh_r)
        z = torch.sigmoid(wx_z + uh_z)
        candidate = torch.tanh(wx_h + r * (uh_h + self.u_bias))
        return {"r": r, "z": z, "h~": candidate, "h": (1 - z) * candidate + z * memory}

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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        i, f, candidate, o = _squash(wx + self.u(h))
        c = f * c + i * candidate
        return {"i": i, "f": f, "c~": candidate, "o": o, "c": c, "h": o * torch.tanh(c)}


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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        i, f, candidate, o = (wx + self.u(h)).chunk(4, -1)
        i = torch.sigmoid(i + self.p_i * c)
        f = torch.sigmoid(f + self.p_f * c)
        candidate = torch.tanh(candidate)
        c = f * c + i * candidate
        o = torch.sigmoid(o + self.p_o * c)
        return {"i": i, "f": f, "c~": candidate, "o": o, "c": c, "h": o * torch.tanh(c)}


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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        f, candidate, o = (wx + self.u(h)).chunk(3, -1)
        f, candidate, o = torch.sigmoid(f), torch.tanh(candidate), torch.sigmoid(o)
        i = 1 - f
        c = f * c + i * candidate
        return {"i": i, "f": f, "c~": candidate, "o": o, "c": c, "h": o * torch.tanh(c)}


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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        i, f, candidate, o = _squash(wx + self.u(h))
        c = f * c + i * candidate
        return {"i": i, "f": f, "c~": candidate, "o": o, "c": c, "h": self.v(o * torch.tanh(c))}

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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        i, f, candidate, o = _squash(wx + self.norm_u(self.u(h)))
        c = f * c + i * candidate
        return {"i": i, "f": f, "c~": candidate, "o": o, "c": c, "h": o * torch.tanh(self.norm_c(c))}


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

    def inside(self, wx: Tensor, h: Tensor, c: Tensor) -> dict[str, Tensor]:
        i, candidate, o = (wx + self.u(h)).chunk(3, -1)
        i, candidate, o = torch.sigmoid(i), 2 * torch.tanh(candidate / 2), torch.sigmoid(o)
        c = c + i * candidate
        return {"i": i, "c~": candidate, "o": o, "c": c, "h": o * torch.tanh(c / 2)}


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


def _squash(sums: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """i, f, c~ and o from their sums, (batch, 4 * size)."""
    i, f, candidate, o = sums.chunk(4, -1)
    return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(candidate), torch.sigmoid(o)


def initialise(cell: Cell, *, forget_bias: float = 1.0, longest_memory: int = 0) -> None:
    """Draw a cell's W (Xavier) and U (orthogonal, each gate by itself) anew, and set its biases.

    Args:
        forget_bias: of the gate that keeps the memory, so that it starts open (Jozefowicz et al. 2015).
        longest_memory: in frames; where it is given, T, the units start with memories spread over 1 ... T frames
            (chrono initialisation, Tallec and Ollivier 2018): b_f = log(uniform(1, T - 1)), b_i = -b_f. It takes the
            place of forget_bias.

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
