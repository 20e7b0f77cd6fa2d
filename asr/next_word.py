"""The next-word language model (embedding, recurrent cell, softmax over words): it scores text, and writes it."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from asr.decoding.ngram import END, UNKNOWN, Perplexity
from asr.errors import ConfigError, ModelError
from asr.nn import CELLS, Recurrent, State

FOLDER = "next-word"  # in the folder that `asr train-lm` writes
FORMAT_VERSION = 1
_UNKNOWN, _END = 0, 1  # their indices
_ABOUT, _WORDS, _WEIGHTS = "model.json", "words.txt", "weights.safetensors"


class NextWord(nn.Module):
    """The probability of each word after those before it (Mikolov et al. 2010; Zaremba et al. 2014).

    x_t         = E w_{t-1}                    the last word's embedding
    h_t, c_t    = cell(x_t, h_{t-1}, c_{t-1})
    P(w_t)      = softmax(E' V h_t + b)        the same embeddings at both ends (Press and Wolf 2017)

    A text is one stream of words with a </s> after each sentence: the memory goes on from sentence to sentence.

    Args:
        lexicon: the words that it knows; all others are <unk>.
        kind: of cell, one of asr.nn.CELLS.
        size: units of the cell; an embedding has half as many numbers.
        dropout: while training, of x_t and of V h_t.

    Raises:
        ConfigError: there is no such cell.
    """

    def __init__(self, lexicon: Sequence[str], *, kind: str = "lstm", size: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        if kind not in CELLS:
            raise ConfigError(f"{kind}: no such cell; there are {', '.join(CELLS)}")
        self.kind, self.size, self.dropout_rate = kind, size, dropout
        self.words = (UNKNOWN, END, *lexicon)
        self._ids = {word: i for i, word in enumerate(self.words)}
        self.embedding = nn.Embedding(len(self.words), size // 2)
        nn.init.normal_(self.embedding.weight, std=(size // 2) ** -0.5)  # scores of about one
        self.layer = Recurrent(CELLS[kind](size // 2, size))
        self.narrow = nn.Linear(self.layer.output_size, size // 2, bias=False)
        self.bias = nn.Parameter(torch.zeros(len(self.words)))
        self.dropout = nn.Dropout(dropout)

    def initial_state(self, batch_size: int) -> State:
        """The state before the first word."""
        return self.layer.initial_state(batch_size)

    def step(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """Read words (batch, time) int64 -> scores of the word after each (batch, time, words), and the new state.

        A softmax makes probabilities of the scores.
        """
        y, state = self.layer.step(self.dropout(self.embedding(words)), state)
        return self.dropout(self.narrow(y)) @ self.embedding.weight.T + self.bias, state

    def encode(self, lines: Iterable[str]) -> Tensor:
        """Sentences as one stream of indices, </s> after each: (words,) int64."""
        return torch.tensor([self._ids.get(word, _UNKNOWN) for line in lines for word in (*line.split(), END)])

    def unknown(self, line: str) -> list[str]:
        """The words of a line that the model does not know."""
        return [word for word in line.split() if word not in self._ids]


@torch.no_grad()
def perplexity(model: NextWord, lines: Iterable[str], *, carry: bool = True) -> Perplexity:
    """How well the model predicts sentences in order, their ends included, words that it does not know left out.

    That is what asr.decoding.ngram.perplexity measures, so models of the same lexicon compare.

    Args:
        carry: the memory goes on from sentence to sentence; else each starts without.
    """
    model.eval()
    start = state = model.initial_state(1)
    loss, count, unknown = 0.0, 0, 0
    for line in lines:
        wanted = model.encode([line])
        said = torch.cat([torch.tensor([_END]), wanted[:-1]])
        scores, new = model.step(said[None], state if carry else start)
        state = new
        known = wanted != _UNKNOWN
        loss += float(nn.functional.cross_entropy(scores[0, known], wanted[known], reduction="sum"))
        count += int(known.sum())
        unknown += int((~known).sum())
    return Perplexity(value=float(torch.tensor(loss / max(count, 1)).exp()), words=count, unknown=unknown)


@torch.no_grad()
def generate(
    model: NextWord, prompt: str, *, words: int = 50, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[str]:
    """Go on writing after `prompt`, word by word; </s> ends a sentence, and <unk> is never drawn.

    Args:
        words: how many to draw, ends of sentences not counted.
        temperature: above 1 bolder, below 1 safer.
        top_k: draw from the k most probable words alone; 0: from all.

    Raises:
        ConfigError: the temperature is not above 0, or top_k is below 0.
    """
    if temperature <= 0:
        raise ConfigError(f"temperature {temperature:g}: must be above 0; near 0 the most probable word is drawn")
    if top_k < 0:
        raise ConfigError(f"top_k {top_k}: must be 0 (draw from all words) or more")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    said = torch.cat([torch.tensor([_END]), model.encode([prompt])[:-1]])
    state = model.initial_state(1)
    while words:
        scores, state = model.step(said[None], state)
        scores = scores[0, -1] / temperature
        scores[_UNKNOWN] = -torch.inf
        if said[-1] == _END:
            scores[_END] = -torch.inf  # no empty sentence
        if 0 < top_k < len(scores):
            scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
        said = torch.multinomial(scores.softmax(0), 1, generator=generator)
        words -= int(said != _END)
        yield model.words[int(said)]


def save(model: NextWord, folder: Path, about: dict[str, Any]) -> None:
    """Write a model into a folder that is there, with what is to be told about it (anything that JSON holds)."""
    shape = {"kind": model.kind, "size": model.size, "dropout": model.dropout_rate}
    text = json.dumps({"format_version": FORMAT_VERSION, **shape, **about}, indent=2, ensure_ascii=False)
    save_file(model.state_dict(), folder / _WEIGHTS)
    (folder / _WORDS).write_text("".join(f"{word}\n" for word in model.words[_END + 1 :]), encoding="utf-8")
    (folder / _ABOUT).write_text(text + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[NextWord, dict[str, Any]]:
    """Read a model, and what is told about it, from the folder that `save` or `asr train-lm` wrote.

    Raises:
        ModelError: there is none, or it is damaged or of another version.
    """
    folder = folder / FOLDER if (folder / FOLDER).is_dir() else folder
    if not (folder / _ABOUT).is_file():
        raise ModelError(f"{folder}: no next-word model; make one with `asr train-lm TEXT --kind lstm --out {folder}`")
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if about["format_version"] != FORMAT_VERSION:
            raise ModelError(f"{folder}: format version {about['format_version']}, this program reads {FORMAT_VERSION}")
        lexicon = (folder / _WORDS).read_text(encoding="utf-8").split()
        model = NextWord(lexicon, kind=about["kind"], size=about["size"], dropout=about["dropout"])
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{folder}: the model is damaged ({str(error).splitlines()[0]}); train it again") from error
    return model.eval(), about
