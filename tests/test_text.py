"""Text: normalisation and the tokenizer, in any script."""

from pathlib import Path

import pytest
from hypothesis import given
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


@given(st.text())
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


def test_signs_are_no_tags() -> None:
    assert normalize("wenn a < b, dann ist b > a") == "wenn a b dann ist b a"
    assert normalize("so <unk> and <b>bold</b> <x> text") == "so and bold text"
