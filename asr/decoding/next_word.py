"""What an LSTM next-word model says of whole texts, in numpy: recognition needs no torch.

`asr train-lm --kind lstm` trains it (asr.next_word, where its equations stand); the beam search weighs what it found
by it.
"""

import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from asr.cache import kept
from asr.decoding.lstm import lstm_step
from asr.errors import ModelError
from asr.files import write_atomically

FORMAT_VERSION = 2
UNKNOWN_ID, END_ID = 0, 1
_ABOUT, _WORDS, _WEIGHTS = "model.json", "words.txt.gz", "weights.npz"
_REMEMBERED = 8  # words, by which memories are told apart: 2.5 times fewer in a long sentence
_ROWS = 64  # of scores of all words at a time: they stay in the cache
_SCALE = ".scale"  # of each row of a matrix that is kept as int8


def write_model(
    folder: Path, weights: Mapping[str, np.ndarray], words: Sequence[str], about: dict[str, Any], *, small: bool = False
) -> None:
    """Write a next-word model into a folder that is there.

    Args:
        weights: float32, by their names in asr.next_word.NextWord.
        words: the lexicon; the model's numbers for them begin at 2.
        about: anything that JSON holds.
        small: matrices as int8, each row with a scale: a quarter of the size.
    """
    kept: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        if small and weight.ndim == 2:
            scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127, 1e-12)
            kept |= {name: np.round(weight / scale).astype(np.int8), name + _SCALE: scale.astype(np.float32)}
        else:
            kept[name] = weight
    data = io.BytesIO()
    np.savez_compressed(data, allow_pickle=False, **kept)
    write_atomically(folder / _WEIGHTS, data.getvalue())
    write_atomically(folder / _WORDS, gzip.compress("".join(f"{word}\n" for word in words).encode(), mtime=0))
    text = json.dumps({"format_version": FORMAT_VERSION, **about}, indent=2, ensure_ascii=False)
    write_atomically(folder / _ABOUT, f"{text}\n".encode())


def read_model(folder: Path) -> tuple[dict[str, np.ndarray], list[str], dict[str, Any]]:
    """The weights, float32, the lexicon, and what is told about them, from what `write_model` wrote.

    Raises:
        ModelError: there is none, or it is damaged or of another version.
    """
    words, about = _read_about(folder)
    return _read_weights(folder), words, about


def _read_about(folder: Path) -> tuple[list[str], dict[str, Any]]:
    if not (folder / _ABOUT).is_file():
        raise ModelError(f"{folder}: no next-word model; make one with `asr train-lm TEXT --kind lstm --out MODEL`")
    with _undamaged(folder):
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION:
            version = about["format_version"]
            raise ModelError(f"{folder}: format version {version}, this program reads {FORMAT_VERSION}; train it again")
        return gzip.decompress((folder / _WORDS).read_bytes()).decode().split(), about


def _read_weights(folder: Path) -> dict[str, np.ndarray]:
    with _undamaged(folder), np.load(folder / _WEIGHTS) as file:
        stored = {name: file[name] for name in file.files}
        scales = {name: stored.pop(name) for name in list(stored) if name.endswith(_SCALE)}
        weights = {name: stored[name] * scales.get(name + _SCALE, np.float32(1)) for name in stored}
        return {name: weight.astype(np.float32, copy=False) for name, weight in weights.items()}


@contextmanager
def _undamaged(folder: Path) -> Iterator[None]:
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: the model is damaged ({str(error).splitlines()[0]}); train it again") from error


def make_small(folder: Path) -> None:
    """Write the model in a folder anew with its matrices as int8, without what training needs to go on."""
    weights, words, about = read_model(folder)
    for path in folder.glob("training*"):
        path.unlink()
    write_model(folder, weights, words, about, small=True)


class TextScorer:
    """The probability of whole texts, each read from its start with an empty memory.

    Args:
        folder: what `write_model` wrote.

    Attributes:
        numbers: the model's words, by what it calls them.

    Raises:
        ModelError: there is none, it is damaged, or its cell is not an LSTM.
    """

    def __init__(self, folder: Path) -> None:
        words, about = _read_about(folder)
        weights = kept("next-word", [folder / _WEIGHTS], lambda: _read_weights(folder))
        if about.get("kind") != "lstm":
            raise ModelError(f"{folder}: its cell is {about.get('kind')!r}; the search reads --kind lstm alone")
        try:
            self._embedding, self._bias = weights["embedding.weight"], weights["bias"]
            self._w, self._b = weights["layer.cell.w.weight"].T, weights["layer.cell.w.bias"]
            self._u, self._narrow = weights["layer.cell.u.weight"].T, weights["narrow.weight"].T
        except KeyError as error:
            raise ModelError(f"{folder}: the model is damaged ({error} is missing); train it again") from error
        if len(words) + END_ID + 1 != len(self._bias):
            raise ModelError(
                f"{folder}: {len(words)} words, but weights of others; the model is damaged: train it again"
            )
        self.numbers = {word: i for i, word in enumerate(words, start=END_ID + 1)}

    def memories(self) -> "Memories":
        """Of the beginning of all texts alone."""
        known = Memories(len(self._u), self._narrow.shape[1])
        self._read(known, {(): ()})
        return known

    def log_probs(self, texts: Sequence[Sequence[int]], known: "Memories | None" = None) -> np.ndarray:
        """The natural-log probability of each text, its end included, given as numbers: (texts,) float64.

        Beginnings whose last words are the same share a memory: that of the first one that was read.

        Args:
            known: memories of texts that were read before; those of these texts are added.
        """
        known = self.memories() if known is None else known
        beginnings = [[tuple(text[max(end - _REMEMBERED, 0) : end]) for end in range(len(text) + 1)] for text in texts]
        missing: dict[tuple[int, ...], tuple[int, ...]] = {}  # what each goes on from
        for own in beginnings:
            for before, beginning in itertools.pairwise(own):
                if beginning not in known.rows:
                    missing.setdefault(beginning, before)
        while missing:
            ready = {beginning: before for beginning, before in missing.items() if before in known.rows}
            self._read(known, ready)
            missing = {beginning: before for beginning, before in missing.items() if beginning not in ready}
        self._norms(known)
        words = np.array([word for text in texts for word in (*text, END_ID)], np.int64)
        rows = np.array([known.rows[beginning] for own in beginnings for beginning in own], np.int64)
        scores = (known.outputs[rows] * self._embedding[words]).sum(axis=1) + self._bias[words] - known.norms[rows]
        whose = np.repeat(np.arange(len(texts)), [len(own) for own in beginnings])
        return np.bincount(whose, scores, len(texts)).astype(np.float64)  # of no text: integers

    def _read(self, known: "Memories", new: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        """Read the last word of beginnings, each after the memory of another one."""
        read = [beginning[-1] if beginning else END_ID for beginning in new]
        before = [known.rows.get(beginning, 0) for beginning in new.values()]  # nothing is read yet: row 0 is empty
        h, c = known.h[before], known.c[before]
        h, c = lstm_step(self._embedding[read] @ self._w + self._b + h @ self._u, c)
        known.add(new, h, c, h @ self._narrow)

    def _norms(self, known: "Memories") -> None:
        """Find the logarithm of the sum, over all words, of what a softmax takes, where it is not known yet."""
        first = len(known.norms)
        norms = np.zeros(len(known.rows) - first, np.float32)
        scores = np.empty((min(_ROWS, len(norms)), len(self._bias)), np.float32)
        for start in range(0, len(norms), _ROWS):
            some = scores[: len(norms) - start]
            np.matmul(known.outputs[first + start : first + start + len(some)], self._embedding.T, out=some)
            some += self._bias
            highest = some.max(axis=1, keepdims=True)
            some -= highest
            np.exp(some, out=some)
            norms[start : start + _ROWS] = highest[:, 0] + np.log(some.sum(axis=1))
        known.norms = np.append(known.norms, norms)


class Memories:
    """What a next-word model remembers after beginnings of texts, told apart by their last words.

    Attributes:
        rows: the row of each beginning's in the following, by its last words.
        h, c: (rows or more, units).
        outputs: what meets the words' embeddings, (rows or more, their size).
        norms: of the first rows, (some rows,).
    """

    def __init__(self, units: int, size: int) -> None:
        self.rows: dict[tuple[int, ...], int] = {}
        self.h, self.c = np.zeros((1, units), np.float32), np.zeros((1, units), np.float32)
        self.outputs, self.norms = np.zeros((1, size), np.float32), np.zeros(0, np.float32)

    def add(self, beginnings: Iterable[tuple[int, ...]], h: np.ndarray, c: np.ndarray, outputs: np.ndarray) -> None:
        """Rows for beginnings that have none."""
        first = len(self.rows)
        self.rows.update(zip(beginnings, range(first, first + len(h)), strict=True))
        if len(self.rows) > len(self.h):
            more = ((0, 2 * len(self.rows)), (0, 0))
            self.h, self.c, self.outputs = (np.pad(part, more) for part in (self.h, self.c, self.outputs))
        for part, values in ((self.h, h), (self.c, c), (self.outputs, outputs)):
            part[first : len(self.rows)] = values
