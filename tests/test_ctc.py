"""asr.decoding.ctc: likelihoods and alignments of given labels, against PyTorch's."""

import itertools

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given, settings
from hypothesis import strategies as st

from asr.decoding.ctc import align, log_likelihoods


def network_output(frames: int, labels: int, seed: int, spread: float = 3.0) -> np.ndarray:
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, spread, (frames, labels)))
    return logits.log_softmax(-1).numpy()


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 40),
    sequences=st.lists(st.lists(st.integers(1, 5), max_size=15), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_the_likelihood_is_that_of_pytorchs_ctc_loss(frames: int, sequences: list[list[int]], seed: int) -> None:
    log_probs = network_output(frames, 6, seed)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    flat = torch.tensor([label for sequence in sequences for label in sequence], dtype=torch.long)
    wide = torch.from_numpy(log_probs)[:, None].expand(-1, len(sequences), -1)
    losses = torch.nn.functional.ctc_loss(wide, flat, torch.full((len(sequences),), frames), lengths, reduction="none")
    texts = [[[sequence]] if sequence else [] for sequence in sequences]
    np.testing.assert_allclose(log_likelihoods([log_probs], texts)[0], -losses.numpy(), rtol=1e-9, atol=1e-9)
    as_words = [[[[label]] for label in sequence] for sequence in sequences]
    np.testing.assert_allclose(log_likelihoods([log_probs], as_words)[0], -losses.numpy(), rtol=1e-9, atol=1e-9)


ways = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(0, 14),
    texts=st.lists(st.lists(ways, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_the_ways_to_write_words_add_up(frames: int, texts: list[list[list[list[int]]]], seed: int) -> None:
    log_probs = network_output(frames, 5, seed)
    for found, words in zip(log_likelihoods([log_probs], texts)[0], texts, strict=True):
        each = (
            [[[[label for way in chosen for label in way]]] for chosen in itertools.product(*words)] if words else [[]]
        )
        np.testing.assert_allclose(
            found, np.logaddexp.reduce(log_likelihoods([log_probs], each)[0]), rtol=1e-9, atol=1e-9
        )


def test_several_readings_are_as_each_by_itself() -> None:
    readings = [network_output(frames, 5, frames) for frames in (9, 3, 14)]
    texts = [[[[1, 2], [3]], [[4]]], [], [[[2]], [[2, 2], [1]]]]
    alone = [log_likelihoods([reading], texts)[0] for reading in readings]
    np.testing.assert_array_equal(log_likelihoods(readings, texts), alone)


def test_a_long_utterance_does_not_underflow() -> None:
    log_probs = network_output(2000, 30, 0, spread=6.0)
    sequence = np.random.default_rng(1).integers(1, 30, 600).tolist()
    loss = torch.nn.functional.ctc_loss(
        torch.from_numpy(log_probs)[:, None], torch.tensor([sequence]), torch.tensor([2000]), torch.tensor([600]),
        reduction="none",
    )  # fmt: skip
    assert log_likelihoods([log_probs], [[[sequence]]])[0, 0] == pytest.approx(-float(loss), rel=1e-9)


def test_nothing_is_as_likely_as_all_its_blanks() -> None:
    log_probs = network_output(7, 4, 3)
    assert log_likelihoods([log_probs], [[]])[0, 0] == pytest.approx(log_probs[:, 0].sum())
    assert log_likelihoods([log_probs], []).shape == (1, 0)


@settings(max_examples=60, deadline=None)
@given(sequence=st.lists(st.integers(1, 5), min_size=1, max_size=12), spare=st.integers(0, 20), seed=st.integers(0, 99))
def test_the_alignment_is_as_good_as_torchaudios(sequence: list[int], spare: int, seed: int) -> None:
    frames = len(sequence) + sum(a == b for a, b in itertools.pairwise(sequence)) + spare
    log_probs = network_output(frames, 6, seed).astype(np.float32)
    spans = align(log_probs, sequence)
    assert [span.token for span in spans] == sequence
    path = np.zeros(frames, np.int64)
    for span in spans:
        assert (path[span.start_frame : span.end_frame] == 0).all() and span.end_frame > span.start_frame
        path[span.start_frame : span.end_frame] = span.token
    assert all(a.end_frame <= b.start_frame for a, b in itertools.pairwise(spans))
    theirs, _ = torchaudio.functional.forced_align(
        torch.from_numpy(log_probs)[None], torch.tensor([sequence], dtype=torch.int32), blank=0
    )
    rows = np.arange(frames)
    assert log_probs[rows, path].sum() == pytest.approx(log_probs[rows, theirs[0].numpy()].sum(), rel=1e-5)


def test_confidence_is_the_mean_probability_of_a_labels_frames() -> None:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    (span,) = align(np.log(probabilities), [1])
    assert (span.start_frame, span.end_frame) == (1, 3)
    assert span.confidence == pytest.approx(0.7)
