"""Text: normalisation and the tokenizer, in any script."""

import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asr.errors import TextError
from asr.text import Tokenizer, normalize


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("Hello,   World!", "hello world"),
        ("don’t 'quote' me", "don't quote me"),
        ("well-known and/or", "well known and or"),
        ("ＦＵＬＬ width", "full width"),
        ("GRÖßE der STRAẞE", "größe der straße"),
        ("ΕΛΛΆΣ", "ελλάς"),
        ("İstanbul", "istanbul"),
        ("こんにちは、世界。", "こんにちは 世界"),
        ("\tline\nbreak ", "line break"),
        ("so [laughter] <unk> well [background noise]", "so well"),
        ("［ノイズ］ はい", "はい"),
        ("a < b and [c", "a b and c"),
        ("inter\u00adview\u200bwith \u200eher", "interview with her"),  # a soft hyphen, a zero-width space, a direction
        ("ශ්\u200dරී \u200d می\u200cروم\u200c", "ශ්\u200dරී می\u200cروم"),
        ("", ""),
    ],
)
def test_normalize(written: str, normal: str) -> None:
    assert normalize(written) == normal


ODD = "aeiIİΣ' -<[\u00ad\u200b\u200d\u0301\u0307\u0323´˘ﹰ"  # what combines, or keeps others from it


@example("e\u00ad\u0301")
@example("i\u0307\u0307")
@given(st.text() | st.text(st.sampled_from(ODD) | st.characters(categories=["Cf", "Mn"])))
def test_normalizing_twice_changes_nothing(text: str) -> None:
    assert normalize(normalize(text)) == normalize(text)


def test_characters_round_trip_in_any_script(tmp_path: Path) -> None:
    sentence = "きょうは いい てんき です"
    tokenizer = Tokenizer.characters([sentence, "it's fine"])
    tokenizer.save(tmp_path / "tokens.txt")
    loaded = Tokenizer.load(tmp_path / "tokens.txt")
    assert loaded.tokens == tokenizer.tokens
    assert loaded.decode(loaded.encode(sentence)) == sentence
    assert loaded.tokens[0] == "<blank>"


def test_what_cannot_be_spelled_is_named() -> None:
    with pytest.raises(TextError, match=r"'é' \(U\+00E9\)"):
        Tokenizer.characters(["cafe"]).encode("café")


def test_a_vocabulary_without_blank_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"tokens\.txt"):
        Tokenizer.load(tmp_path / "tokens.txt")
    with pytest.raises(TextError, match=r"missing\.txt"):
        Tokenizer.load(tmp_path / "missing.txt")


def test_accents_that_stand_alone_are_apostrophes_or_nothing() -> None:
    assert normalize("Wie geht´s? L´été, ¨Hallo¨ ¸ ˘") == "wie geht's l'été hallo"
    assert normalize("a´") == "a"
    assert normalize("か゛ ῏Ω ΄α α΅ \ufc5e") == "か ω α α"


def test_all_accents_that_stand_alone_are_known() -> None:
    """What NFKC makes a space and accents of."""
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.decomposition(character):
            first, *others = unicodedata.normalize("NFKC", character)
            if first == " " and others and all(unicodedata.category(other)[0] == "M" for other in others):
                assert normalize(f"a{character}b") in ("ab", "a b", "a'b"), f"U+{ord(character):04X}"


def test_an_accent_finds_its_letter_behind_what_cannot_be_seen() -> None:
    assert normalize("caf" + "e\u00ad\u0301") == "café"
    assert normalize("I\u200e\u0307\u0307") == "i"


def test_signs_are_no_tags() -> None:
    assert normalize("wenn a < b, dann ist b > a") == "wenn a b dann ist b a"
    assert normalize("so <unk> and <b>bold</b> <x> text") == "so and bold text"
