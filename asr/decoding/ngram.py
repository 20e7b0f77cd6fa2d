"""Word n-gram language models: interpolated modified Kneser-Ney, pruned, written and read."""

import gzip
import io
import itertools
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from asr.errors import ModelError, TextError
from asr.files import write_atomically

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
_UNKNOWN, _START, _END = 0, 1, 2  # their word indices
_FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)  # where a text is too small to estimate them
_LOG10 = np.log(10.0)
_VERSION = 1  # of the packed form


@dataclass(frozen=True, kw_only=True, slots=True)
class Grams:
    """All n-grams of one order, sorted by (prefix, word); arrays of one length.

    Attributes:
        prefix: the n-gram without its last word, as an index into the order below (0 for words).
        suffix: the n-gram without its first word, likewise.
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
        lexicon: more words that can be said, however rare: one that is not kept anyway gets what a word that was
            never seen gets.

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
    ids, known = stream, np.ones(len(stream), bool)  # the n-gram that ends at each place, where it is in the model
    for below, grams in itertools.pairwise(model.orders):
        before, may = np.roll(ids, 1), np.roll(known, 1) & ~starts
        log_prob = log_prob + np.where(may, below.log_backoff[before], 0.0)
        keys = grams.prefix * len(model.words) + grams.word
        wanted = before * len(model.words) + stream
        ids = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        known = may & (keys[ids] == wanted)
        log_prob = np.where(known, grams.log_prob[ids], log_prob)
    scored = ~starts & (stream != _UNKNOWN)
    words = int(scored.sum())
    mean = float(log_prob[scored].mean()) if words else 0.0
    return Perplexity(value=float(np.exp(-mean)), words=words, unknown=int((stream == _UNKNOWN).sum()))


def write_ngrams(model: NgramModel, path: Path, *, digits: int = 2) -> None:
    """Write a whole file or nothing, a third of the size of a packed ARPA file; byte for byte the same each time.

    Args:
        digits: behind the point of base-10 logarithms.
    """
    arrays = {"version": np.array(_VERSION), "digits": np.array(digits), "orders": np.array(len(model.orders))}
    arrays["words"] = np.frombuffer("\n".join(model.words).encode(), np.uint8)
    scale = 10**digits / _LOG10
    for n, grams in enumerate(model.orders, start=1):
        below = len(model.orders[n - 2]) if n > 1 else 1
        first = np.append(True, grams.prefix[1:] != grams.prefix[:-1])
        arrays[f"{n}.children"] = _planes(np.bincount(grams.prefix, minlength=below))
        arrays[f"{n}.word"] = _planes(np.where(first, grams.word, np.diff(grams.word, prepend=0)))
        for name in ("log_prob", "log_backoff"):
            values = np.nan_to_num(getattr(grams, name), neginf=-99 * _LOG10)
            whole = np.maximum(np.rint(values * scale), -99 * 10**digits).astype(np.int64)
            least = whole.min(initial=0)
            arrays[f"{n}.{name}"], arrays[f"{n}.{name}.least"] = _planes(whole - least), least
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array)
            about = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            file.writestr(about, content.getvalue(), zipfile.ZIP_DEFLATED, 9)
    write_atomically(path, packed.getvalue())


def _planes(numbers: np.ndarray) -> np.ndarray:
    """Numbers from 0 up as bytes, (bytes, n), the lowest first: as many as are needed; the high ones pack well."""
    count = (int(numbers.max(initial=0)).bit_length() + 7) // 8
    return (
        np.stack([(numbers >> 8 * i).astype(np.uint8) for i in range(count)])
        if count
        else np.zeros((0, len(numbers)), np.uint8)
    )


def _numbers(planes: np.ndarray) -> np.ndarray:
    """What `_planes` made bytes of, int64 (n,)."""
    numbers = np.zeros(planes.shape[1], np.int64)
    for i, plane in enumerate(planes):
        numbers |= plane.astype(np.int64) << 8 * i
    return numbers


def read_ngrams(path: Path) -> NgramModel:
    """Read what `write_ngrams` or any program wrote as ARPA, also gzipped.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return _read_packed(path) if path.suffix == ".npz" else _read_arpa(path)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not a readable language model ({reason}); `asr train-lm` makes one") from error


def _read_packed(path: Path) -> NgramModel:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    if int(arrays["version"]) != _VERSION:
        raise ModelError(
            f"{path}: version {arrays['version']}, this program reads {_VERSION}; `asr train-lm` makes one"
        )
    scale = _LOG10 / 10 ** int(arrays["digits"])
    words = tuple(arrays["words"].tobytes().decode().split("\n"))

    orders: list[Grams] = []
    for n in range(1, int(arrays["orders"]) + 1):
        children, deltas = _numbers(arrays[f"{n}.children"]), _numbers(arrays[f"{n}.word"])
        prefix = np.repeat(np.arange(len(children)), children)
        starts = np.cumsum(children) - children
        sums = np.cumsum(deltas)
        before = np.where(starts > 0, sums[np.maximum(starts, 1) - 1], 0)
        word = sums - np.repeat(before, children)
        log_prob, log_backoff = (
            (_numbers(arrays[name]) + int(arrays[f"{name}.least"])) * scale
            for name in (f"{n}.log_prob", f"{n}.log_backoff")
        )
        suffix = np.zeros(len(word), np.int64) if n == 1 else word
        if n > 2:
            suffix = _child(orders[-1], orders[-1].suffix[prefix], word, len(words))
        orders.append(_uncounted(prefix, suffix, word, log_prob, log_backoff))
    return NgramModel(words=words, orders=tuple(orders))


def _read_arpa(path: Path) -> NgramModel:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    sections = re.split(r"^\\(\d+)-grams:$", text, flags=re.MULTILINE)
    counts = [int(count) for count in re.findall(r"^ngram \d+=(\d+)$", sections[0], flags=re.MULTILINE)]
    if "\\data\\" not in sections[0] or "\\end\\" not in text or not counts:
        raise ValueError("no ARPA file, or not a whole one")
    words: tuple[str, ...] = ()
    orders: list[Grams] = []
    ids: dict[str, int] = {}
    for n, body in zip(map(int, sections[1::2]), sections[2::2], strict=True):
        rows = [line.split("\t") for line in body.split("\\end\\")[0].splitlines() if line]
        if len(rows) != counts[n - 1]:
            raise ValueError(f"{len(rows)} of {counts[n - 1]} {n}-grams")
        if n == 1:
            special = {UNKNOWN: 0, START: 1, END: 2}
            words = (*special, *(row[1] for row in rows if row[1] not in special))
            ids = {word: i for i, word in enumerate(words)}
        grams = np.array([[ids[word] for word in row[1].split(" ")] for row in rows]).reshape(len(rows), n)
        values = np.array([[float(row[0]), float(row[2]) if len(row) > 2 else 0.0] for row in rows]) * _LOG10
        if n == 1 and len(rows) < len(words):  # no <unk>, say
            missing = np.setdiff1d(np.arange(len(words)), grams[:, 0])
            grams = np.concatenate([grams, missing[:, None]])
            values = np.concatenate([values, np.tile([-99 * _LOG10, 0.0], (len(missing), 1))])
        if n > 1:
            prefix, suffix = (_places(orders, part) for part in (grams[:, :-1], grams[:, 1:]))
            kept = np.flatnonzero((prefix >= 0) & (suffix >= 0))  # a program that prunes otherwise may leave orphans
        else:
            prefix = suffix = np.zeros(len(grams), np.int64)
            kept = np.arange(len(grams))
        kept = kept[np.lexsort((grams[kept, -1], prefix[kept]))]
        orders.append(_uncounted(prefix[kept], suffix[kept], grams[kept, -1], *values[kept].T))
    return NgramModel(words=words, orders=tuple(orders))


def _uncounted(prefix: np.ndarray, suffix: np.ndarray, word: np.ndarray, *logs: np.ndarray) -> Grams:
    count = np.zeros(len(word), np.int64)  # not kept in files
    return Grams(prefix=prefix, suffix=suffix, word=word, count=count, log_prob=logs[0], log_backoff=logs[1])


def _child(grams: Grams, prefix: np.ndarray, word: np.ndarray, words: int) -> np.ndarray:
    """Where n-grams of this prefix, -1 where there is none, and last word stand in their order; else -1."""
    keys, wanted = grams.prefix * words + grams.word, prefix * words + word
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((keys[place] == wanted) & (prefix >= 0), place, -1)


def _places(orders: Sequence[Grams], ngrams: np.ndarray) -> np.ndarray:
    """Where n-grams, (how many, n) words, stand in their order; -1: it lacks them."""
    place = ngrams[:, 0]
    for grams, word in zip(orders[1:], ngrams.T[1:], strict=False):
        place = _child(grams, place, word, len(orders[0]))
    return place


def write_arpa(model: NgramModel, path: Path, *, digits: int = 6) -> None:
    """Write a whole ARPA file or nothing; gzipped where the name ends in .gz, byte for byte the same each time.

    Args:
        model: what to write.
        path: where to.
        digits: behind the point of base-10 logarithms.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            if path.suffix == ".gz":
                with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                    _write(model, packed, digits)
            else:
                _write(model, file, digits)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write(model: NgramModel, file: io.BufferedIOBase, digits: int) -> None:
    file.write(b"\\data\\\n")
    for n, grams in enumerate(model.orders, start=1):
        file.write(f"ngram {n}={len(grams)}\n".encode())
    texts: list[str] = []
    for n, grams in enumerate(model.orders, start=1):
        file.write(f"\n\\{n}-grams:\n".encode())
        words = [model.words[i] for i in grams.word.tolist()]
        before = (texts[i] for i in grams.prefix.tolist()) if n > 1 else ()
        texts = [f"{first} {last}" for first, last in zip(before, words, strict=True)] if n > 1 else words
        log_probs = [f"{p:.{digits}f}" for p in np.maximum(grams.log_prob / _LOG10, -99.0).tolist()]
        if n == len(model.orders):
            lines = (f"{p}\t{text}\n" for p, text in zip(log_probs, texts, strict=True))
        else:
            backoffs = (grams.log_backoff / _LOG10).tolist()
            lines = (f"{p}\t{text}\t{b:.{digits}f}\n" for p, text, b in zip(log_probs, texts, backoffs, strict=True))
        while chunk := "".join(itertools.islice(lines, 100_000)):
            file.write(chunk.encode())
    file.write(b"\n\\end\\\n")
