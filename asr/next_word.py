"""The next-word language model (embedding, recurrent cell, softmax over words): it scores text, and writes it."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from asr.decoding.next_word import END_ID, UNKNOWN_ID, read_model, write_model
from asr.decoding.ngram import END, UNKNOWN, Perplexity
from asr.errors import ConfigError, ModelError
from asr.nn import CELLS, Recurrent, State
from asr.runtime.folder import NEXT_WORD_FOLDER


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
        self.lexicon, self.words = tuple(lexicon), (UNKNOWN, END, *lexicon)
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
        y, state = self.read(words, state)
        return y @ self.embedding.weight.T + self.bias, state

    def read(self, words: Tensor, state: State) -> tuple[Tensor, State]:
        """As `step`, up to V h_t: (batch, time, size // 2)."""
        y, state = self.layer.step(self.dropout(self.embedding(words)), state)
        return self.dropout(self.narrow(y)), state

    def sampled_loss(self, read: Tensor, wanted: Tensor, words: Tensor, logs: Tensor) -> Tensor:
        """The cross-entropy of the right words against a sample of all in place of all (Jean et al. 2015).

        Args:
            read: what `read` gave, (n, size // 2).
            wanted: the right words, (n,).
            words: the sample, (m,), each once.
            logs: the logarithm of the probability of each word of the lexicon to be in a sample, (words,).
        """
        right = (read * self.embedding(wanted)).sum(-1) + self.bias[wanted] - logs[wanted]
        others = (read @ self.embedding(words).T).float() + self.bias[words] - logs[words]
        others = others.masked_fill(words == wanted[:, None], -torch.inf)
        return -(right - torch.logaddexp(right, others.logsumexp(-1))).mean()

    def encode(self, lines: Iterable[str]) -> Tensor:
        """Sentences as one stream of indices, </s> after each: (words,) int64."""
        return torch.tensor([self._ids.get(word, UNKNOWN_ID) for line in lines for word in (*line.split(), END)])

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
        said = torch.cat([torch.tensor([END_ID]), wanted[:-1]])
        scores, new = model.step(said[None], state if carry else start)
        state = new
        known = wanted != UNKNOWN_ID
        loss += float(nn.functional.cross_entropy(scores[0, known], wanted[known], reduction="sum"))
        count += int(known.sum())
        unknown += int((~known).sum())
    return Perplexity(value=float(torch.tensor(loss / max(count, 1)).exp()), words=count, unknown=unknown)


def generate(
    model: NextWord, prompt: str, *, words: int = 50, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Iterator[str]:
    """Go on writing after `prompt`, word by word; </s> ends a sentence, and <unk> is never drawn.

    Args:
        words: how many to draw, ends of sentences not counted.
        temperature: above 1 bolder, below 1 safer.
        top_k: draw from the k most probable words alone; 0: from all.

    Raises:
        ConfigError: the temperature is not in 0.0001 to 10000, or words or top_k are below 0.
    """
    if words < 0:
        raise ConfigError(f"words {words}: must be 0 or more")
    if not 1e-4 <= temperature <= 1e4:
        raise ConfigError(f"temperature {temperature:g}: must be 0.0001, where the likeliest word is drawn, to 10000")
    if top_k < 0:
        raise ConfigError(f"top_k {top_k}: must be 0 (draw from all words) or more")
    return _drawn(model, prompt, words, temperature, top_k, seed)


@torch.no_grad()
def _drawn(model: NextWord, prompt: str, words: int, temperature: float, top_k: int, seed: int) -> Iterator[str]:
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    said = torch.cat([torch.tensor([END_ID]), model.encode([prompt])[:-1]])
    state = model.initial_state(1)
    while words:
        scores, state = model.step(said[None], state)
        scores = scores[0, -1] / temperature
        scores[UNKNOWN_ID] = -torch.inf
        if said[-1] == END_ID:
            scores[END_ID] = -torch.inf  # no empty sentence
        if 0 < top_k < len(scores):
            scores[scores < scores.topk(top_k).values[-1]] = -torch.inf
        said = torch.multinomial(scores.softmax(0), 1, generator=generator)
        words -= int(said != END_ID)
        yield model.words[int(said)]


def save(model: NextWord, folder: Path, about: dict[str, Any]) -> None:
    """Write a model into a folder that is there, with what is to be told about it (anything that JSON holds)."""
    weights = {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}
    shape = {"kind": model.kind, "size": model.size, "dropout": model.dropout_rate}
    write_model(folder, weights, model.lexicon, {**about, **shape})


def load(folder: Path) -> tuple[NextWord, dict[str, Any]]:
    """Read a model, and what is told about it, from the folder that `save` or `asr train-lm` wrote, or a model's.

    Raises:
        ModelError: there is none, or it is damaged or of another version.
    """
    folder = folder / NEXT_WORD_FOLDER if (folder / NEXT_WORD_FOLDER).is_dir() else folder
    weights, lexicon, about = read_model(folder)
    try:
        model = NextWord(lexicon, kind=about["kind"], size=about["size"], dropout=about["dropout"])
        model.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
    except Exception as error:
        raise ModelError(f"{folder}: the model is damaged ({str(error).splitlines()[0]}); train it again") from error
    return model.eval(), about
