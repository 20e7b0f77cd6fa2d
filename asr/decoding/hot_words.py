"""Hot words: phrases that a beam search is told to expect, each with a bonus."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from asr.errors import ConfigError
from asr.text import normalize

DEFAULT_BOOST = 5.0


def read_hot_words(path: str | Path) -> dict[str, float]:
    """The phrases of a file, a line each, with their boosts: `phrase`, or `phrase :boost` (as sherpa-onnx has it).

    A line that begins with # is a comment.

    Raises:
        ConfigError: the file cannot be read, or a line that is neither.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a readable list of hot words ({error})") from error
    found: dict[str, float] = {}
    for number, line in enumerate(lines, 1):
        if line.startswith("#"):
            continue
        phrase, colon, boost = line.rpartition(" :")
        phrase, boost = (phrase, boost) if colon else (line, str(DEFAULT_BOOST))
        try:
            value = float(boost)
        except ValueError:
            raise ConfigError(f"{path}, line {number}: {boost!r} is no boost; write `phrase :5.0`") from None
        if phrase.strip():
            found[phrase.strip()] = value
    return found


def check_hot_words(hot_words: Mapping[str, float], tokens: Iterable[str]) -> dict[tuple[str, ...], float]:
    """The phrases as words, normalised as texts are.

    Raises:
        ConfigError: a boost that is no number from 0 to 100, or a phrase that the vocabulary cannot spell.
    """
    letters = set(tokens)
    found: dict[tuple[str, ...], float] = {}
    for phrase, boost in hot_words.items():
        if not (math.isfinite(boost) and 0 <= boost <= 100):
            raise ConfigError(f"hot word {phrase!r}: boost = {boost!r}: must be 0 to 100")
        words = tuple(normalize(phrase).split())
        unknown = sorted(set("".join(words)) - letters)
        if not words or unknown:
            reason = f"the model has no {', '.join(map(repr, unknown))}" if unknown else "it has no letters"
            raise ConfigError(f"hot word {phrase!r} cannot be spelled: {reason}")
        found[words] = boost
    return found


class Phrases:
    """How far a text has come in any of some phrases: an automaton over words (Aho and Corasick 1975).

    Its nodes are the beginnings of phrases, the empty one being 0. A phrase's boost is lent out evenly, word by word,
    so that the search keeps it; when the phrase ends it is given for good, when it breaks off nothing is left of it.

    Args:
        phrases: sequences of word numbers with their boosts.
    """

    def __init__(self, phrases: Mapping[tuple[int, ...], float]) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._lent, self._given = [0.0], [0.0]  # at each node
        for words, boost in phrases.items():
            node = 0
            for i, word in enumerate(words, 1):
                if word not in self._next[node]:
                    self._next[node][word] = len(self._next)
                    self._next.append({})
                    self._lent.append(0.0)
                    self._given.append(0.0)
                node = self._next[node][word]
                if i < len(words):
                    self._lent[node] = max(self._lent[node], boost * i / len(words))
            self._given[node] = boost
        self._fall = [0] * len(self._next)  # the longest other beginning that a node's words end with
        queue = list(self._next[0].values())
        for node in queue:
            self._given[node] += self._given[self._fall[node]]  # phrases within phrases end too
            for word, child in self._next[node].items():
                self._fall[child] = self._follow(self._fall[node], word)
                queue.append(child)

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._next)

    def step(self, node: int, word: int) -> tuple[int, float]:
        """Read a word at a node: the next node, and what that adds to the score."""
        after = self._follow(node, word)
        return after, self._lent[after] - self._lent[node] + self._given[after]

    def lent(self, node: int) -> float:
        """What of the score at a node is for phrases that have not ended."""
        return self._lent[node]

    def _follow(self, node: int, word: int) -> int:
        while node and word not in self._next[node]:
            node = self._fall[node]
        return self._next[node].get(word, 0)
