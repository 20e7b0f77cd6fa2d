"""Word n-gram language models: interpolated modified Kneser-Ney, pruned."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from asr.errors import TextError

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
_UNKNOWN, _START, _END = 0, 1, 2  # their word indices
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is too small to estimate them
LOG10 = math.log(10.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grams:
    """All n-grams of one order, sorted by (prefix, word); arrays of one length.

    Attributes:
        prefix: the n-gram without its last word, as an index into the order below (0 for words).
        suffix: the n-gram without its first word, likewise; -1, not looked up, in the highest order of a packed file.
        word: index of the last word.
        count: how often it occurs.
        log_prob: natural log of the last word's probability after the others.
        log_backoff: natural log of the weight of the order below, after this n-gram.
    """

    prefix: np.ndarray
    suffix: np.ndarray
    word: np.ndarray
    count: np.ndarray
    log_prob: np.ndarray
    log_backoff: np.ndarray

    def __len__(self) -> int:
        return len(self.word)

    def find(self, prefix: np.ndarray, word: np.ndarray, words: int) -> np.ndarray:
        """Where n-grams of these prefixes, -1 where there is none, and last words stand; -1 for those not here.

        Args:
            words: how many the vocabulary has.
        """
        keys, wanted = (p.astype(np.int64) * words + w for p, w in ((self.prefix, self.word), (prefix, word)))
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where((keys[place] == wanted) & (prefix >= 0), place, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NgramModel:
    """A back-off model; every n-gram's prefix and suffix are in it too.

    Attributes:
        words: the vocabulary: <unk>, <s>, </s>, then words, the most frequent first.
        orders: unigrams first; unigram i is word i.
    """

    words: tuple[str, ...]
    orders: tuple[Grams, ...]

    @property
    def lexicon(self) -> tuple[str, ...]:
        """The words that can be said."""
        return self.words[_END + 1 :]


@dataclass(frozen=True, kw_only=True, slots=True)
class Perplexity:
    """How well a model predicts a text: `value` over `words` (sentence ends included), `unknown` ones left out."""

    value: float
    words: int
    unknown: int


def estimate(
    lines: Sequence[str],
    *,
    order: int = 3,
    vocabulary: int | None = None,
    min_count: int = 1,
    lexicon: Iterable[str] = (),
) -> NgramModel:
    """Estimate an unpruned model by interpolated modified Kneser-Ney (Chen and Goodman, 1998).

    About 250 bytes of memory to a word of text and order.

    Args:
        lines: sentences, words parted by spaces, normalised already.
        order: words to an n-gram.
        vocabulary: keep so many words, the most frequent ones; None keeps all.
        min_count: keep words that occur at least so often. Other words count as <unk>.
        lexicon: more words to keep, however rare. One that the text lacks gets the probability of a word that was
            never seen.

    Raises:
        TextError: there is no text.
    """
    words = _vocabulary(lines, vocabulary, min_count, lexicon)
    stream = _encode(lines, words)
    place = np.arange(len(stream))
    depth = place - np.maximum.accumulate(np.where(stream == _START, place, 0))  # words since <s>

    nothing = np.zeros(len(words), np.int64)
    counts = [np.bincount(stream, minlength=len(words))]
    grams = [(nothing, nothing, np.arange(len(words)))]
    ids = stream  # of the n-gram that ends at each place
    for n in range(2, order + 1):
        ends = np.flatnonzero(depth >= n - 1)
        if not len(ends):
            break
        keys = ids[ends - 1] * len(words) + stream[ends]
        unique, first, inverse, count = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        grams.append((unique // len(words), ids[ends[first]], unique % len(words)))
        counts.append(count)
        ids = np.full(len(stream), -1)
        ids[ends] = inverse
    return NgramModel(words=words, orders=_smooth(grams, counts))


def _vocabulary(lines: Sequence[str], size: int | None, min_count: int, lexicon: Iterable[str]) -> tuple[str, ...]:
    found: Counter[str] = Counter()
    for line in lines:
        found.update(line.split())
    for special in (UNKNOWN, START, END):
        found.pop(special, None)
    if not found:
        raise TextError("no words in the text: a language model needs some")
    ranked = sorted((w for w, count in found.items() if count >= min_count), key=lambda w: (-found[w], w))
    kept = (UNKNOWN, START, END, *ranked[:size])
    return (*kept, *sorted(set(lexicon).difference(kept)))


def _encode(lines: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """Word indices of all sentences, each from <s> to </s>; int64 (places,)."""
    index = {word: i for i, word in enumerate(words) if i > _END}
    unknown = itertools.repeat(_UNKNOWN)
    sentences = ((_START, *map(index.get, line.split(), unknown), _END) for line in lines)
    return np.fromiter(itertools.chain.from_iterable(sentences), np.int64)


def _smooth(
    grams: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], counts: Sequence[np.ndarray]
) -> tuple[Grams, ...]:
    """Probabilities and back-off weights from the n-grams (prefix, suffix, word) of each order and their counts."""
    probs: list[np.ndarray] = []
    backoffs: list[np.ndarray] = []
    starts = np.zeros(0, bool)  # n-grams that begin with <s>
    for n, ((prefix, suffix, word), count) in enumerate(zip(grams, counts, strict=True)):
        starts = word == _START if n == 0 else starts[prefix]
        evidence = count
        if n + 1 < len(grams):  # below the highest order: how many words come before it (none before <s>)
            evidence = np.where(starts, count, np.bincount(grams[n + 1][1], minlength=len(count)))
        if n == 0:
            evidence = np.where(starts, 0, evidence)
        discount = _discounts(evidence)[np.minimum(evidence, 3)]
        total = np.bincount(prefix, evidence, len(probs[-1]) if n else 1)
        left = np.divide(np.bincount(prefix, discount, len(total)), total, out=np.ones(len(total)), where=total > 0)
        lower = probs[-1][suffix] if n else np.where(starts, 0.0, 1.0 / (len(word) - 1))
        probs.append((evidence - discount) / total[prefix] + left[prefix] * lower)
        backoffs.append(left)
    backoffs = [*backoffs[1:], np.ones(len(probs[-1]))]
    with np.errstate(divide="ignore"):  # log 0: <s> is never predicted
        return tuple(
            Grams(prefix=p, suffix=s, word=w, count=c, log_prob=np.log(prob), log_backoff=np.log(backoff))
            for (p, s, w), c, prob, backoff in zip(grams, counts, probs, backoffs, strict=True)
        )


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What to take from a count of 0, 1, 2, and 3 or more."""
    once, twice, thrice, four = (np.count_nonzero(counts == k) for k in range(1, 5))
    if not (once and twice and thrice and four):
        return np.array([0.0, *_FALLBACK_DISCOUNTS])
    y = once / (once + 2 * twice)
    found = np.array([0.0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice])
    if np.any(found < 0):
        return np.array([0.0, *_FALLBACK_DISCOUNTS])
    return found


def prune(model: NgramModel, *, threshold: float = 0.0, min_counts: Sequence[int] = ()) -> NgramModel:
    """Drop n-grams that tell little, all with <unk> in them, and reweight what is left.

    An n-gram is kept in any case where a longer one needs it. Stolcke's criterion is used with the frequencies
    of contexts in the text: Kneser-Ney's own lower orders do not tell how often a context occurs.

    Args:
        threshold: drop an n-gram whose loss changes the perplexity by a lower share (Stolcke, 1998); 1e-8 or so.
        min_counts: for pairs, triples and so on, the count that they must have; the last one holds for longer ones.
    """
    places = model.orders[0].count.sum() - model.orders[0].count[_START]  # words that are predicted
    keep = [np.ones(len(grams), bool) for grams in model.orders]
    changed: list[Grams] = list(model.orders)
    for n in range(len(model.orders) - 1, 0, -1):
        grams, below = model.orders[n], model.orders[n - 1]
        keep[n] = _known(model, n)
        if min_counts:
            keep[n] &= grams.count >= min_counts[min(n, len(min_counts)) - 1]
        if threshold > 0:
            keep[n] &= _loss(grams, below, places, keep[n]) >= threshold
        if n + 1 < len(model.orders):
            above = model.orders[n + 1]
            keep[n][above.prefix[keep[n + 1]]] = True
            keep[n][above.suffix[keep[n + 1]]] = True
        backoff = np.where(
            np.bincount(grams.prefix, ~keep[n], len(below)) > 0, _backoff(grams, below, keep[n]), below.log_backoff
        )
        changed[n - 1] = replace(changed[n - 1], log_backoff=backoff)

    orders: list[Grams] = []
    for grams, kept in zip(changed, keep, strict=True):
        values = {name: getattr(grams, name)[kept] for name in Grams.__dataclass_fields__}
        if orders:
            index = np.cumsum(keep[len(orders) - 1]) - 1
            values |= {"prefix": index[values["prefix"]], "suffix": index[values["suffix"]]}
        orders.append(Grams(**values))
    return NgramModel(words=model.words, orders=tuple(grams for grams in orders if len(grams)))


def _known(model: NgramModel, n: int) -> np.ndarray:
    """Which n-grams of order n + 1 are without <unk>."""
    known = model.orders[0].word != _UNKNOWN
    for grams in model.orders[1 : n + 1]:
        known = known[grams.prefix] & (grams.word != _UNKNOWN)
    return known


def _sums(grams: Grams, below: Grams, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each context leaves of its probability, and of the order below, besides the kept n-grams."""
    prefix = grams.prefix[kept]
    own = np.bincount(prefix, np.exp(grams.log_prob[kept]), len(below))
    lower = np.bincount(prefix, np.exp(below.log_prob[grams.suffix[kept]]), len(below))
    return np.maximum(1 - own, 1e-12), np.maximum(1 - lower, 1e-12)


def _backoff(grams: Grams, below: Grams, kept: np.ndarray) -> np.ndarray:
    """Log back-off weights with which every context's probabilities sum to 1."""
    own, lower = _sums(grams, below, kept)
    return np.log(own / lower)


def _loss(grams: Grams, below: Grams, places: int, kept: np.ndarray) -> np.ndarray:
    """By what share the perplexity grows when one n-gram goes, each by itself; (n-grams,)."""
    own, lower = _sums(grams, below, kept)
    own_left, lower_left = own[grams.prefix], lower[grams.prefix]
    log_prob, log_lower = grams.log_prob, below.log_prob[grams.suffix]
    backoff = np.log(own_left / lower_left)
    backoff_after = np.log((own_left + np.exp(log_prob)) / (lower_left + np.exp(log_lower)))
    with np.errstate(invalid="ignore"):  # <s> is never predicted: 0 * -inf
        change = np.exp(log_prob) * (log_lower + backoff_after - log_prob) + own_left * (backoff_after - backoff)
        return np.expm1(-below.count[grams.prefix] / places * change)


def perplexity(model: NgramModel, lines: Sequence[str]) -> Perplexity:
    """Measure a model on sentences, as normalised as its own text."""
    stream = _encode(lines, model.words)
    starts = stream == _START
    log_prob = model.orders[0].log_prob[stream]
    ids = stream  # the n-gram that ends at each place, -1 where it is not in the model
    for below, grams in itertools.pairwise(model.orders):
        before = np.where(starts, -1, np.roll(ids, 1))
        log_prob = log_prob + np.where(before >= 0, below.log_backoff[before], 0.0)
        ids = grams.find(before, stream, len(model.words))
        log_prob = np.where(ids >= 0, grams.log_prob[ids], log_prob)
    scored = ~starts & (stream != _UNKNOWN)
    words = int(scored.sum())
    mean = float(log_prob[scored].mean()) if words else 0.0
    return Perplexity(value=float(np.exp(-mean)), words=words, unknown=int((stream == _UNKNOWN).sum()))
