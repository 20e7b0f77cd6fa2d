"""Section "search": our beam search with the language model against flashlight-text called directly. One core."""

import numpy as np

from asr.audio import EDGE_SILENCE_SECONDS, SAMPLE_RATE
from asr.decoding.beam import BeamConfig, BeamSearch
from asr.decoding.greedy import GreedyDecoder
from asr.lexicon import read_pronunciations
from asr.runtime import load_engine
from asr.runtime.folder import find_language_model, find_lexicon, phones_at_output
from asr.text import Tokenizer
from pipelines.bench.figures import Figure, interleaved
from pipelines.bench.setting import Setting

_BLOCK_FRAMES = 4


def run(setting: Setting) -> list[Figure]:
    """Times real time on the network's own output."""
    folder = setting.network("offline")
    model, words = find_language_model(setting.model)
    tokens = Tokenizer.load(folder / "tokens.txt").tokens
    search = BeamSearch(model, words, tokens, BeamConfig())
    edge = np.zeros(round(EDGE_SILENCE_SECONDS * SAMPLE_RATE), np.float32)
    engine = load_engine(folder)
    padded = [np.concatenate([edge, x, edge]) for x in setting.speech]
    spoken = engine.log_probs(padded)  # type: ignore[union-attr]

    def direct() -> None:
        """No times, no confidence, no partial text: the words of the best path."""
        for log_probs in spoken:
            (running,) = search.start()
            found = running.search.decode(log_probs.ctypes.data, *log_probs.shape)
            assert len(found)

    def ours(frames: int | None, partial: bool = False) -> None:
        for log_probs in spoken:
            decoder = search()
            for start in range(0, len(log_probs), frames or len(log_probs)):
                decoder.accept(log_probs[start : start + (frames or len(log_probs))])
                if partial:
                    decoder.tokens()
            decoder.finish()

    def greedy() -> None:
        for log_probs in spoken:
            decoder = GreedyDecoder()
            decoder.accept(log_probs)
            decoder.finish()

    parts = {
        "flashlight-text, called directly": direct,
        "ours, whole": lambda: ours(None),
        "ours, 160 ms blocks": lambda: ours(_BLOCK_FRAMES),
        "ours, 160 ms blocks, partial text after each": lambda: ours(_BLOCK_FRAMES, partial=True),
        "greedy, whole": greedy,
    }
    phones, lexicon = phones_at_output(folder), find_lexicon(setting.model)
    if phones and lexicon:
        both = BeamSearch(model, words, tokens, BeamConfig(), phones, read_pronunciations(lexicon))
        heard = load_engine(folder, phones=True).log_probs(padded)  # type: ignore[union-attr]

        def by_sound_too() -> None:
            for log_probs in heard:
                decoder = both()
                decoder.accept(log_probs)
                decoder.finish()

        parts["ours, by spelling and by sound, whole"] = by_sound_too
    return interleaved("beam search with language model", "x real time", setting.speech_seconds, parts, setting.rounds)
