"""CTC against all that could be said: the denominator of a CTC-CRF, or of lattice-free MMI, with trigrams of labels.

CTC raises the probability of what was said, frame by frame, as if any sequence of labels were speech. Divided by the
sum over all sequences, each as likely as trigrams of the labels find it, the network learns what parts what was said
from what could have been (Povey et al. 2016, "Purely sequence-trained neural networks for ASR based on lattice-free
MMI"; Xiang and Ou 2019, "CRF-based single-stage acoustic modeling with CTC topology").
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BORDER = 0  # before the first label of a sequence and after the last; CTC's blank has that number


def trigrams(sequences: Iterable[Sequence[int]], size: int) -> Tensor:
    """The probability of each label after any two: (size, size, size), BORDER among them. Labels are 1 to size - 1.

    Counts of three are mixed with those of two, and those with those of one (Witten and Bell 1991).
    """
    counts = np.zeros((size,) * 3)
    for labels in sequences:
        if len(labels):
            padded = np.array([BORDER, BORDER, *labels, BORDER])
            np.add.at(counts, (padded[:-2], padded[1:-1], padded[2:]), 1.0)
    likely = (counts.sum((0, 1)) + 1.0) / (counts.sum() + size)
    for wider in (counts.sum(0), counts):
        kinds = np.maximum((wider > 0).sum(-1, keepdims=True), 1)
        likely = (wider + kinds * likely) / (wider.sum(-1, keepdims=True) + kinds)
    return torch.tensor(likely, dtype=torch.float32)


def log_partition(log_probs: Tensor, frames: Tensor, likely: Tensor) -> Tensor:
    """The log of the sum over all label sequences of what trigrams give them times what CTC gives them.

    Args:
        log_probs: (batch, time, labels), blank first.
        frames: (batch,), of each row at least one.
        likely: of `trigrams`, (labels, labels, labels).

    Returns:
        (batch,) float32: 0 or less.
    """
    return _LogPartition.apply(log_probs.float(), frames, likely.to(log_probs.device))


class _LogPartition(torch.autograd.Function):
    """Forwards and backwards over the states of CTC with two labels of history.

    A state is (the label before, the last label), and whether the last frame said that label, or a blank after it.
    Arrays of states are (last, batch, before): a matrix for each last label, which is what the trigrams multiply.
    Each frame's probabilities are scaled to a sum of one.
    """

    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, frames: Tensor, likely: Tensor) -> Tensor:
        batch, time, size = log_probs.shape
        # (last, before, next): of a label that follows itself at once, by itself: CTC wants a blank between
        follows = likely.transpose(0, 1).contiguous()
        itself = torch.diagonal(follows, dim1=0, dim2=2).T.contiguous()  # (last, before)
        follows.diagonal(dim1=0, dim2=2).zero_()
        follows[:, :, BORDER] = 0.0
        itself[BORDER] = 0.0
        ends = likely[:, :, BORDER].T[:, None]  # (last, 1, before)
        probs = log_probs.exp()
        said = log_probs.new_zeros(time, size, batch, size)
        silent = torch.zeros_like(said)
        now_said, now_silent = said.new_zeros(size, batch, size), said.new_zeros(size, batch, size)
        now_silent[BORDER, :, BORDER] = 1.0
        total = log_probs.new_zeros(batch)
        scales = log_probs.new_ones(time, batch)
        for t in range(time):
            both = now_said + now_silent
            new = torch.bmm(both, follows)  # (before, batch, last)
            torch.diagonal(new, dim1=0, dim2=2).add_((now_silent * itself[:, None]).sum(-1).T)
            heard = probs[:, t]
            next_said = (new.permute(2, 1, 0) + now_said) * heard.T[:, :, None]
            next_silent = both * heard[:, BORDER, None]
            scale = (next_said + next_silent).sum((0, 2)).clamp_min(1e-30)
            on = t < frames
            scales[t] = torch.where(on, scale, 1.0)
            total += torch.where(on, scale.log(), 0.0)
            by = (1 / scale)[:, None]
            now_said = torch.where(on[:, None], next_said * by, now_said)
            now_silent = torch.where(on[:, None], next_silent * by, now_silent)
            said[t], silent[t] = now_said, now_silent
        end = ((now_said + now_silent) * ends).sum((0, 2)).clamp_min(1e-30)
        ctx.save_for_backward(probs, frames, follows, itself, ends, said, silent, scales, end)
        return total + end.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probs, frames, follows, itself, ends, said, silent, scales, end = ctx.saved_tensors
        time, size, batch, _ = said.shape
        followed = follows.transpose(1, 2).contiguous()  # (last, next, before)
        grad = torch.zeros_like(probs)
        last = (ends / end[:, None]).expand(size, batch, size)
        after_said, after_silent = last, last
        for t in range(time - 1, -1, -1):
            on = t < frames
            of_said, of_silent = said[t] * after_said, silent[t] * after_silent
            grad[:, t] = torch.where(on[:, None], of_said.sum(2).T, 0.0)
            grad[:, t, BORDER] = torch.where(on, of_silent.sum((0, 2)), 0.0)
            heard = probs[:, t] / scales[t][:, None]
            arrived = after_said * heard.T[:, :, None]
            both = torch.baddbmm(after_silent * heard[:, BORDER, None], arrived.permute(2, 1, 0), followed)
            own = torch.diagonal(arrived, dim1=0, dim2=2).T  # (last, batch): of before = last
            before_said = both + arrived
            before_silent = both + own[:, :, None] * itself[:, None]
            after_said = torch.where(on[:, None], before_said, after_said)
            after_silent = torch.where(on[:, None], before_silent, after_silent)
        return grad * grads[0][:, None, None], None, None
