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
        said = log_probs.new_empty(time, size, batch, size)
        silent = torch.empty_like(said)
        scales = log_probs.new_empty(time, batch)
        before_said = said.new_zeros(size, batch, size)
        before_silent = torch.zeros_like(before_said)
        before_silent[BORDER, :, BORDER] = 1.0
        both = before_silent.clone()
        of_itself = itself[:, None]
        for t, (now_said, now_silent, heard) in enumerate(zip(said, silent, probs.unbind(1), strict=True)):
            new = torch.bmm(both, follows)  # (before, batch, last)
            torch.diagonal(new, dim1=0, dim2=2).add_((before_silent * of_itself).sum(-1).T)
            torch.add(before_said, new.permute(2, 1, 0), out=now_said)
            now_said *= heard.T[:, :, None]
            torch.mul(both, heard[:, BORDER, None], out=now_silent)
            torch.add(now_said, now_silent, out=both)
            scale = both.sum((0, 2)).clamp_min_(1e-30)
            scales[t] = scale
            by = scale.reciprocal_()[:, None]
            now_said *= by
            now_silent *= by
            both *= by
            before_said, before_silent = now_said, now_silent
        # A row's later frames, which are no speech, are gone through as well: what it has come to at its end counts.
        last, rows = frames - 1, torch.arange(batch, device=frames.device)
        end = ((said[last, :, rows] + silent[last, :, rows]).transpose(0, 1) * ends).sum((0, 2)).clamp_min(1e-30)
        inside = torch.arange(time, device=frames.device)[:, None] < frames
        total = torch.where(inside, scales.log(), 0.0).sum(0)
        ctx.save_for_backward(probs, frames, follows, itself, ends, said, silent, scales, end)
        return total + end.log()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        probs, frames, follows, itself, ends, said, silent, scales, end = ctx.saved_tensors
        time, size, batch, _ = said.shape
        followed = follows.transpose(1, 2).contiguous()  # (last, next, before)
        inside = torch.arange(time, device=frames.device)[:, None] < frames
        of_labels, of_blank = probs.new_empty(time, size, batch), probs.new_empty(time, batch)
        scaled = probs / scales.T[..., None]
        of_itself = itself[:, None]
        after_said = after_silent = (ends / end[:, None]).expand(size, batch, size)  # at the end, and behind it
        for t in range(time - 1, -1, -1):
            torch.sum(said[t] * after_said, 2, out=of_labels[t])
            torch.sum(silent[t] * after_silent, (0, 2), out=of_blank[t])
            heard, on = scaled[:, t], inside[t][:, None]
            arrived = after_said * heard.T[:, :, None]
            both = torch.baddbmm(after_silent * heard[:, BORDER, None], arrived.permute(2, 1, 0), followed)
            own = torch.diagonal(arrived, dim1=0, dim2=2).T  # (last, batch): of before = last
            after_said = torch.where(on, both + arrived, after_said)
            after_silent = torch.where(on, torch.addcmul(both, own[:, :, None], of_itself), after_silent)
        of_labels[:, BORDER] = of_blank
        grad = torch.where(inside[:, None], of_labels, 0.0).permute(2, 0, 1)
        return grad * grads[0][:, None, None], None, None
