"""A network of a model: how it reads utterances."""

from collections.abc import Sequence

import numpy as np
import pytest
from toy_model import FRAME, ToyEngine, spell
from toy_model import TOKENIZER as LETTERS

from asr.decoding import Decoder, Hypothesis
from asr.decoding.greedy import GreedyDecoder
from asr.network import Network


def test_only_who_weighs_texts_reads_twice() -> None:
    class Counting(ToyEngine):
        def log_probs(self, batch: Sequence[np.ndarray]) -> list[np.ndarray]:
            lengths.append([len(samples) for samples in batch])
            return super().log_probs(batch)

    class Weighing(GreedyDecoder):
        weighs = True

        def finish(self, again: np.ndarray | None = None, other: Decoder | None = None) -> list[Hypothesis]:
            read.append((self._frames, None if again is None else len(again)))
            return super().finish()

    samples = [spell("a dog"), spell("cats"), np.zeros(0, np.float32)]
    for decoder in (GreedyDecoder, Weighing):
        lengths: list[list[int]] = []
        read: list[tuple[int, int | None]] = []
        found = Network(LETTERS, Counting, open_search=lambda decoder=decoder: decoder).read(samples)
        assert ["".join(LETTERS.decode([s.token for s in h.tokens])) for [h] in found] == ["a dog", "cats", ""]
        if decoder is GreedyDecoder:
            assert len(lengths) == 1 and not read
        else:
            (once, slower), edges = lengths, lengths[0][0]  # the empty one is nothing but edges
            assert slower == pytest.approx([edges + (n - edges) / 0.9 for n in once], abs=2)
            assert sorted(read) == sorted((n // FRAME, m // FRAME) for n, m in zip(once, slower, strict=True))


def test_who_weighs_texts_is_told_what_others_heard_of_the_same() -> None:
    told: dict[int, Decoder | None] = {}  # by the frames of what was read

    class Weighing(GreedyDecoder):
        weighs = True

        def finish(self, again: np.ndarray | None = None, other: Decoder | None = None) -> list[Hypothesis]:
            told[self._frames] = other
            return super().finish()

    samples = [spell("a dog"), spell("cats and dogs"), spell("a")]
    network = Network(LETTERS, ToyEngine, open_search=lambda: Weighing)
    others = [GreedyDecoder() for _ in samples]
    network.read(samples, others)
    in_order = [told[frames] for frames in sorted(told)]  # the shortest first
    assert in_order == [others[2], others[0], others[1]]
    network.read(samples)
    assert list(told.values()) == [None] * 3
