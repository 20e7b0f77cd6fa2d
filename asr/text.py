"""Text as the recognizer writes it: normalisation, and the tokenizer that spells it."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from asr.errors import TextError

BLANK = "<blank>"
SPACE = "<space>"
_APOSTROPHES = str.maketrans({"’": "'", "ʼ": "'", "‘": "'", "`": "'"})
# Accents that stand alone: NFKC would make a space of them, and an accent for it to carry.
_ACCENTS = {
    **dict.fromkeys("´\u1ffd᾽᾿", "'"),
    **dict.fromkeys("¨¯¸˘˙˚˛˜˝ͺ΄΅῀῁῍῎῏῝῞῟῭\u1fee῾‗‾゛゜\ufe49\ufe4a\ufe4b\ufe4c￣", " "),
    **dict.fromkeys("\ufc5e\ufc5f\ufc60\ufc61\ufc62\ufc63\ufe70\ufe72\ufe74\ufe76\ufe78\ufe7a\ufe7c\ufe7e", " "),
}
_DOTTED_I = re.compile("i\u0307+")  # what Turkish \u0130 is in lower case
_ZERO_WIDTH_SPACE = "\u200b"
_INSIDE_WORDS = "'\u200c\u200d"
_TAG = re.compile(r"<[^\s<>](?:[^<>]{0,38}[^\s<>])?>|\[[^\[\]]{1,40}\]")  # not "a < b > c"


class _Table(dict[int, str]):
    """What `rule` makes of each character, for str.translate."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self._rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = made = self._rule(chr(code))
        return made


def _seen(character: str) -> str:
    """Nothing in place of what cannot be seen (a soft hyphen, the direction of writing), and no accent alone."""
    if unicodedata.category(character) == "Cf" and character not in _INSIDE_WORDS + _ZERO_WIDTH_SPACE:
        return ""
    return _ACCENTS.get(character, character)


def _kept(character: str) -> str:
    """A space in place of punctuation."""
    return " " if unicodedata.category(character)[0] in "PSZC" and character not in _INSIDE_WORDS else character


_SEEN, _KEPT = _Table(_seen), _Table(_kept)


def normalize(text: str) -> str:
    """Return `text` as it is scored and trained on, in any script: NFKC, lower case, without punctuation.

    An apostrophe is kept inside a word ("don't") and dropped at its edges, as are the joiners by which some scripts
    write; a hyphen or a slash parts words. What stands in <> or [] is no speech: "[laughter]", "<unk>".
    """
    # What cannot be seen goes first: it would keep a letter and its accent from being one character.
    text = unicodedata.normalize("NFKC", text.translate(_SEEN)).lower()
    text = _DOTTED_I.sub("i", text).translate(_APOSTROPHES)
    text = _TAG.sub(" ", unicodedata.normalize("NFKC", text))
    words = (word.strip(_INSIDE_WORDS) for word in text.translate(_KEPT).split())
    return " ".join(word for word in words if word)


class Tokenizer:
    """A vocabulary of characters with the CTC blank at index 0.

    Args:
        tokens: the vocabulary in order; the first one is `<blank>`, a space is a plain " ".
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        if not tokens or tokens[0] != BLANK or len(set(tokens)) != len(tokens):
            raise TextError(f"a vocabulary starts with {BLANK} and repeats nothing; got {list(tokens)[:5]} ...")
        self.tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}

    @classmethod
    def characters(cls, texts: Iterable[str]) -> "Tokenizer":
        """The vocabulary of all characters that occur in `texts` (normalised here)."""
        found: set[str] = set()
        for text in texts:
            found.update(normalize(text))
        return cls([BLANK, *sorted(found | {" "})])

    def extended(self, texts: Iterable[str]) -> "Tokenizer":
        """These tokens, and behind them the characters of `texts` (normalised here) that they lack."""
        found = Tokenizer.characters(texts).tokens
        return Tokenizer([*self.tokens, *(token for token in found if token not in self._ids)])

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read `tokens.txt`: a token a line, in order.

        Raises:
            TextError: the file is missing or is not a vocabulary.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{path}: cannot read the vocabulary ({error})") from error
        try:
            return cls([" " if line == SPACE else line for line in lines if line])
        except TextError as error:
            raise TextError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write `tokens.txt`; the space is written `<space>`."""
        lines = [SPACE if token == " " else token for token in self.tokens]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> list[int]:
        """Token indices of `text`, normalised first.

        Raises:
            TextError: a character is not in the vocabulary; all such characters are named.
        """
        text = normalize(text)
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            named = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in unknown)
            raise TextError(f"the vocabulary of {len(self)} tokens cannot spell {named} in {text!r}")
        return [self._ids[c] for c in text]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token indices; blanks are dropped, repeats are kept."""
        return "".join(self.tokens[i] for i in ids if i != 0)
