"""Section "search": our beam search with the language model against flashlight-text's, where installed. One core."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding import Decoder
from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.greedy import GreedyDecoder
from asr.decoding.language_model import Automaton
from asr.decoding.lexicon_search import LIKELIEST, THRESHOLD
from asr.decoding.next_word import TextScorer
from asr.decoding.ngram import NgramModel
from asr.decoding.ngram_files import read_ngrams, write_arpa
from asr.lexicon import read_pronunciations
from asr.runtime import load_engine
from asr.runtime.folder import find_language_model, find_lexicon, find_next_word, phones_at_output
from asr.runtime.reader import usual_block
from asr.text import Tokenizer
from pipelines.bench.figures import Figure, interleaved
from pipelines.bench.setting import Setting


def run(setting: Setting) -> list[Figure]:
    """Times real time on the network's own output."""
    folder = setting.network("offline")
    model = read_ngrams(find_language_model(setting.model))
    tokens, ngrams = Tokenizer.load(folder / "tokens.txt").tokens, Automaton(model)
    words, config = ngrams.lexicon, BeamConfig()
    search = BeamSearch(ngrams, words, tokens, config)
    edge = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
    engine = load_engine(folder)
    block = usual_block(engine.samples_per_frame)
    padded = [np.concatenate([edge, x, edge]) for x in setting.speech]
    spoken = engine.log_probs(padded)  # type: ignore[union-attr]

    def whole(make: Callable[[], Decoder], spoken: Sequence[np.ndarray] = spoken) -> None:
        for log_probs in spoken:
            decoder = make()
            decoder.accept(log_probs)
            decoder.finish()

    def in_blocks(partial: bool) -> None:
        for log_probs in spoken:
            decoder = search()
            for start in range(0, len(log_probs), block):
                decoder.accept(log_probs[start : start + block])
                if partial:
                    decoder.tokens()
            decoder.finish()

    decode = _flashlight(model, [word for word in words if set(word) <= set(tokens)], tokens, config)
    parts = {
        **({} if decode is None else {"flashlight-text, the words of the best path": lambda: decode(spoken)}),
        "ours, whole": lambda: whole(search),
        "ours, in blocks": lambda: in_blocks(partial=False),
        "ours, in blocks, partial text after each": lambda: in_blocks(partial=True),
        "greedy, whole": lambda: whole(GreedyDecoder),
    }
    phones, lexicon = phones_at_output(folder), find_lexicon(setting.model)
    if phones and lexicon:
        said, next_word = read_pronunciations(lexicon, words), find_next_word(setting.model)
        scorer = TextScorer(next_word) if next_word else None
        sounds = BeamSearch(ngrams, words, tokens, config, phones, said, scorer)
        heard = load_engine(folder, phones=True).log_probs(padded)  # type: ignore[union-attr]
        parts["ours, by sound, weighed by letters and next words too, whole"] = lambda: whole(sounds, heard)
    return interleaved("beam search with language model", "x real time", setting.speech_seconds, parts, setting.rounds)


def _flashlight(
    model: NgramModel, words: Sequence[str], tokens: Sequence[str], config: BeamConfig
) -> Callable[[Sequence[np.ndarray]], None] | None:
    """Its search in the same lexicon, with the same n-grams and settings; None where it is not installed."""
    try:
        from flashlight.lib.text import decoder as flashlight
        from flashlight.lib.text.decoder.kenlm import KenLM
        from flashlight.lib.text.dictionary import Dictionary
    except ImportError:
        return None
    space, dictionary = tokens.index(" "), Dictionary()
    for word in words:
        dictionary.add_entry(word)
    with tempfile.TemporaryDirectory() as folder:
        write_arpa(model, Path(folder) / "lm.arpa", digits=2)
        lm = KenLM(str(Path(folder) / "lm.arpa"), dictionary)
    trie, nothing = flashlight.Trie(len(tokens), space), lm.start(True)
    for i, word in enumerate(words):
        trie.insert([*(tokens.index(letter) for letter in word), space], i, lm.score(nothing, i)[1])
    trie.smear(flashlight.SmearingMode.MAX)
    options = flashlight.LexiconDecoderOptions(
        beam_size=config.beam, beam_size_token=min(LIKELIEST, len(tokens)), beam_threshold=THRESHOLD,
        lm_weight=config.lm_weight, word_score=config.word_score, unk_score=-float("inf"), sil_score=0.0,
        log_add=False, criterion_type=flashlight.CriterionType.CTC,
    )  # fmt: skip
    search = flashlight.LexiconDecoder(options, trie, lm, space, 0, -1, [], False)

    def decode(spoken: Sequence[np.ndarray]) -> None:
        for log_probs in spoken:
            assert len(search.decode(log_probs.ctypes.data, *log_probs.shape))

    return decode
