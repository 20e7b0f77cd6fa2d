"""How many hot words were found, and what they cost the other words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from asr.metrics import ErrorCounts, count_errors
from asr.text import normalize


@dataclass(frozen=True, kw_only=True, slots=True)
class HotWordScore:
    """Counts over utterances; `said` and `found` count hot phrases, `false_alarms` those written where none was said.

    `other_wer` is the word error rate of what is left when the words of hot phrases are taken out of both texts; None
    where nothing else was said.
    """

    listed: int
    said: int
    found: int
    false_alarms: int
    other_wer: float | None

    def __str__(self) -> str:
        share = f" ({self.found / self.said:.1%})" if self.said else ""
        others = "is not defined, as none was said" if self.other_wer is None else f"{self.other_wer:.2%}"
        return (
            f"hot words: {self.listed} listed; {self.said} times said, {self.found} found{share}, "
            f"{self.false_alarms} false alarms; WER of the other words {others}"
        )

    def figures(self) -> dict[str, Any]:
        """The counts and rates as JSON holds them."""
        recall = self.found / self.said if self.said else None
        return {name: getattr(self, name) for name in self.__slots__} | {"recall": recall}


def score_hot_words(texts: Sequence[tuple[str, str]], hot_words: Iterable[str]) -> HotWordScore:
    """Count hot phrases in (reference, hypothesis) pairs: within an utterance, one in each text is one found."""
    phrases = sorted({tuple(normalize(phrase).split()) for phrase in hot_words} - {()}, key=len, reverse=True)
    said = found = written = 0
    others: list[tuple[str, str]] = []
    for reference, hypothesis in texts:
        wanted, reference_rest = _taken_out(reference, phrases)
        got, hypothesis_rest = _taken_out(hypothesis, phrases)
        said += len(wanted)
        written += len(got)
        found += sum(min(wanted.count(phrase), got.count(phrase)) for phrase in set(wanted))
        others.append((reference_rest, hypothesis_rest))
    counts = sum((count_errors(*pair) for pair in others), start=ErrorCounts())
    wer = counts.wer if counts.words else None
    return HotWordScore(listed=len(phrases), said=said, found=found, false_alarms=written - found, other_wer=wer)


def _taken_out(text: str, phrases: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], str]:
    """The hot phrases in a text, the longest first, and the text without them."""
    words, here, rest = normalize(text).split(), [], []
    position = 0
    while position < len(words):
        hit = next((p for p in phrases if tuple(words[position : position + len(p)]) == p), None)
        if hit:
            here.append(hit)
            position += len(hit)
        else:
            rest.append(words[position])
            position += 1
    return here, " ".join(rest)
