"""The next-word model: what it learns and remembers, what it writes, its files, and the commands."""

import dataclasses
import itertools
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from asr.decoding.next_word import END_ID, UNKNOWN_ID, TextScorer, make_small
from asr.decoding.ngram import END, UNKNOWN, estimate
from asr.decoding.ngram import perplexity as ngram_perplexity
from asr.errors import ConfigError, ModelError, TextError
from asr.next_word import NextWord, generate, load, perplexity, save
from asr.nn import CELLS
from asr.runtime.folder import NEXT_WORD_FOLDER
from asr.training.next_word import NextWordTraining, train_next_word
from pipelines.cli import main

NAMES, ACTS, PLACES = ("anna", "ben", "clara", "dan"), ("sleeps", "sings", "reads"), ("here", "outside")
LEXICON = (*NAMES, *ACTS, *PLACES)
SMALL = NextWordTraining(epochs=10, rows=4, steps=24, rate=2e-2, precision="fp32")


def stories(count: int, seed: int) -> list[str]:
    """Stories of six sentences about one person: "anna sings", "anna sleeps outside", ...; a new one may be anybody."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        name = rng.choice(NAMES)
        for _ in range(6):
            place = [rng.choice(PLACES)] if rng.random() < 0.5 else []
            lines.append(" ".join([name, rng.choice(ACTS), *place]))
    return lines


TRAIN, HELD_OUT = stories(150, seed=1), stories(40, seed=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of the stories."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / NEXT_WORD_FOLDER
    train_next_word(NextWord(LEXICON, size=32, dropout=0.0), TRAIN, folder, SMALL)
    return folder


def test_it_learns_the_grammar_and_remembers_over_the_sentences(trained: Path) -> None:
    model, _ = load(trained)
    carried, alone = perplexity(model, HELD_OUT), perplexity(model, HELD_OUT, carry=False)
    counts = Counter(word for line in TRAIN for word in (*line.split(), END))
    said = [word for line in HELD_OUT for word in (*line.split(), END)]
    unigram = math.exp(-sum(math.log(counts[word] / counts.total()) for word in said) / len(said))
    assert (carried.words, carried.unknown) == (len(said), 0)
    assert carried.value < 0.3 * unigram < 0.3 * len(model.words)
    assert carried.value < 0.8 * alone.value  # who the story is about
    assert carried.value < 0.85 * ngram_perplexity(estimate(TRAIN), HELD_OUT).value  # which no n-gram knows


def test_the_carried_state_is_what_came_before(trained: Path) -> None:
    model, _ = load(trained)
    first, second = ["ben sings"] * 3, ["clara sings"] * 3
    same = perplexity(model, first + first).value
    other = perplexity(model, second + first).value
    assert same < other


def test_perplexity_is_that_of_words_read_one_by_one(trained: Path) -> None:
    model, _ = load(trained)
    lines = ["dan reads here", "somebody sings", "dan sleeps"]
    state, last, logs = model.initial_state(1), END, []
    for word in (word for line in lines for word in (*line.split(), END)):
        scores, state = model.step(torch.tensor([[model.words.index(last)]]), state)
        known = word if word in model.words else UNKNOWN
        if known != UNKNOWN:
            logs.append(float(scores[0, 0].log_softmax(0)[model.words.index(known)].detach()))
        last = known
    got = perplexity(model, lines)
    assert got.value == pytest.approx(math.exp(-sum(logs) / len(logs)), rel=1e-5)
    assert (got.words, got.unknown) == (len(logs), 1) == (9, 1)


def test_what_it_writes_follows_the_seed_and_the_grammar(trained: Path) -> None:
    model, _ = load(trained)
    texts = [list(generate(model, "anna", words=60, seed=seed)) for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]
    for text in texts:
        assert sum(word != END for word in text) == 60
        assert UNKNOWN not in text and (END, END) not in itertools.pairwise(text)
        sentences = " ".join(["anna", *text]).split(f" {END} ")[:-1]
        right = [len(s.split()) in (2, 3) and s.split()[0] in NAMES and s.split()[1] in ACTS for s in sentences]
        assert sum(right) > 0.9 * len(sentences) > 10


def test_cold_or_from_one_word_it_takes_the_most_probable(trained: Path) -> None:
    model, _ = load(trained)
    cold = list(generate(model, "ben sings", words=20, temperature=1e-4, seed=1))
    assert cold == list(generate(model, "ben sings", words=20, top_k=1, seed=2))
    few = {word for seed in range(30) for word in generate(model, "ben", words=1, top_k=2, seed=seed)}
    assert few < set(ACTS) and len(few) == 2
    with pytest.raises(ConfigError, match=r"temperature 0: must be 0\.0001"):
        list(generate(model, "ben", temperature=0.0))
    with pytest.raises(ConfigError, match="top_k -1"):
        list(generate(model, "ben", top_k=-1))
    with pytest.raises(ConfigError, match="words -1: must be 0 or more"):
        generate(model, "ben", words=-1)
    assert list(generate(model, "ben", words=0)) == []


@pytest.mark.parametrize("kind", CELLS)
def test_every_cell_can_be_trained_kept_and_read_again(kind: str, tmp_path: Path) -> None:
    model = NextWord(LEXICON, kind=kind, size=8)
    train_next_word(model, TRAIN[:30], tmp_path / NEXT_WORD_FOLDER, NextWordTraining(epochs=1, rows=2, steps=20))
    again, about = load(tmp_path)  # the folder that holds it does too
    assert (again.kind, again.size, again.words, about["updates"]) == (kind, 8, model.words, 2)
    assert perplexity(again, HELD_OUT[:6]) == perplexity(model, HELD_OUT[:6])


def test_a_stopped_training_goes_on_as_if_undisturbed(tmp_path: Path) -> None:
    options = NextWordTraining(epochs=2, rows=4, steps=16)

    def train(folder: Path, stop: int | None = None) -> NextWord:
        def show(done: int, total: int, loss: float) -> None:
            if done == stop:
                raise KeyboardInterrupt

        torch.manual_seed(5)
        model = NextWord(LEXICON, size=12, dropout=0.3)
        train_next_word(model, TRAIN[:120], folder, options, show=show, save_every=3)
        return model

    whole = train(tmp_path / "whole")
    for stop in (5, 8):  # in the middle of an epoch: the carried state counts
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "stopped", stop)
    resumed = train(tmp_path / "stopped")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_other_text_or_options_are_refused_and_so_is_damage(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / NEXT_WORD_FOLDER
    options = NextWordTraining(epochs=1, rows=2, steps=8)
    train_next_word(NextWord(LEXICON, size=8), TRAIN[:20], folder, options)
    with pytest.raises(ConfigError, match="another training"):
        train_next_word(NextWord(LEXICON, size=8), TRAIN[:20], folder, NextWordTraining(epochs=2, rows=2, steps=8))
    with pytest.raises(ConfigError, match="another text"):
        train_next_word(NextWord(LEXICON, size=8), TRAIN[:21], folder, options)
    with pytest.raises(ConfigError, match=r'another kind \("lstm", not "gru"\)'):
        train_next_word(NextWord(LEXICON, size=8, kind="gru"), TRAIN[:20], folder, options)
    with pytest.raises(TextError, match="too few to train on"):
        train_next_word(NextWord(LEXICON, size=8), TRAIN[:2], tmp_path / "short", options)
    with pytest.raises(ConfigError, match=r"lstn: no such cell; there are rnn, gru, lstm"):
        NextWord(LEXICON, kind="lstn")
    (folder / "training.safetensors").write_bytes(b"{}")
    with pytest.raises(ModelError, match="cannot go on from here"):
        train_next_word(NextWord(LEXICON, size=8), TRAIN[:20], folder, options)
    (folder / "weights.npz").write_bytes(b"{}")
    with pytest.raises(ModelError, match="damaged"):
        load(folder)
    with pytest.raises(ModelError, match="no next-word model"):
        load(tmp_path / "nowhere")


def test_a_sample_of_the_words_teaches_what_all_of_them_do(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = dataclasses.replace(SMALL, sampled=40)
    train_next_word(NextWord(LEXICON, size=32, dropout=0.0), TRAIN, tmp_path / "sampled", options)
    by_all, by_few = (perplexity(load(folder)[0], HELD_OUT).value for folder in (trained, tmp_path / "sampled"))
    assert by_few == pytest.approx(by_all, rel=0.05)


def test_whole_texts_are_scored_without_torch(trained: Path, tmp_path: Path) -> None:
    """As torch does, word by word; shared beginnings, empty texts and unknown words included."""
    model, about = load(trained)
    lines = [*dict.fromkeys(HELD_OUT[:20]), "", "anna", "anna nods", "anna nods here", "here here here here"]
    expected = []
    for line in lines:
        wanted = model.encode([line])
        said = torch.cat([torch.tensor([END_ID]), wanted[:-1]])
        scores, _ = model.step(said[None], model.initial_state(1))
        expected.append(-float(torch.nn.functional.cross_entropy(scores[0], wanted, reduction="sum").detach()))
    scorer = TextScorer(trained)
    texts = [[scorer.numbers.get(word, UNKNOWN_ID) for word in line.split()] for line in lines]
    np.testing.assert_allclose(scorer.log_probs(texts), expected, rtol=1e-4)
    assert scorer.log_probs([]).shape == (0,)

    shutil.copytree(trained, tmp_path / "small")
    make_small(tmp_path / "small")
    np.testing.assert_allclose(TextScorer(tmp_path / "small").log_probs(texts), expected, rtol=0.03)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"model.json", "words.txt.gz", "weights.npz"}
    save(NextWord(LEXICON, kind="gru", size=8), tmp_path / "small", about)
    with pytest.raises(ModelError, match="its cell is 'gru'"):
        TextScorer(tmp_path / "small")


def test_beginnings_that_end_alike_share_a_memory(trained: Path) -> None:
    """Eight words after two texts differed, what follows is scored as after the first of them."""
    scorer = TextScorer(trained)
    first, other, *same, word = (scorer.numbers[name] for name in (LEXICON * 11)[:11])
    for alike in (same, same[:-2]):  # with the word, the latter are seven
        texts = [[first, *alike], [other, *alike], [first, *alike, word], [other, *alike, word]]
        alone = np.concatenate([scorer.log_probs([one]) for one in texts])
        together = scorer.log_probs(texts)
        np.testing.assert_allclose(together[[0, 2]], alone[[0, 2]], rtol=1e-5)
        added = together[2:] - together[:2]
        own = alone[2:] - alone[:2]
        assert abs(own[1] - own[0]) > 1e-3
        assert added[1] == pytest.approx(own[0] if alike is same else own[1], abs=1e-4)


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return int(ended.value.code or 0)


def test_the_commands_train_compare_and_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "m"
    text.write_text("".join(f"{line.capitalize()}.\n" for line in stories(250, seed=3)), encoding="utf-8")
    train = ("train-lm", text, "--out", out, "--kind", "gru", "--size", 16, "--epochs", 1)
    assert run(*train) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out / NEXT_WORD_FOLDER}: gru, 9 words, 0.0 M weights; perplexity on ")
    assert "(0 more are unknown)" in said and "n-grams of 3 words" in said
    assert run(*train) == 0 and capsys.readouterr().out == said  # it is there: nothing is trained again
    texts = []
    for _ in range(2):
        assert run("generate", "Anna gurgles", "--model", out, "--words", 12, "--seed", 7) == 0
        written, told = capsys.readouterr()
        texts.append(written)
        assert told == "not known to the model, read as <unk>: gurgles\n"
    assert texts[0] == texts[1] and texts[0].startswith("anna gurgles") and texts[0].endswith("\n")
    assert set(texts[0].split()) <= {"gurgles", *LEXICON} and len(texts[0].split()) == 14


def test_a_model_is_taken_further_on_other_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, backwards = tmp_path / "first", tmp_path / "second", tmp_path / "backwards.txt"
    lines = stories(2500, seed=3)
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    backwards.write_text("\n".join(" ".join(line.split()[::-1]) for line in lines), encoding="utf-8")
    train = ("--kind", "lstm", "--epochs")
    assert run("train-lm", tmp_path / "text.txt", "--out", first, *train, 4, "--size", 16) == 0
    assert run("train-lm", backwards, "--out", second, *train, 10, "--init-from", first, "--sampled", 4) == 0
    before, after = load(first)[0], load(second)[0]
    assert (after.words, after.size) == (before.words, before.size)
    lines = backwards.read_text(encoding="utf-8").splitlines()[:500]
    assert perplexity(after, lines).value < 0.8 * perplexity(before, lines).value
    capsys.readouterr()
    assert run("train-lm", backwards, "--out", tmp_path, "--kind", "gru", "--init-from", first) == 2
    assert "its cell is lstm, not gru" in capsys.readouterr().err
    assert run("train-lm", backwards, "--out", tmp_path, *train, 1, "--init-from", first, "--size", 8) == 2


def test_what_the_commands_refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three\n" * 20, encoding="utf-8")
    assert run("train-lm", text, "--out", tmp_path, "--kind", "lstm", "--prune", "0") == 2
    assert run("train-lm", text, "--out", tmp_path, "--size", "16") == 2
    capsys.readouterr()
    assert run("train-lm", text, "--out", tmp_path, "--kind", "lstn") == 2
    assert "lstn: no such cell; there are" in capsys.readouterr().err
    line = tmp_path / "line.txt"
    line.write_text("one two three " * 2000, encoding="utf-8")
    assert run("train-lm", line, "--out", tmp_path, "--kind", "lstn") == 2
    assert "--kind lstn: no such cell; there are" in capsys.readouterr().err
    assert run("train-lm", line, "--out", tmp_path, "--kind", "lstm") == 1
    assert "1 line: too few to train on" in (said := capsys.readouterr().err) and "2 lines are needed" in said
    assert run("train-lm", text, "--out", tmp_path, "--kind", "lstm") == 1
    assert "too few to train on" in capsys.readouterr().err
    (tmp_path / "model" / "offline").mkdir(parents=True)
    assert run("train-lm", text, "--out", tmp_path / "model", "--kind", "gru") == 2
    assert "its search reads --kind lstm alone" in capsys.readouterr().err
    assert run("generate", "one", "--words", -1) == 2
    assert "--words" in (said := capsys.readouterr().err) and "-1" in said
    assert run("generate", "one", "--model", tmp_path) == 1
    assert "no next-word model; make one with `asr train-lm" in capsys.readouterr().err
