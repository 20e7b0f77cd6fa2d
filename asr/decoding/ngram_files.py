"""N-gram models as files: packed, as recognition reads them, and ARPA, as other programs do."""

import gzip
import io
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from asr.decoding.ngram import END, LOG10, START, UNKNOWN, Grams, NgramModel
from asr.errors import ModelError
from asr.files import byte_planes, from_byte_planes, replacing, write_arrays

_VERSION = 1  # of the packed form


def write_ngrams(model: NgramModel, path: Path, *, digits: int = 2) -> None:
    """Write a whole file or nothing, less than half the size of a packed ARPA file; byte for byte the same each time.

    Args:
        digits: behind the point of base-10 logarithms.
    """
    arrays = {"version": np.array(_VERSION), "digits": np.array(digits), "orders": np.array(len(model.orders))}
    arrays["words"] = np.frombuffer("\n".join(model.words).encode(), np.uint8)
    scale = 10**digits / LOG10
    for n, grams in enumerate(model.orders, start=1):
        below = len(model.orders[n - 2]) if n > 1 else 1
        first = np.append(True, grams.prefix[1:] != grams.prefix[:-1])
        arrays[f"{n}.children"] = byte_planes(np.bincount(grams.prefix, minlength=below))
        arrays[f"{n}.word"] = byte_planes(np.where(first, grams.word, np.diff(grams.word, prepend=0)))
        for name in ("log_prob", "log_backoff"):
            values = np.nan_to_num(getattr(grams, name), neginf=-99 * LOG10)
            whole = np.maximum(np.rint(values * scale), -99 * 10**digits).astype(np.int64)
            least = whole.min(initial=0)
            arrays[f"{n}.{name}"], arrays[f"{n}.{name}.least"] = byte_planes(whole - least), least
    write_arrays(path, arrays)


def read_words(path: Path) -> NgramModel:
    """As `read_ngrams`, of words by themselves alone."""
    return _read(path, None, 1)


def read_ngrams(path: Path, words: NgramModel | None = None) -> NgramModel:
    """Read what `write_ngrams` or any program wrote as ARPA, also gzipped.

    Args:
        words: what `read_words` gave; the rest is read in less time.

    Raises:
        ModelError: it cannot be read.
    """
    return _read(path, words, None)


def _read(path: Path, known: NgramModel | None, most: int | None) -> NgramModel:
    try:
        return _read_packed(path, known, most) if path.suffix == ".npz" else _read_arpa(path, most)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged file brings about
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: not a readable language model ({reason}); `asr train-lm` makes one") from error


def _read_packed(path: Path, known: NgramModel | None, most: int | None) -> NgramModel:
    with np.load(path) as arrays:
        if int(arrays["version"]) != _VERSION:
            raise ModelError(
                f"{path}: version {arrays['version']}, this program reads {_VERSION}; `asr train-lm` makes one"
            )
        words = known.words if known else tuple(arrays["words"].tobytes().decode().split("\n"))
        highest = int(arrays["orders"])
        scale = np.float32(LOG10 / 10 ** int(arrays["digits"]))
        orders = list(known.orders if known else ())
        for n in range(len(orders) + 1, min(most or highest, highest) + 1):
            orders.append(_unpack(arrays, n, orders, n == highest, scale))
    return NgramModel(words=words, orders=tuple(orders))


def _unpack(
    arrays: Mapping[str, np.ndarray], n: int, below: Sequence[Grams], is_highest: bool, scale: np.float32
) -> Grams:
    """The n-grams of n words."""
    children, deltas = from_byte_planes(arrays[f"{n}.children"]), from_byte_planes(arrays[f"{n}.word"])
    prefix = np.repeat(np.arange(len(children), dtype=np.int32), children)
    sums = np.cumsum(deltas, dtype=np.int32)  # what overflows falls out again
    before = np.append(np.int32(0), sums)[np.cumsum(children) - children]
    word = sums - np.repeat(before, children)
    logs: list[np.ndarray] = []
    for name in (f"{n}.log_prob", f"{n}.log_backoff"):
        values = from_byte_planes(arrays[name]).astype(np.float32)
        values += np.float32(arrays[f"{name}.least"])
        values *= scale
        logs.append(values)
    suffix = np.zeros_like(word) if n == 1 else word
    if n > 2:  # the longest search of all, for what a search by the model looks up where it comes to it
        longer = below[-1]
        suffix = np.full_like(word, -1) if is_highest else longer.find(longer.suffix[prefix], word, len(below[0]))
    return _uncounted(prefix, suffix, word, *logs)


def _read_arpa(path: Path, most: int | None) -> NgramModel:
    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode().replace("\r\n", "\n")
    sections = re.split(r"^\\(\d+)-grams:[ \t]*$", text, flags=re.MULTILINE)
    told = re.findall(r"^ngram[ \t]+(\d+)[ \t]*=[ \t]*(\d+)[ \t]*$", sections[0], flags=re.MULTILINE)
    counts = {int(order): int(count) for order, count in told}
    if "\\data\\" not in sections[0] or "\\end\\" not in text or not counts:
        raise ValueError("no ARPA file, or not a whole one")
    words: tuple[str, ...] = ()
    orders: list[Grams] = []
    ids: dict[str, int] = {}
    for n, body in itertools.islice(zip(map(int, sections[1::2]), sections[2::2], strict=True), most):
        rows = [line.replace("\t", " ").split(" ") for line in body.split("\\end\\")[0].splitlines() if line]
        if len(rows) != counts.get(n):
            raise ValueError(f"{len(rows)} of {counts.get(n, 'unknown')} {n}-grams")
        if not rows:
            break
        if n == 1:
            special = {UNKNOWN: 0, START: 1, END: 2}
            words = (*special, *(row[1] for row in rows if row[1] not in special))
            ids = {word: i for i, word in enumerate(words)}
        grams = np.array([[ids[word] for word in row[1 : n + 1]] for row in rows])
        values = np.array([[float(row[0]), float(row[n + 1]) if len(row) > n + 1 else 0.0] for row in rows]) * LOG10
        if n == 1 and len(rows) < len(words):  # no <unk>, say
            missing = np.setdiff1d(np.arange(len(words)), grams[:, 0])
            grams = np.concatenate([grams, missing[:, None]])
            values = np.concatenate([values, np.tile([-99 * LOG10, 0.0], (len(missing), 1))])
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


def _places(orders: Sequence[Grams], ngrams: np.ndarray) -> np.ndarray:
    """Where n-grams, (how many, n) words, stand in their order; -1: it lacks them."""
    place = ngrams[:, 0]
    for grams, word in zip(orders[1:], ngrams.T[1:], strict=False):
        place = grams.find(place, word, len(orders[0]))
    return place


def write_arpa(model: NgramModel, path: Path, *, digits: int = 6) -> None:
    """Write a whole ARPA file or nothing; gzipped where the name ends in .gz, byte for byte the same each time.

    Args:
        model: what to write.
        path: where to.
        digits: behind the point of base-10 logarithms.
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        if path.suffix == ".gz":
            with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as packed:
                _write(model, packed, digits)
        else:
            _write(model, file, digits)


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
        log_probs = [f"{p:.{digits}f}" for p in np.maximum(grams.log_prob / LOG10, -99.0).tolist()]
        if n == len(model.orders):
            lines = (f"{p}\t{text}\n" for p, text in zip(log_probs, texts, strict=True))
        else:
            backoffs = (grams.log_backoff / LOG10).tolist()
            lines = (f"{p}\t{text}\t{b:.{digits}f}\n" for p, text, b in zip(log_probs, texts, backoffs, strict=True))
        while chunk := "".join(itertools.islice(lines, 100_000)):
            file.write(chunk.encode())
    file.write(b"\n\\end\\\n")
