"""Self-attention over a bounded past, which streams."""

import math

import torch
from torch import Tensor, nn

from asr.errors import ModelError
from asr.nn.layer import State, StreamingLayer, valid


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
