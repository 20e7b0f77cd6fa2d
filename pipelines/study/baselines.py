"""What the LSTM is compared with on speech: a causal Transformer and a feed-forward network."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asr.nn import StreamingLayer
from asr.nn.layer import valid

HEADS = 4
CONTEXT = 5  # frames that the feed-forward network sees on each side


class Block(nn.Module):
    """A causal Transformer block (Vaswani et al. 2017; normalised first, Xiong et al. 2020; ALiBi, Press et al. 2022).

    x = x + O softmax(q k' / sqrt(d) - slope * lag) v    of N(x), over this frame and all before it
    x = x + W2 gelu(W1 N(x))

    Args:
        size: of x; W1 makes four times as many.
    """

    slopes: Tensor

    def __init__(self, size: int, dropout: float) -> None:
        super().__init__()
        self.norm_attention, self.norm_feed = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.o = nn.Linear(size, 3 * size, bias=False), nn.Linear(size, size, bias=False)
        self.feed = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("slopes", 2.0 ** (-8 / HEADS * torch.arange(1, HEADS + 1)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, size) -> the same."""
        q, k, v = self._heads(x)
        return self._after(x, F.scaled_dot_product_attention(q, k, v, self._bias(x.shape[1], x.shape[1])))

    def step(self, x: Tensor, keys: Tensor, values: Tensor, seen: int) -> Tensor:
        """One frame (batch, 1, size); `keys` and `values` (batch, heads, room, size / heads) hold `seen` frames.

        The frame's own key and value are written into them, in place: what a server would do.
        """
        q, k, v = self._heads(x)
        keys[:, :, seen : seen + 1], values[:, :, seen : seen + 1] = k, v
        past = slice(0, seen + 1)
        return self._after(
            x, F.scaled_dot_product_attention(q, keys[:, :, past], values[:, :, past], self._bias(1, seen + 1))
        )

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _bias(self, new: int, frames: int) -> Tensor:
        """- slope * lag, and no sight of what is to come: (heads, new, frames); the new frames are the last."""
        at = torch.arange(frames)
        lag = at[frames - new :, None] - at
        return (-self.slopes[:, None, None] * lag).masked_fill(lag < 0, -math.inf)

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(self.o(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.feed(self.norm_feed(x)))


class Transformer(StreamingLayer):
    """Causal Transformer blocks over frames: (batch, time, input_size) -> (batch, time, size).

    A baseline with an unbounded past: its state grows with the stream, so it is no `step` of the streaming
    contract; `step` here writes into a cache made for a number of frames.
    """

    def __init__(self, input_size: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.size, self.output_size = size, size
        self.enter = nn.Linear(input_size, size)
        self.blocks = nn.ModuleList(Block(size, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(size)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(torch.where(valid(lengths, x.shape[1])[..., None], x, 0.0))
        for block in self.blocks:
            x = block(x)
        return self.norm(x), lengths

    def cache(self, batch_size: int, frames: int) -> list[tuple[Tensor, Tensor]]:
        """Room for the keys and values of so many frames: for each block two (batch, heads, frames, size / heads)."""
        shape = batch_size, HEADS, frames, self.size // HEADS
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]

    def one(self, x: Tensor, cache: list[tuple[Tensor, Tensor]], seen: int) -> Tensor:
        """One frame (batch, 1, input_size) after `seen` others -> (batch, 1, size); the cache is written into."""
        x = self.enter(x)
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            assert isinstance(block, Block)
            x = block.step(x, keys, values, seen)
        return self.norm(x)


class FeedForward(StreamingLayer):
    """A feed-forward network over a window of frames (Hinton et al. 2012): (batch, time, input_size) -> (.., size).

    It sees CONTEXT frames before this one and as many after it, so it looks ahead where a streaming LSTM does not.
    """

    def __init__(self, input_size: int, size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.output_size = size
        wide = (2 * CONTEXT + 1) * input_size
        parts: list[nn.Module] = []
        for i in range(layers):
            parts += [nn.Linear(size if i else wide, size), nn.ReLU(), nn.LayerNorm(size), nn.Dropout(dropout)]
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.where(valid(lengths, x.shape[1])[..., None], x, 0.0)
        window = F.pad(x, (0, 0, CONTEXT, CONTEXT)).unfold(1, 2 * CONTEXT + 1, 1)  # (batch, time, size, window)
        return self.body(window.flatten(2)), lengths
