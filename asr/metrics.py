"""How well a text was recognized: word and character error rates, as counts that add up."""

from dataclasses import dataclass, fields
from itertools import zip_longest

from asr.text import normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorCounts:
    """Errors of hypotheses against references; counts of several utterances add up with `+` and `sum`.

    Attributes:
        words: words in the reference.
        substitutions, deletions, insertions: words wrong, missing and too many, in the cheapest alignment.
        characters: characters in the reference, the spaces between words included.
        character_errors: substituted, missing and additional characters.
    """

    words: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    characters: int = 0
    character_errors: int = 0

    @property
    def word_errors(self) -> int:
        """Substitutions, deletions and insertions together."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def wer(self) -> float:
        """Word error rate as a fraction; above 1 if much is inserted, infinite for errors without words."""
        return _rate(self.word_errors, self.words)

    @property
    def cer(self) -> float:
        """Character error rate as a fraction; infinite for errors without a reference character."""
        return _rate(self.character_errors, self.characters)

    def __add__(self, other: "ErrorCounts") -> "ErrorCounts":
        return ErrorCounts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __radd__(self, other: int) -> "ErrorCounts":
        """Lets `sum(counts)` start from its 0."""
        return self if other == 0 else NotImplemented


def count_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Compare two texts, both normalised first (`asr.text.normalize`)."""
    import jiwer

    reference, hypothesis = normalize(reference), normalize(hypothesis)
    if not reference or not hypothesis:  # nothing to align; jiwer refuses an empty reference
        return ErrorCounts(
            words=len(reference.split()),
            deletions=len(reference.split()),
            insertions=len(hypothesis.split()),
            characters=len(reference),
            character_errors=len(reference) + len(hypothesis),
        )
    words = jiwer.process_words(reference, hypothesis)
    characters = jiwer.process_characters(reference, hypothesis)
    return ErrorCounts(
        words=len(reference.split()),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        characters=len(reference),
        character_errors=characters.substitutions + characters.deletions + characters.insertions,
    )


def align_words(reference: str, hypothesis: str) -> list[tuple[str | None, str | None]]:
    """Pair the words of two texts, both normalised first, in the cheapest alignment; None: a word without a partner.

    Returns:
        (reference word, hypothesis word) in order; their errors are those that `count_errors` counts.
    """
    import jiwer

    said, written = normalize(reference).split(), normalize(hypothesis).split()
    if not said or not written:
        return list(zip_longest(said, written))
    pairs: list[tuple[str | None, str | None]] = []
    for chunk in jiwer.process_words(" ".join(said), " ".join(written)).alignments[0]:
        pairs += zip_longest(
            said[chunk.ref_start_idx : chunk.ref_end_idx], written[chunk.hyp_start_idx : chunk.hyp_end_idx]
        )
    return pairs


def _rate(errors: int, total: int) -> float:
    if total == 0:
        return float("inf") if errors else 0.0
    return errors / total
