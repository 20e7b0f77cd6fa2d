"""`asr train-lm --kind lstm` and `asr generate`: a next-word network, measured beside n-grams, and what it writes."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from asr import next_word
from asr.decoding.ngram import Perplexity, estimate
from asr.decoding.ngram import perplexity as ngram_perplexity
from asr.errors import ConfigError, TextError
from asr.next_word import NextWord
from asr.nn import CELLS
from asr.runtime.folder import NETWORKS, NEXT_WORD_FOLDER, shipped_model
from asr.text import normalize
from asr.training.next_word import NextWordTraining, train_next_word
from pipelines.formats import write_text
from pipelines.train_lm import read_lines

_HELD_OUT = 50  # the last line in so many is kept back: text that goes on, so that a memory helps as it does in use


@dataclass(frozen=True, kw_only=True)
class NextWordSummary:
    """What was made, and how well it and n-grams of the same text and lexicon predict what was kept back.

    Attributes:
        carried: the network's perplexity, its memory going on from sentence to sentence.
        alone: the same with each sentence read by itself, as n-grams do.
        ngrams: of an unpruned Kneser-Ney model.
    """

    folder: Path
    words: int
    weights: int
    carried: Perplexity
    alone: Perplexity
    ngrams: Perplexity


def train_network(
    texts: Sequence[Path],
    out: Path,
    *,
    kind: str,
    size: int = 256,
    vocabulary: int | None = 10_000,
    min_count: int = 3,
    order: int = 3,
    init_from: Path | None = None,
    training: NextWordTraining | None = None,
) -> NextWordSummary:
    """Train OUT/next-word, or go on with it, and measure it.

    Args:
        texts: a sentence a line, in UTF-8, in the order of the text; .gz and .xz are unpacked.
        kind: of cell, one of asr.nn.CELLS.
        size: units of the cell.
        vocabulary, min_count: which words it knows, as in `train_lm`.
        order: words to an n-gram of the model that it is compared with.
        init_from: a next-word model, or the folder of one, to start from: its words, cell and size are taken.

    Raises:
        ModelError: there is no model to start from.
        ConfigError: there is no such cell, or OUT is a model whose search cannot read it, or what is there was trained
            with other options.
        TextError: a text cannot be read, or is too short.
    """
    if kind not in CELLS:
        raise ConfigError(f"--kind {kind}: no such cell; there are {', '.join(CELLS)}, and ngram for n-grams")
    if kind != "lstm" and any((out / name).is_dir() for name in NETWORKS):
        raise ConfigError(f"{out}: is a model, and its search reads --kind lstm alone; give another --out")
    lines = [line for path in texts for line in read_lines(path)]
    kept_back = math.ceil(len(lines) / _HELD_OUT)
    lines, held_out = lines[: len(lines) - kept_back], lines[len(lines) - kept_back :]
    if held_out and not lines:
        raise TextError(
            f"{len(held_out)} line: too few to train on, as the last (one in {_HELD_OUT}) is kept back to measure the "
            "perplexity; 2 lines are needed at the least, a sentence each"
        )
    training = training or NextWordTraining()
    torch.manual_seed(training.seed)
    if init_from is not None:
        model, _ = next_word.load(init_from)
        if model.kind != kind:
            raise ConfigError(f"{init_from}: its cell is {model.kind}, not {kind}")
        ngrams = estimate(lines, order=order, vocabulary=0, lexicon=model.lexicon)
    else:
        ngrams = estimate(lines, order=order, vocabulary=vocabulary, min_count=min_count)
        if not ngrams.lexicon:
            raise TextError(f"no word of the text occurs {min_count} times; give more text, or a lower --min-count")
        model = NextWord(ngrams.lexicon, kind=kind, size=size)
    folder = out / NEXT_WORD_FOLDER
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True,
    ) as bar:  # fmt: skip
        task, recent = bar.add_task("training", total=None), math.nan

        def show(done: int, total: int, loss: float) -> None:
            nonlocal recent
            recent = loss if math.isnan(recent) else 0.98 * recent + 0.02 * loss
            bar.update(task, total=total, completed=done, description=f"perplexity {math.exp(recent):.0f} in training")
            if not bar.console.is_terminal and done % max(total // 20, 1) == 0:
                bar.console.print(f"{done} of {total}: perplexity {math.exp(recent):.0f} in training", highlight=False)

        train_next_word(model, lines, folder, training, show=show)
    summary = NextWordSummary(
        folder=folder,
        words=len(model.lexicon),
        weights=sum(weight.numel() for weight in model.parameters()),
        carried=next_word.perplexity(model, held_out),
        alone=next_word.perplexity(model, held_out, carry=False),
        ngrams=ngram_perplexity(ngrams, held_out),
    )
    told = {name: round(getattr(summary, name).value, 2) for name in ("carried", "alone", "ngrams")}
    measured = {"texts": [path.name for path in texts], "order": order, "words": summary.carried.words, **told}
    write_text(folder / "perplexity.json", json.dumps(measured, indent=2, ensure_ascii=False) + "\n")
    return summary


def generate(
    prompt: str, folder: Path | None, *, words: int, temperature: float, top_k: int, seed: int
) -> tuple[list[str], Iterator[str]]:
    """What a model (None: the shipped one) writes after `prompt`: the prompt's words that it does not know, and the
    text in pieces as it comes.

    Raises:
        ModelError: there is no next-word model in the folder.
        ConfigError: an argument that is not allowed.
    """
    model, _ = next_word.load(folder or shipped_model())
    prompt = normalize(prompt)
    drawn = next_word.generate(model, prompt, words=words, temperature=temperature, top_k=top_k, seed=seed)
    return model.unknown(prompt), _written(prompt, drawn)


def _written(prompt: str, drawn: Iterator[str]) -> Iterator[str]:
    """Words with spaces between them, and a line for each sentence."""
    yield prompt
    space = " " if prompt else ""
    for word in drawn:
        yield "\n" if word == next_word.END else space + word
        space = "" if word == next_word.END else " "
    yield "\n"
