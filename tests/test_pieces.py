"""Cutting aligned utterances at their pauses: what the pieces hold, and that training sees the same words."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tones import write_corpus

from asr.lexicon import phones_of
from asr.training.data import Corpus
from asr.training.pieces import Piece, pieces
from asr.training.shards import STATES, ShardDataset, write_alignment

spoken = st.tuples(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 30), st.integers(1, 8))


def labels_of(words: list[tuple[list[int], int, int]]) -> np.ndarray:
    """The alignment of words: the phones of each, the pause after it in frames, the frames of each state."""
    states: list[int] = [0] * 5 + [1] * 5 + [2] * 5
    for phones, pause, length in words:
        for phone in phones:
            states += [phone * STATES + s for s in range(STATES) for _ in range(length)]
        states += sorted(i % STATES for i in range(pause)) if pause >= STATES else []
    return np.array(states, np.uint8)


@given(st.lists(spoken, min_size=1, max_size=12), st.floats(0.2, 3.0))
def test_pieces_hold_all_frames_and_words_in_order(words: list[tuple[list[int], int, int]], longest: float) -> None:
    labels, counts = labels_of(words), [len(phones) for phones, _, _ in words]
    found = pieces(labels, counts, longest)
    assert (found[0].start, found[0].first_word) == (0, 0)
    assert (found[-1].end, found[-1].end_word) == (len(labels), len(words))
    for one, other in itertools.pairwise(found):
        assert (one.end, one.end_word) == (other.start, other.first_word)
        assert labels[one.end] < STATES and labels[one.end - 1] < STATES  # within a silence
    for piece in found:
        inside = labels[piece.start : piece.end]
        begun = inside[np.diff(inside, prepend=-1) != 0]
        assert [b // STATES for b in begun if b >= STATES and b % STATES == 0] == [
            phone for phones, _, _ in words[piece.first_word : piece.end_word] for phone in phones
        ]


def test_pieces_are_as_long_as_may_be() -> None:
    words = [([1, 2], 20, 5)] * 6  # half a second each with its pause
    found = pieces(labels_of(words), [2] * 6, 1.2)
    assert [piece.end_word - piece.first_word for piece in found] == [2, 2, 2]
    assert all(piece.end - piece.start <= 120 for piece in found)
    assert len(pieces(labels_of([([1, 2], 0, 5)] * 6), [2] * 6, 1.2)) == 1  # no pause to cut in


def test_a_text_with_other_words_than_the_alignment_is_left_whole() -> None:
    labels = labels_of([([1, 2], 20, 5)] * 4)
    assert pieces(labels, [2, 2, 2], 0.5) == [Piece(0, len(labels), 0, 3)]


def test_a_corpus_reads_pieces_with_their_own_text_sound_and_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus(tmp_path / "data", rows=12)
    dataset = ShardDataset(folder)
    names = sorted({phone for text in dataset.texts for phone in phones_of(text).split()})
    labels = []
    for text, samples in zip(dataset.texts, dataset.n_samples, strict=True):
        frames = int(samples) // 160 // len(text.split())  # a word: its phones, ten frames of silence
        row: list[int] = []
        for word in text.split():
            states = [(names.index(p) + 1) * STATES + s for p in phones_of(word).split() for s in range(STATES)]
            row += [states[i * len(states) // (frames - 10)] for i in range(frames - 10)] + [0] * 10
        labels.append(np.array(row, np.uint8))
    write_alignment(folder, ["<silence>", *names], labels)

    whole, cut = Corpus([str(folder)]), Corpus([str(folder)], cut_seconds=0.5)
    assert [cut.text(i) for i in range(len(cut))] == [w for text in dataset.texts for w in text.split()]
    assert sum(cut.n_samples) == sum(whole.n_samples)
    joined = np.concatenate([cut.audio(i).numpy() for i in range(len(cut))])
    np.testing.assert_array_equal(joined, np.concatenate([whole.audio(i).numpy() for i in range(len(whole))]))
    states = np.concatenate([cut.states(i) for i in range(len(cut))])
    np.testing.assert_array_equal(states, np.concatenate([whole.states(i) for i in range(len(whole))]))
    assert all(len(cut.states(i)) == cut.n_samples[i] // 160 for i in range(len(cut)))

    stored = np.arange(whole.n_samples[0] // 160 * 20, dtype=np.float16).reshape(-1, 20)
    monkeypatch.setattr(ShardDataset, "features", lambda self, row: stored)
    of_first = [i for i, (_, row, _) in enumerate(cut.where) if row == 0]
    np.testing.assert_array_equal(np.concatenate([cut.features(i) for i in of_first]), stored)
    assert [len(cut.features(i)) for i in of_first] == [cut.n_samples[i] // 160 for i in of_first]
