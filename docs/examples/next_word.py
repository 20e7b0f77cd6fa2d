"""A next-word language model of an embedding, an LSTM and a softmax: python docs/examples/next_word.py "the cat" """

import random
import sys

import torch
from torch import Tensor, nn

from asr.decoding.ngram import estimate, perplexity
from asr.nn import LSTM, detach

NOUNS = ("cat", "cats"), ("dog", "dogs"), ("child", "children")
VERBS = ("sleeps", "sleep"), ("sings", "sing"), ("waits", "wait")


def sentence(rng: random.Random) -> str:
    """The verb agrees with the first noun, whatever stands between: "the cat near the dogs near the child sleeps"."""
    number = rng.randrange(2)  # one, or many
    nouns = [rng.choice(NOUNS)[number if i == 0 else rng.randrange(2)] for i in range(rng.randint(1, 3))]
    return f"the {' near the '.join(nouns)} {rng.choice(VERBS)[number]}"


def main(prompt: str = "the cat near the dogs") -> dict[str, float]:
    rng = random.Random(1)
    train, test = ([sentence(rng) for _ in range(n)] for n in (3000, 300))
    words = ["</s>", *sorted({word for line in train for word in line.split()})]

    def stream(lines: list[str]) -> Tensor:
        return torch.tensor([0] + [words.index(word) for line in lines for word in (*line.split(), "</s>")])

    torch.manual_seed(1)
    embedding, lstm, dense = nn.Embedding(len(words), 16), LSTM(16, 32), nn.Linear(32, len(words))
    weights = [*embedding.parameters(), *lstm.parameters(), *dense.parameters()]
    optimizer = torch.optim.Adam(weights, 1e-2)
    rows = stream(train)[:20_000].view(16, -1)  # sixteen places of the text, read side by side
    for _ in range(4):
        state = lstm.initial_state(len(rows))
        for start in range(0, rows.shape[1] - 1, 20):  # truncated back-propagation through time: the state goes on
            piece = rows[:, start : start + 21]
            y, state = lstm.step(embedding(piece[:, :-1]), detach(state))
            loss = nn.functional.cross_entropy(dense(y).flatten(0, 1), piece[:, 1:].flatten())  # has the softmax
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
    with torch.no_grad():
        held_out, state, said, text = stream(test), lstm.initial_state(1), stream([prompt])[:-1], prompt
        y, _ = lstm.step(embedding(held_out[None, :-1]), state)
        measured = float(nn.functional.cross_entropy(dense(y)[0], held_out[1:]).exp())
        while said[-1] != 0:  # draw a word, read it, draw the next
            y, state = lstm.step(embedding(said[None]), state)
            said = torch.multinomial(dense(y[0, -1]).softmax(0), 1)
            text += f" {words[int(said)]}"
    print(text)
    return {"LSTM": measured} | {f"{n} words": perplexity(estimate(train, order=n), test).value for n in (1, 2, 3, 5)}


if __name__ == "__main__":
    print(*(f"perplexity, {name}: {value:.2f}" for name, value in main(*sys.argv[1:]).items()), sep="\n")
