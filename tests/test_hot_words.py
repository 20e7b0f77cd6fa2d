"""Hot words: what phrases are worth along a text, what the search makes of them, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_beam import TOKENS, LanguageModel, decode, frames, make_lm

from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.hot_words import DEFAULT_BOOST, Phrases, read_hot_words
from asr.errors import ConfigError
from pipelines.evaluate_hot_words import score_hot_words

phrase = st.lists(st.integers(0, 2), min_size=1, max_size=3).map(tuple)


@given(st.dictionaries(phrase, st.floats(0, 10), max_size=5), st.lists(st.integers(0, 3), max_size=12))
def test_a_text_is_worth_the_boosts_of_the_phrases_in_it(
    boosts: dict[tuple[int, ...], float], words: list[int]
) -> None:
    phrases, node, total = Phrases(boosts), 0, 0.0
    for word in words:
        node, score = phrases.step(node, word)
        total += score
    places = [(i, p) for p in boosts for i in range(len(words)) if tuple(words[i : i + len(p)]) == p]
    assert total - phrases.lent(node) == pytest.approx(sum(boosts[p] for _, p in places), abs=1e-9)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_lm()


def search(lm: LanguageModel, **hot_words: float) -> BeamSearch:
    spelled = {name.replace("_", " "): boost for name, boost in hot_words.items()}
    return BeamSearch(*lm, TOKENS, BeamConfig(beam=50, lm_weight=1.0, word_score=0.5, hot_words=spelled))


def between(one: str, other: str, share: float = 0.6) -> np.ndarray:
    """Log-probabilities of frames that sound like both, more like the first."""
    return np.log(share * np.exp(frames(one)) + (1 - share) * np.exp(frames(other))).astype(np.float32)


def test_a_hot_word_is_heard_where_the_sounds_allow_it(lm: LanguageModel) -> None:
    heard = between("to be a rest", "to be a nest")
    assert decode(search(lm), heard) == "to be a rest"
    assert decode(search(lm, nest=8.0), heard) == "to be a nest"  # not even in the lexicon
    clear = frames("to be or not to be")
    assert decode(search(lm, nest=8.0), clear) == "to be or not to be"


def test_a_phrase_counts_as_a_whole(lm: LanguageModel) -> None:
    heard = between("sea to be", "set to be", 0.55)
    plain = decode(search(lm), heard)
    assert plain == "sea to be"
    assert decode(search(lm, set_to_be=8.0), heard) == "set to be"
    assert decode(search(lm, set_to_sea=8.0), heard) == plain  # begun, broken off: nothing is left of the boost


def test_blocks_of_any_size_give_the_same(lm: LanguageModel) -> None:
    hot = search(lm, nest=8.0, be_a_nest=3.0)
    heard = between("to be a rest", "to be a nest")
    decoder = hot()
    for i in range(0, len(heard), 3):
        decoder.accept(heard[i : i + 3])
    whole = hot()
    whole.accept(heard)
    assert decoder.finish() == whole.finish()


@pytest.mark.parametrize(
    ("hot_words", "named"),
    [({"a bee": 1.0, "quiz": 1.0}, "'quiz'"), ({"?!": 1.0}, "'?!'"), ({"bee": float("nan")}, "'bee'")],
)
def test_what_cannot_be_is_refused_by_name(lm: LanguageModel, hot_words: dict[str, float], named: str) -> None:
    with pytest.raises(ConfigError, match="hot word") as error:
        BeamSearch(*lm, TOKENS, BeamConfig(hot_words=hot_words))
    assert named in str(error.value)


def test_a_list_is_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "hot.txt"
    path.write_text("# people :1\n# places :note\nMister Quilter :3.5\n\nphoebe\n")
    assert read_hot_words(path) == {"Mister Quilter": 3.5, "phoebe": DEFAULT_BOOST}
    path.write_text("\ufeff# people\nphoebe\n", encoding="utf-8")  # as Notepad writes it
    assert read_hot_words(path) == {"phoebe": DEFAULT_BOOST}
    path.write_text("phoebe\nquilter :much\n")
    with pytest.raises(ConfigError, match="line 2: 'much'"):
        read_hot_words(path)
    with pytest.raises(ConfigError, match="missing"):
        read_hot_words(tmp_path / "missing.txt")


def test_hot_words_are_counted_apart_from_the_others() -> None:
    texts = [("mister quilter is here", "mister quilter was here"), ("the lemon fell", "the melon fell lemon tree")]
    score = score_hot_words(texts, ["Mister Quilter", "lemon", "tree"])
    assert (score.listed, score.said, score.found, score.false_alarms) == (3, 2, 2, 1)
    assert score.other_wer == pytest.approx(2 / 4)  # is/was; and melon, where lemon was said, is one too many


def test_where_hot_words_alone_are_said_there_is_no_rate_of_the_others() -> None:
    score = score_hot_words([("lemon", "the melon")], ["lemon"])
    assert score.figures()["other_wer"] is None
    assert "WER of the other words is not defined" in str(score)


def test_a_boost_of_0_gives_what_no_hot_word_gives(lm: LanguageModel) -> None:
    heard = frames("to be a nest")
    plain = decode(search(lm), heard)
    assert decode(search(lm, nest=5.0), heard) != plain  # "nest" is not in the lexicon
    assert decode(search(lm, nest=0.0), heard) == plain
    assert decode(search(lm, nest=0.0, be=5.0), heard) == decode(search(lm, be=5.0), heard)
