"""asr.training.crf: the sum over all that could be said."""

import itertools

import pytest
import torch
from torch import Tensor

from asr.training.crf import BORDER, log_partition, trigrams

SAID = [[1, 2, 2], [2], [1, 1, 2], []]


def by_hand(log_probs: Tensor, likely: Tensor) -> float:
    """The sum over every path, one after the other: log_probs (time, labels)."""
    time, size = log_probs.shape
    total = 0.0
    for path in itertools.product(range(size), repeat=time):
        labels = [label for label, _ in itertools.groupby(path) if label]
        padded = [BORDER, BORDER, *labels, BORDER]
        weight = log_probs[range(time), path].sum().exp()
        for three in zip(padded, padded[1:], padded[2:], strict=False):
            weight *= likely[three]
        total += weight.item()
    return total


def test_trigrams_are_distributions_that_know_what_was_said() -> None:
    likely = trigrams(SAID, 4)
    assert torch.allclose(likely.sum(-1), torch.ones(4, 4))
    assert bool((likely > 0).all()), "anything may be said"
    assert int(likely[1, 1].argmax()) == 2
    assert likely[BORDER, BORDER, 1] > likely[BORDER, BORDER, 3]


def test_the_sum_is_that_over_every_path() -> None:
    torch.manual_seed(1)
    likely = trigrams(SAID, 3)
    log_probs = torch.randn(3, 5, 3).log_softmax(-1)
    got = log_partition(log_probs, torch.tensor([5, 3, 1]), likely)
    wanted = [by_hand(row[:n], likely) for row, n in zip(log_probs, (5, 3, 1), strict=True)]
    assert torch.allclose(got.exp(), torch.tensor(wanted), rtol=1e-4)


def test_its_gradient_is_the_share_of_the_paths_through_each_label() -> None:
    torch.manual_seed(2)
    likely, frames = trigrams(SAID, 3), torch.tensor([4, 2])
    log_probs = torch.randn(2, 4, 3).log_softmax(-1).requires_grad_()
    log_partition(log_probs, frames, likely).sum().backward()
    grad = log_probs.grad
    assert grad is not None
    assert torch.allclose(grad.sum(-1), torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]]), atol=1e-5)
    step = 1e-2
    for row, t, label in itertools.product(range(2), range(4), range(3)):
        moved = torch.zeros_like(log_probs)
        moved[row, t, label] = step
        up, down = (log_partition((log_probs + sign * moved).detach(), frames, likely).sum() for sign in (1, -1))
        assert grad[row, t, label].item() == pytest.approx((up - down).item() / (2 * step), abs=1e-3)


def test_long_rows_neither_overflow_nor_vanish() -> None:
    log_probs = torch.full((1, 2000, 3), -40.0).requires_grad_()
    got = log_partition(log_probs, torch.tensor([2000]), trigrams(SAID, 3))
    assert got.isfinite().all() and -2000 * 41 < got.item() < -2000 * 38
    got.backward()
    assert log_probs.grad is not None and torch.allclose(log_probs.grad.sum(-1), torch.ones(1, 2000), atol=1e-3)
