"""Beam search: against exhaustive search and torchaudio's decoder, across block borders, with and without a model."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from toy_model import FRAME, RATE, ToyEngine, spell
from toy_model import TOKENIZER as LETTERS

from asr.decoding import Decoder, Hypothesis, TokenSpan, words_from_tokens
from asr.decoding import beam as beam_module
from asr.decoding.beam import BeamConfig, BeamDecoder, BeamSearch
from asr.decoding.greedy import GreedyDecoder
from asr.decoding.language_model import Automaton
from asr.decoding.next_word import TextScorer
from asr.decoding.ngram import estimate
from asr.decoding.ngram_files import read_ngrams, write_arpa, write_ngrams
from asr.errors import ConfigError, ModelError
from asr.lexicon import Pronunciations
from asr.next_word import NextWord
from asr.recognizer import Network, Recognizer
from asr.text import Tokenizer
from asr.training.next_word import NextWordTraining, train_next_word
from pipelines.train_lm import train_lm

TOKENS = ("<blank>", " ", *"abenorst")
LINES = ["to be or not to be", "a bee to see", "not a bee", "sea to see", "rest a bit"]


LanguageModel = tuple[Automaton, tuple[str, ...]]


def make_lm(lines: Sequence[str] = LINES, order: int = 2) -> LanguageModel:
    """The model and its words."""
    model = estimate(lines, order=order)
    return Automaton(model), model.lexicon


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return make_lm()


@pytest.fixture(scope="module")
def search(lm: LanguageModel) -> BeamSearch:
    return BeamSearch(*lm, TOKENS, BeamConfig(beam=50, lm_weight=1.0, word_score=0.5, nbest=5))


def frames(path: str, probability: float = 0.9, tokens: Sequence[str] = TOKENS) -> np.ndarray:
    """Log-probabilities of a path, a character a frame, "_" for the blank; (frames, vocabulary)."""
    values = np.full((len(path), len(tokens)), math.log((1 - probability) / (len(tokens) - 1)), np.float32)
    for row, character in zip(values, path, strict=True):
        row[tokens.index("<blank>" if character == "_" else character)] = math.log(probability)
    return values


def random_frames(seed: int, count: int, vocabulary: int = len(TOKENS), spread: float = 2.0) -> np.ndarray:
    values = np.random.default_rng(seed).normal(0, spread, (count, vocabulary))
    return (values - np.log(np.exp(values).sum(axis=1, keepdims=True))).astype(np.float32)


def text(spans: Sequence[TokenSpan], tokens: Sequence[str] = TOKENS) -> str:
    return " ".join("".join(tokens[span.token] for span in spans).split())


def decode(search: BeamSearch, log_probs: np.ndarray) -> str:
    decoder = search()
    decoder.accept(log_probs)
    return text(decoder.finish()[0].tokens)


def test_the_model_mends_what_greedy_misspells(search: BeamSearch) -> None:
    misspelled = frames("__not to ba_", 0.6)
    misspelled[10, TOKENS.index("e")] = math.log(0.25)
    greedy = GreedyDecoder()
    greedy.accept(misspelled)
    assert text(greedy.tokens()) == "not to ba"
    assert decode(search, misspelled) == "not to be"


def test_words_are_parted_only_where_the_network_hears_a_space(lm: LanguageModel) -> None:
    search = BeamSearch(lm[0], ("to", "be", "tobe"), TOKENS, BeamConfig(lm_weight=0.0, word_score=1.0))
    assert decode(search, frames("_to_ _be_")) == "to be"
    assert decode(search, frames("_to_be_")) == "tobe"


def collapse(path: Sequence[int]) -> str:
    return "".join(TINY[token] for token, _ in itertools.groupby(path) if token)


TINY = ("<blank>", " ", "a", "b")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 6))
def test_a_wide_beam_without_a_model_finds_the_best_of_all_paths(lm: LanguageModel, seed: int, count: int) -> None:
    lexicon = ("a", "ab", "bab", "bb")
    search = BeamSearch(lm[0], lexicon, TINY, BeamConfig(beam=5000, lm_weight=0.0, word_score=0.0, nbest=6))
    log_probs = random_frames(seed, count, len(TINY))
    log_probs[:, 0] = np.minimum(log_probs[:, 0], log_probs[:, 1:].max(axis=1))  # else a frame may be passed over
    best: dict[str, float] = {}  # of all paths that say a text
    for path in itertools.product(range(len(TINY)), repeat=count):
        words = collapse(path).split()
        if set(words) <= set(lexicon):
            score = float(log_probs[np.arange(count), list(path)].sum())
            best[" ".join(words)] = max(score, best.get(" ".join(words), -math.inf))
    decoder = search()
    decoder.accept(log_probs)
    found = decoder.finish()
    assert found[0].score == pytest.approx(max(best.values()), abs=1e-4)
    for hypothesis in found:  # of the others it need not have seen the best path
        assert hypothesis.score <= best[text(hypothesis.tokens, TINY)] + 1e-4


def test_what_gave_way_to_a_likelier_beginning_is_still_among_the_n_best(lm: LanguageModel) -> None:
    """After two words in common nothing tells two hypotheses apart but the words before."""
    heard = np.log(0.6 * np.exp(frames("_be_e_ to be or not_")) + 0.4 * np.exp(frames("_se_e_ to be or not_")))
    search = BeamSearch(*lm, TOKENS, BeamConfig(beam=50, lm_weight=0.5, nbest=2))
    decoder = search()
    decoder.accept(heard.astype(np.float32))
    first, second = decoder.finish()
    assert (text(first.tokens), text(second.tokens)) == ("bee to be or not", "see to be or not")
    alone = BeamSearch(lm[0], [word for word in lm[1] if word != "bee"], TOKENS, BeamConfig(beam=50, lm_weight=0.5))()
    alone.accept(heard.astype(np.float32))
    assert second.score == pytest.approx(alone.finish()[0].score, abs=1e-4)


def test_texts_far_behind_the_best_are_not_told(lm: LanguageModel) -> None:
    search = BeamSearch(*lm, TOKENS, BeamConfig(beam=50, lm_weight=0.0, word_score=0.0, nbest=2))
    for far, told in ((7.0, ["bee", "see"]), (13.0, ["bee"])):  # natural log, by which "s" is less likely than "b"
        decoder = search()
        decoder.accept(np.log(np.exp(frames("_be_e_", 1 - 1e-9)) + math.exp(-far) * np.exp(frames("_se_e_", 1 - 1e-9))))
        assert [text(hypothesis.tokens) for hypothesis in decoder.finish()] == told


def test_torchaudios_decoder_finds_the_same(lm: LanguageModel, tmp_path: Path) -> None:
    decoders = pytest.importorskip("torchaudio.models.decoder", reason="torchaudio is not installed")
    torch = pytest.importorskip("torch")
    model, words = estimate(LINES, order=2), [word for word in lm[1] if set(word) <= set(TOKENS)]
    write_arpa(model, tmp_path / "lm.arpa", digits=9)
    (tmp_path / "lexicon.txt").write_text("".join(f"{word}\t{' '.join(word)} |\n" for word in words))
    oracle = decoders.ctc_decoder(
        lexicon=str(tmp_path / "lexicon.txt"), tokens=["-", "|", *TOKENS[2:]], lm=str(tmp_path / "lm.arpa"),
        nbest=5, beam_size=500, lm_weight=0.8, word_score=0.3, beam_threshold=100,
    )  # fmt: skip
    search = BeamSearch(lm[0], words, TOKENS, BeamConfig(beam=500, lm_weight=0.8, word_score=0.3, nbest=5))
    for seed in range(12):
        log_probs = random_frames(seed, 25)
        free_space = np.full((1, len(TOKENS)), -1e4, np.float32)
        free_space[0, :2] = 0.0
        expected = oracle(torch.from_numpy(np.concatenate([log_probs, free_space]))[None])[0]
        decoder = search()
        decoder.accept(log_probs)
        found = decoder.finish()
        assert text(found[0].tokens) == " ".join(expected[0].words)
        assert found[0].score == pytest.approx(expected[0].score, abs=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 40), min_size=1, max_size=8), st.sampled_from([16, 1500]))
def test_blocks_of_any_size_give_the_same_as_the_whole(
    search: BeamSearch, seed: int, sizes: list[int], commit: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beam_module, "_COMMIT_FRAMES", commit)
        patch.setattr(beam_module, "_LOOKBACK_FRAMES", 6)
        log_probs = random_frames(seed, 50, spread=3.0)
        whole, pieces = search(), search()
        whole.accept(log_probs)
        position = 0
        for size in itertools.chain(sizes, [len(log_probs)]):
            pieces.accept(log_probs[position : position + size])
            position += size
            copy = pieces.copy()
            assert copy.tokens() == pieces.tokens()
        assert pieces.tokens() == whole.tokens()
        assert pieces.finish() == whole.finish()


def test_a_copy_goes_its_own_way(search: BeamSearch) -> None:
    decoder = search()
    decoder.accept(frames("_to_ b"))
    copy = decoder.copy()
    decoder.accept(frames("e_"))
    copy.accept(frames("e_e_"))
    assert text(decoder.tokens()) == "to be"
    assert text(copy.finish()[0].tokens) == "to bee"
    assert text(decoder.finish()[0].tokens) == "to be"


def test_unfinished_words_are_told_and_whole_words_end_the_segment(search: BeamSearch) -> None:
    decoder = search()
    assert decoder.tokens() == []
    decoder.accept(frames("_to_ be_ no"))
    assert text(decoder.tokens()) == "to be no"
    decoder.accept(frames("t"))
    assert text(decoder.finish()[0].tokens) == "to be not"


@pytest.mark.parametrize("log_probs", [frames(""), frames("_"), frames("____"), frames("_  _")])
def test_silence_says_nothing(search: BeamSearch, log_probs: np.ndarray) -> None:
    decoder = search()
    decoder.accept(log_probs)
    assert decoder.tokens() == [] or text(decoder.tokens()) == ""
    assert text(decoder.finish()[0].tokens) == ""


def test_words_have_the_times_and_confidence_of_their_frames(search: BeamSearch) -> None:
    decoder = search()
    decoder.accept(frames("___too_ _bee__", 0.8))
    spans = decoder.finish()[0].tokens
    words = words_from_tokens(spans, TOKENS, start=0.0, end=9.0, frame=0.04, edge=0.0)
    assert [(w.text, pytest.approx(w.start), pytest.approx(w.end)) for w in words] == [
        ("to", 3 * 0.04, 6 * 0.04),
        ("be", 9 * 0.04, 12 * 0.04),
    ]
    assert words[0].confidence == pytest.approx(0.8**2, abs=1e-5)


def test_the_n_best_differ_and_come_best_first(search: BeamSearch) -> None:
    decoder = search()
    decoder.accept(frames("_to_ _see_", 0.3))
    found = decoder.finish()
    texts = [text(hypothesis.tokens) for hypothesis in found]
    assert len(texts) == len(set(texts)) == 5
    assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def test_a_segment_without_end_costs_the_same_for_every_block(
    search: BeamSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beam_module, "_COMMIT_FRAMES", 60)
    monkeypatch.setattr(beam_module, "_LOOKBACK_FRAMES", 20)
    decoder: BeamDecoder = search()
    read = []
    searched = beam_module.Running.read
    monkeypatch.setattr(beam_module.Running, "read", lambda s, b: (read.append(len(b)), searched(s, b)))
    for _ in range(100):
        decoder.accept(frames("_to_ _be_ "))
    assert text(decoder.tokens()) == " ".join(["to be"] * 100)
    assert sum(read) < 2 * 1000  # frames: what is searched again is less than what is new
    starts = [span.start_frame for span in decoder.finish()[0].tokens if span.token == TOKENS.index("b")]
    assert starts == list(range(6, 1000, 10))


def test_the_recognizer_searches_files_and_live_audio_alike(tmp_path: Path) -> None:
    model, words = make_lm(["the cat sat", "the dog ran"])
    config = BeamConfig(lm_weight=1.0, nbest=3)
    recognizer = Recognizer(
        {
            name: Network(LETTERS, ToyEngine, open_search=lambda: BeamSearch(model, words, LETTERS.tokens, config))
            for name in ("offline", "streaming")
        }
    )
    samples = spell("the kat sat")
    greedy = Recognizer({"offline": Network(LETTERS, ToyEngine)}).transcribe(samples, RATE)
    assert greedy.text == "the kat sat"
    assert greedy.segments[0].alternatives == ()
    whole = recognizer.transcribe(samples, RATE)
    assert whole.text == "the cat sat"
    assert [word.start for word in whole.words] == [word.start for word in greedy.words]
    first, second, *_ = whole.segments[0].alternatives
    assert (first.text, first.score > second.score) == ("the cat sat", True)
    live = recognizer.stream(RATE)
    partials = [live.feed(samples[i : i + FRAME]).partial for i in range(0, len(samples), FRAME)]
    assert "the" in partials
    assert live.finish() == recognizer.transcribe(samples, RATE, network="streaming")
    assert live.finish().text == "the cat sat"
    assert [t.text for t in recognizer.transcribe_batch([samples, spell("the dog")])] == ["the cat sat", "the dog"]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A model folder as `load` checks it; its graph is never opened."""
    network = tmp_path / "model" / "offline"
    network.mkdir(parents=True)
    (network / "config.toml").write_text("format_version = 1\n[model]\n")
    (network / "model.int8.onnx").touch()
    Tokenizer.characters(["tobenrsa"]).save(network / "tokens.txt")
    return tmp_path / "model"


def test_a_model_without_a_language_model_names_the_command(model_folder: Path, tmp_path: Path) -> None:
    Recognizer.load(model_folder)  # greedy
    with pytest.raises(ModelError, match=r"model: beam search needs.*`asr train-lm TEXT --out .*model`"):
        Recognizer.load(model_folder, decoding="beam")
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    train_lm([tmp_path / "text.txt"], model_folder, min_count=1)
    loaded = Recognizer.load(model_folder, decoding="beam", beam=7, lm_weight=0.5, word_score=-1.0, nbest=2)
    assert loaded.networks == ("offline",)


def test_what_cannot_be_is_refused(model_folder: Path, lm: LanguageModel, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="beam = 5: only with"):
        Recognizer.load(model_folder, decoding="greedy", beam=5)
    with pytest.raises(ConfigError, match=r"'bem'.*greedy, beam or transducer"):
        Recognizer.load(model_folder, decoding="bem")
    (model_folder / "lm").mkdir()
    write_ngrams(estimate(LINES), model_folder / "lm" / "lm.npz")
    for wrong in ({"beam": 0}, {"lm_weight": -1.0}, {"lm_weight": math.nan}, {"nbest": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Recognizer.load(model_folder, decoding="beam", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no space"):
        BeamSearch(*lm, ("<blank>", "a", "b"), BeamConfig())
    with pytest.raises(ConfigError, match="spells no word"):
        BeamSearch(*lm, ("<blank>", " ", "x"), BeamConfig())
    write_arpa(estimate(LINES), model_folder / "lm" / "lm.arpa.gz")
    for name in ("lm.npz", "lm.arpa.gz"):
        damaged = model_folder / "lm" / name
        for content in (b"", b"nothing of the kind", damaged.read_bytes()[:100], damaged.read_bytes()[:-30]):
            damaged.write_bytes(content)
            with pytest.raises(ModelError, match=rf"{name}: not a readable language model.*train-lm"):
                read_ngrams(damaged)
    assert capfd.readouterr() == ("", "")


# ---- a network that writes phones beside its tokens

PHONES = ("<blank>", "B", "IY", "N", "T", "UW", "AA")
SAID = [("to", "T UW"), ("two", "T UW"), ("bee", "B IY"), ("not", "N AA T")]
SAID_LINES = ["to be", "two bee", "not two bee", "to bee"]


def both(letters: str, said: str, probability: float = 0.6) -> np.ndarray:
    """Log-probabilities of letters, and of phones behind them: a phone a frame in `said`, "_" for the blank."""
    values = frames(letters, probability, (*TOKENS, "w"))
    phones = np.full((len(letters), len(PHONES)), math.log((1 - probability) / (len(PHONES) - 1)), np.float32)
    for row, phone in zip(phones, said.split(), strict=True):
        row[PHONES.index("<blank>" if phone == "_" else phone)] = math.log(probability)
    return np.concatenate([values, phones], axis=1)


def phone_search(said: Sequence[tuple[str, str]] = SAID, **settings: float) -> BeamSearch:
    model = estimate(SAID_LINES, order=2)
    config = BeamConfig(**{"lm_weight": 0.3, "word_score": 0.5, **settings})  # type: ignore[arg-type]
    return BeamSearch(
        Automaton(model), model.lexicon, (*TOKENS, "w"), config, PHONES, Pronunciations.of(said, model.lexicon)
    )


def test_what_the_letters_spell_badly_the_phones_tell() -> None:
    heard = both("to_n_t_n_____", "T UW _ _ _ _ B _ IY _ _ _ _")
    found = phone_search(phone_share=1.0)()
    found.accept(heard)
    tokens = (*TOKENS, "w")
    best = found.finish()[0].tokens
    assert text(best, tokens) in ("to bee", "two bee")
    assert [tokens[span.token] for span in best] == list(text(best, tokens))  # a span for each letter
    assert all(a.end_frame <= b.start_frame for a, b in itertools.pairwise(best))


@pytest.mark.parametrize("pause", [3, 12, 40])
def test_words_stay_apart_where_a_segment_without_end_is_written_down(
    pause: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beam_module, "_COMMIT_FRAMES", 30)
    monkeypatch.setattr(beam_module, "_LOOKBACK_FRAMES", 5)
    rest = "_ " * pause
    said = f"N AA T {rest}B IY {rest}T UW {rest}B IY {rest}".split()
    decoder, tokens = phone_search(phone_share=1.0)(), (*TOKENS, "w")
    decoder.accept(both("_" * len(said), " ".join(said), 0.9))
    shown = decoder.tokens()
    assert text(shown, tokens).replace("bee", "be").replace("two", "to") == "not be to be"
    assert all(a.end_frame <= b.start_frame for a, b in itertools.pairwise(shown))
    assert all(span.start_frame <= span.end_frame for span in shown)


@pytest.mark.parametrize("shift", range(5))
def test_of_a_word_that_goes_on_nothing_is_written_down(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not letters without length: "through" has seven in three frames."""
    monkeypatch.setattr(beam_module, "_COMMIT_FRAMES", 20)
    monkeypatch.setattr(beam_module, "_LOOKBACK_FRAMES", 5)
    model = estimate(["go through go through go through"] * 9, order=2)
    tokens, phones = ("<blank>", " ", *"ghortu"), ("<blank>", "G", "OW", "TH", "R", "UW")
    said = Pronunciations.of([("go", "G OW"), ("through", "TH R UW")], model.lexicon)
    config = BeamConfig(prior_weight=0.0)
    decoder = BeamSearch(Automaton(model), model.lexicon, tokens, config, phones, said)()
    heard = np.full((40 + shift, len(tokens) + len(phones)), -8.0, np.float32)
    heard[:, 0] = -0.01
    path = ["<blank>"] * shift + ["G", "OW", "TH", "R", "UW"] * 8
    heard[np.arange(len(path)), [len(tokens) + phones.index(phone) for phone in path]] = -0.01
    decoder.accept(heard)
    assert text(decoder.tokens(), tokens) == " ".join(["go through"] * 8)


def test_a_word_is_shown_once_its_last_phone_is_heard() -> None:
    heard = both("to_n_t_n_____", "T UW UW _ _ _ B _ IY _ _ _ _", 0.9)
    decoder, shown, tokens = phone_search()(), [], (*TOKENS, "w")
    for row in heard:
        decoder.accept(row[None])
        shown.append(text(decoder.tokens(), tokens))
    assert shown[0] == "" and shown[1] in ("to", "two") and shown[7] == shown[1]  # whatever the letters say
    assert shown[8] == shown[12] in ("to bee", "two bee")
    first, last = ([span for span in decoder.tokens() if span.start_frame < 6][i] for i in (0, -1))
    assert (first.start_frame, last.end_frame) == (0, 6)  # a space leads to the next word
    words = words_from_tokens(decoder.tokens(), tokens, start=0, end=13, frame=1, edge=0)
    assert [(word.start, word.end) for word in words] == [(0, 3), (6, 9)]
    assert all(word.confidence == pytest.approx(0.9, abs=1e-6) for word in words)


def test_letters_part_what_sounds_alike() -> None:
    search = phone_search(phone_share=0.5)
    for word in ("to", "two"):
        decoder = search()
        decoder.accept(both(f"{word}_ bee__"[:8], "T UW _ _ B IY _ _"))
        assert text(decoder.finish()[0].tokens, (*TOKENS, "w")).split()[0] == word


def test_a_word_without_pronunciation_is_still_found_by_its_letters() -> None:
    decoder = phone_search(phone_share=0.3)()
    decoder.accept(both("to be_____", "T UW _ B _ IY _ _ _ _", 0.8))
    assert text(decoder.finish()[0].tokens, (*TOKENS, "w")) == "to be"  # "be" is not in SAID


def test_where_the_letters_hear_silence_the_phones_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    search, noise = phone_search(phone_share=0.85), both("________", "T UW _ _ _ _ _ _", 0.9)

    def found(log_probs: np.ndarray) -> str:
        decoder = search()
        decoder.accept(log_probs)
        return text(decoder.finish()[0].tokens, (*TOKENS, "w"))

    assert found(noise) == ""
    assert found(both("to______", "T UW _ _ _ _ _ _", 0.9)) == "to"
    monkeypatch.setattr(beam_module, "_SPELLED", -math.inf)
    assert found(noise) == "to"


def test_a_second_reading_counts_as_much_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    search, tokens = phone_search(phone_share=0.5), (*TOKENS, "w")
    said = "T UW _ _ _ _ _ _"
    once, again = both("to______", said, 0.7), both("two_____", said, 0.98)

    def found(other: np.ndarray | None = None) -> Hypothesis:
        decoder = search()
        decoder.accept(once)
        return decoder.finish(other)[0]

    assert text(found().tokens, tokens) == "to"
    assert text(found(again).tokens, tokens) == "two"
    assert found(once).score > found().score  # heard once, the language model takes off more
    monkeypatch.setattr(beam_module, "_ONCE", (1.0, 0.0))
    assert found(once) == found()
    monkeypatch.setattr(beam_module, "_COMMIT_FRAMES", 6)  # of the segment's beginning nothing is left to weigh
    monkeypatch.setattr(beam_module, "_LOOKBACK_FRAMES", 2)
    assert found(again) == found()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 200), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_phones_in_any_blocks_give_one_text(seed: int, cuts: list[int]) -> None:
    # Noise is full of "to two two" and "two to two", between which a search chooses by chance; speech is not.
    search = phone_search([pair for pair in SAID if pair[0] != "two"])
    letters, phones = random_frames(seed, 30, len(TOKENS) + 1), random_frames(seed + 1, 30, len(PHONES))
    log_probs = np.concatenate([letters, phones], axis=1)
    whole, parts = search(), search()
    whole.accept(log_probs)
    expected = whole.copy().finish()
    for a, b in itertools.pairwise([0, *sorted(cuts), 30]):
        parts.accept(log_probs[a:b])
        parts.tokens()
    assert parts.finish() == expected == whole.finish()


def test_what_several_texts_have_right_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """No text has more than one place right, and one of them is behind those that are weighed as they are."""
    said = (1, 2, 3, 4, 5, 6)
    found = [(0, 2, 0, 4, 0, 6), (0, 2, 3, 4, 0, 6), (1, 2, 0, 4, 0, 6), (0, 2, 0, 4, 5, 6, 7)]
    search = phone_search()

    def weigh(readings: object, texts: Sequence[tuple[int, ...]], _: object) -> dict[tuple[int, ...], float]:
        return {text: -float(Levenshtein.distance(text, said)) for text in texts}

    monkeypatch.setattr(search, "weigh", weigh)
    monkeypatch.setattr(beam_module, "_CANDIDATES", 3)
    weighed = search.choose([], found)
    assert max(weighed, key=lambda text: weighed[text]) == said
    assert weighed[said] == 0
    monkeypatch.setattr(beam_module, "_ROUNDS", 0)
    assert search.choose([], found).keys() == {(), *found[:3]}


def test_silence_is_no_word_to_either() -> None:
    decoder = phone_search()()
    assert decoder.copy().finish()[0].tokens == ()
    decoder.accept(both("_" * 20, " ".join("_" * 20), 0.95))
    assert text(decoder.finish()[0].tokens, (*TOKENS, "w")) == ""


@pytest.mark.parametrize(("loudness", "heard"), [(0.5, ""), (0.95, "bee")])
def test_what_sounds_a_little_like_a_word_is_silence(loudness: float, heard: str) -> None:
    log_probs = both("_" * 8, " ".join("_" * 8), 0.95)
    for frame, phone in ((2, "B"), (4, "IY")):
        said = log_probs[frame, len(TOKENS) + 1 :]
        said[0], said[PHONES.index(phone)] = math.log(0.97 - loudness), math.log(loudness)
    decoder = phone_search(phone_share=1.0)()
    decoder.accept(log_probs)
    assert text(decoder.finish()[0].tokens, (*TOKENS, "w")) == heard


def test_what_another_network_heard_counts_as_well() -> None:
    def decoder_of(letters: str, sure: float) -> BeamDecoder:
        decoder = phone_search(phone_share=0.5, lm_weight=0.01)()
        decoder.accept(both(letters, "T UW _ _ _ _ _ _", sure))
        return decoder

    def written(other: Decoder | None = None) -> str:
        return text(decoder_of("to______", 0.8).finish(other=other)[0].tokens, (*TOKENS, "w"))

    assert written() == written(GreedyDecoder()) == written(decoder_of("to______", 0.8)) == "to"
    assert written(decoder_of("two_____", 0.99)) == "two"
    without_phones = BeamSearch(
        Automaton(estimate(SAID_LINES, order=2)), ["two"], (*TOKENS, "w"), BeamConfig(lm_weight=0.01)
    )()
    without_phones.accept(both("two_____", "T UW _ _ _ _ _ _", 0.99)[:, : len(TOKENS) + 1])
    assert written(without_phones) == "to"  # a network of other outputs says nothing of these


def test_a_boost_adds_what_it_says_to_one_reading_and_to_two() -> None:
    text = (estimate(SAID_LINES, order=2).lexicon.index("bee"),)
    reading = both("bee_____", "B IY _ _ _ _ _ _", 0.8)
    plain, hot = phone_search(), phone_search(hot_words={"bee": 4.0})  # type: ignore[arg-type]
    for readings in ([reading], [reading, reading]):
        added = hot.weigh(readings, [(), text])[text] - plain.weigh(readings, [(), text])[text]
        assert added == pytest.approx(4.0)


def test_by_phones_alone_too_a_text_needs_frames_for_its_letters() -> None:
    decoder = phone_search(said=[("to", "T"), ("be", "B"), ("bee", "B")], phone_share=1.0)()
    decoder.accept(both("__", "T B", 0.95))
    assert len(decoder.finish()[0].tokens) <= 2


def test_a_next_word_model_weighs_what_the_searches_found(tmp_path: Path) -> None:
    """The n-grams know both words alike; the network has only ever read one of them after "not"."""
    torch.manual_seed(0)
    lines = ["not two", "to be"] * 60
    model = NextWord(("be", "not", "to", "two"), size=16, dropout=0.0)
    train_next_word(model, lines, tmp_path / "next-word", NextWordTraining(epochs=12, rows=4, steps=10, rate=2e-2))
    ngrams, tokens = estimate(["not to", "not two", "to be", "two be"], order=2), (*TOKENS, "w")
    said = Pronunciations.of([("to", "T UW"), ("not", "N AA T")], ngrams.lexicon)
    heard = both("not t__o__", "N AA T _ T UW _ _ _ _", 0.55)
    heard[:, len(TOKENS)] += 1.5  # the w is among the labels that are tried
    found = {}
    for phones, share in itertools.product(((), PHONES), (0.0, 1.0)):
        config = BeamConfig(lm_weight=2.0, word_score=0.5, phone_share=0.0, network_share=share, nbest=5)
        scorer = TextScorer(tmp_path / "next-word")
        search = BeamSearch(Automaton(ngrams), ngrams.lexicon, tokens, config, phones, said, scorer)
        decoder = search()
        decoder.accept(heard if phones else heard[:, : len(tokens)])
        found[bool(phones), share] = text(decoder.finish()[0].tokens, tokens)
    assert found == {(False, 0.0): "not to", (False, 1.0): "not two", (True, 0.0): "not to", (True, 1.0): "not two"}


def test_priors_are_taken_off_what_the_network_says() -> None:
    """As if it had said less of what is frequent; only times and confidences are those of what it said."""
    model = estimate(SAID_LINES, order=2)
    rng = np.random.default_rng(1)
    log_probs = np.concatenate([random_frames(3, 40, len(TOKENS) + 1), random_frames(4, 40, len(PHONES))], axis=1)
    priors = np.log(rng.uniform(0.01, 0.5, log_probs.shape[1])).astype(np.float32)
    tokens, said = (*TOKENS, "w"), Pronunciations.of(SAID, model.lexicon)

    def decode(log_probs: np.ndarray, weight: float, given: np.ndarray | None) -> list[tuple[str, float]]:
        config = BeamConfig(lm_weight=0.3, word_score=0.5, prior_weight=weight, nbest=5)
        decoder = BeamSearch(Automaton(model), model.lexicon, tokens, config, PHONES, said, None, given)()
        for start in range(0, 40, 7):
            decoder.accept(log_probs[start : start + 7])
        return [(text(h.tokens, tokens), round(h.score, 3)) for h in decoder.finish()]

    found = decode(log_probs, 0.5, priors)
    assert found == decode(log_probs - 0.5 * priors, 0.5, None)
    assert decode(log_probs, 0.0, priors) == decode(log_probs, 0.5, None) != found
    with pytest.raises(ModelError, match="3 priors for 18 outputs"):
        decode(log_probs, 0.5, priors[:3])
    with pytest.raises(ConfigError, match="prior_weight"):
        BeamConfig(prior_weight=-1.0)
