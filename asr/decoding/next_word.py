"""What an LSTM next-word model says of whole texts, in numpy: recognition needs no torch.

`asr train-lm --kind lstm` trains it (asr.next_word, where its equations stand); the beam search weighs what it found
by it.
"""

import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
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

    def log_probs(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The natural-log probability of each text, its end included, given as numbers: (texts,) float64.

        Texts share what is computed for beginnings of one length whose last words are the same, as the one among them
        remembers them that comes first.
        """
        lengths = np.array([len(text) for text in texts], np.int64)
        words = np.full((len(texts), max(lengths, default=-1) + 1), END_ID)  # each text with its end
        for row, text in zip(words, texts, strict=True):
            row[: len(text)] = text
        rows = np.arange(len(texts))  # texts that go on
        at = np.zeros(len(texts), np.int64)  # of each one's beginning, among those that differ
        h = c = np.zeros((1, len(self._u)), np.float32)
        read, count = np.array([END_ID]), 0
        known = np.unique(np.append(words, END_ID))
        inputs = self._embedding[known] @ self._w + self._b
        outputs: list[np.ndarray] = []  # after each beginning
        asked: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # which text, after which beginning, what word
        for depth, wanted in enumerate(words.T):
            h, c = lstm_step(inputs[np.searchsorted(known, read)] + h @ self._u, c)
            outputs.append(h @ self._narrow)
            asked.append((rows, count + at, wanted[rows]))
            count += len(h)
            going_on = lengths[rows] > depth
            rows, at = rows[going_on], at[going_on]
            latest = words[rows, max(depth + 1 - _REMEMBERED, 0) : depth + 1]
            _, first, those = np.unique(latest, axis=0, return_index=True, return_inverse=True)
            h, c, read = h[at[first]], c[at[first]], wanted[rows[first]]
            at = those.reshape(-1)
        y = np.concatenate([np.zeros((0, len(self._narrow[0])), np.float32), *outputs])
        norms = self._norms(y)
        totals = np.zeros(len(texts))
        for rows, at, word in asked:
            totals[rows] += (y[at] * self._embedding[word]).sum(axis=1) + self._bias[word] - norms[at]
        return totals

    def _norms(self, y: np.ndarray) -> np.ndarray:
        """The logarithm of the sum, over all words, of what a softmax takes, (rows, half the units) -> (rows,)."""
        norms = np.zeros(len(y), np.float32)
        scores = np.empty((min(_ROWS, len(y)), len(self._bias)), np.float32)
        for start in range(0, len(y), _ROWS):
            some = scores[: len(y) - start]
            np.matmul(y[start : start + _ROWS], self._embedding.T, out=some)
            some += self._bias
            highest = some.max(axis=1, keepdims=True)
            some -= highest
            np.exp(some, out=some)
            norms[start : start + _ROWS] = highest[:, 0] + np.log(some.sum(axis=1))
        return norms
