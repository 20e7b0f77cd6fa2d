"""The commands that make models: prepare, train, train-lm, export."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.status import Status

from asr.config import MOST_SEED
from asr.errors import AudioError
from pipelines.commands.options import (
    MANIFESTS,
    TRAIN,
    AddressOption,
    app,
    complain,
    end,
)

NGRAMS, NETWORKS = "With --kind ngram", "With the name of a cell"  # panels of `asr train-lm --help`


@app.command(rich_help_panel=TRAIN)
def prepare(
    manifests: Annotated[list[str], typer.Argument(metavar="MANIFEST", help=f"{MANIFESTS} Or its URL (s3://...).")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder to write, or its URL.")],
    workers: Annotated[int, typer.Option(min=0, help="Ray tasks at a time; 0 works in this process.")] = 1,
    store: Annotated[
        Literal["audio", "features"], typer.Option(help="Keep audio (for augmentation) or ready features.")
    ] = "audio",
    lexicon: Annotated[
        Literal["cmudict", "none"],
        typer.Option(help="Add the phones of English words: they help learning."),
    ] = "none",
    max_errors: Annotated[
        int | None, typer.Option(min=0, help="Stop when more rows than that cannot be used; without it, never.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Check and decode recordings once, for training (Ray Data; extra \\[train]).

    Writes shards of 16 kHz audio with text, the feature statistics, and
    report.html: what is in the data, with plots. Rows that cannot be used are
    named, and listed in skipped.jsonl. Run again, it goes on where it stopped.
    """
    from pipelines.prepare import prepare as run

    summary = run(
        manifests,
        out,
        workers=workers,
        store=store,
        lexicon=None if lexicon == "none" else lexicon,
        max_errors=max_errors,
        address=address,
    )
    for problem in summary.skipped:
        complain(problem)
    reused = f", {summary.reused} of them made before" if summary.reused else ""
    print(
        f"{summary.out}: {summary.utterances} utterances, {summary.seconds / 3600:.2f} hours, "
        f"{summary.shards} shards{reused}, {len(summary.skipped)} rows skipped"
    )
    end(summary.skipped)


@app.command(rich_help_panel=TRAIN)
def align(
    data: Annotated[list[Path], typer.Argument(metavar="PREPARED", help="Folders that `asr prepare` wrote.")],
) -> None:
    """Find where each phone lies in prepared English speech, for training.alignment_weight (extra \\[train]).

    A monophone GMM-HMM, trained from a flat start on the data itself. Networks
    that are taught every frame's phone beside CTC learn several times faster.
    """
    from asr.training.align import align as run

    for folder in data:
        with Status(f"{folder}") as status:
            found = run(folder, lambda line, status=status, folder=folder: status.update(f"{folder}: {line}"))
        print(f"{folder}: {found:.1%} of the utterances aligned")


@app.command(rich_help_panel=TRAIN)
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file, such as those in configs/.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the run; without it, runs/ and the config's name."),
    ] = None,
    set_values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override a value of the config; repeatable."),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Ray Train workers; 0 trains in this process.")] = 1,
    min_workers: Annotated[
        int | None,
        typer.Option(min=1, help="Go on with as few where nodes are lost, until they are back."),
    ] = None,
    address: AddressOption = None,
    device: Annotated[
        Literal["auto", "cpu", "gpu"],
        typer.Option(help="Of each worker; auto: a GPU where there are any. gpu waits for nodes that have them."),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell steps, memory, time and the first batches; write nothing.")
    ] = False,
) -> None:
    """Train a network on prepared data (Ray Train; extra \\[train]). Run again, it resumes.

    The run ends with a model folder, RUN/model, which the other commands take as
    --model. --set data.train='["prepared/mine"]' overrides one value of the config.
    """
    from asr.config import load_config

    chosen, folder = load_config(config, set_values or []), out or Path("runs") / config.stem
    if dry_run:
        from asr.training.dry_run import dry_run as estimate
        from asr.training.start import with_absolute_paths
        from pipelines.train import device_here

        print(estimate(with_absolute_paths(chosen), folder, device_here(device)))
        return
    from pipelines.train import train as run

    made = run(chosen, folder, workers=workers, min_workers=min_workers, address=address, device=device)
    print(f"{made}: try it with  asr transcribe --model {made} AUDIO")


_RATE_FURTHER = 1e-3  # of a next-word model that is trained further


@app.command("train-lm", rich_help_panel=TRAIN)
def train_lm(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT", help="UTF-8, a sentence a line; also .gz and .xz.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; a model's, to give it to that model.")],
    kind: Annotated[
        str,
        typer.Option(help="ngram, or a network that predicts the next word, by its cell: lstm, gru, rnn ..."),
    ] = "ngram",
    order: Annotated[
        int, typer.Option(min=2, max=5, help="Words to an n-gram; also of those that a network is compared with.")
    ] = 3,
    vocabulary: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many words, the most frequent ones.", show_default="all; a network's: 10000"),
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="Keep words that occur so often.")] = 3,
    prune: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Drop n-grams that change the perplexity by a lower share; 0 keeps all.",
            show_default="1e-7",
            rich_help_panel=NGRAMS,
        ),
    ] = None,
    lexicon: Annotated[
        Literal["cmudict", "none"] | None,
        typer.Option(
            help="Add the words of an English dictionary, however rare.", show_default="none", rich_help_panel=NGRAMS
        ),
    ] = None,
    arpa: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write them as ARPA too, for other programs.", rich_help_panel=NGRAMS),
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=2, help="Units of the cell.", show_default="256", rich_help_panel=NETWORKS)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Times through the text.", show_default="3", rich_help_panel=NETWORKS)
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Start from a next-word model (its words, cell and size), at a quarter of the learning rate.",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
    sampled: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Compare the right word with so many others at an update, not with all: faster, with many words.",
            show_default="all",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=MOST_SEED,
            help="Of the first weights and dropout.",
            show_default="1",
            rich_help_panel=NETWORKS,
        ),
    ] = None,
) -> None:
    """Make a language model from text: n-grams for --decoding beam, or a network that weighs what they find.

    ngram: words, modified Kneser-Ney, pruned. Writes OUT/lm. The text is
    normalised as transcripts are; every 200th line is kept back, to measure the
    perplexity. Needs about 500 MB of memory and half a minute for each ten
    million words.

    A cell's name: embedding, cell, softmax over words (extra \\[train]). Writes
    OUT/next-word. The last fiftieth of the text is kept back, and the perplexity
    told beside that of n-grams. Run again, it goes on where it stopped.
    """
    if kind != "ngram":
        _refuse(f"--kind {kind}", prune=prune, lexicon=lexicon, arpa=arpa)
        if init_from:
            _refuse("--init-from", vocabulary=vocabulary, size=size)
        from asr.training.next_word import NextWordTraining
        from pipelines.next_word import train_network

        options: dict[str, Any] = {"epochs": epochs, "sampled": sampled, "seed": seed}
        options["rate"] = _RATE_FURTHER if init_from else None
        given = {name: value for name, value in options.items() if value is not None}
        network = train_network(
            texts,
            out,
            kind=kind,
            size=size or 256,
            vocabulary=vocabulary or 10_000,
            min_count=min_count,
            order=order,
            init_from=init_from,
            training=NextWordTraining(**given),
        )
        print(
            f"{network.folder}: {kind}, {network.words:,} words, {network.weights / 1e6:.1f} M weights; perplexity on "
            f"{network.carried.words:,} words kept back ({network.carried.unknown:,} more are unknown): "
            f"{network.carried.value:.1f}, with each sentence by itself {network.alone.value:.1f}; "
            f"n-grams of {order} words {network.ngrams.value:.1f}"
        )
        return
    _refuse("--kind ngram", size=size, epochs=epochs, init_from=init_from, sampled=sampled, seed=seed)
    from pipelines.train_lm import train_lm as run

    made = run(
        texts,
        out,
        order=order,
        threshold=1e-7 if prune is None else prune,
        vocabulary=vocabulary,
        min_count=min_count,
        lexicon="cmudict" if lexicon == "cmudict" else None,
        arpa=arpa,
    )
    ngrams = " + ".join(f"{n:,}" for n in made.ngrams)
    measured = "too little text to measure its perplexity"
    if made.perplexity.words:
        measured = (
            f"perplexity {made.perplexity.value:.1f} on {made.perplexity.words:,} words kept back "
            f"({made.perplexity.unknown:,} more are unknown)"
        )
    print(f"{made.folder}: {made.words:,} words, {ngrams} n-grams, {made.megabytes:.1f} MB, {measured}")


def _refuse(where: str, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter(f"--{name.replace('_', '-')}: not with {where}")


@app.command(rich_help_panel=TRAIN)
def export(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RUN|MODEL", help="Runs or models; without any, the model that comes along."),
    ] = None,
    to: Annotated[
        Literal["model", "onnx", "onnx-int8", "sherpa"],
        typer.Option(help="A whole model folder, only the graphs, or graphs that the package sherpa-onnx runs."),
    ] = "model",
    small: Annotated[
        bool,
        typer.Option(
            "--small", help="A model in an eighth of the size: int8 graphs alone, and of the weights what they lack."
        ),
    ] = False,
    speech: Annotated[
        list[Path] | None,
        typer.Option(help="A recording to check the graphs on; repeatable. Without it, a sentence that comes along."),
    ] = None,
) -> None:
    """Join runs (an offline one, a streaming one) into one model folder, or write their ONNX graphs.

    Every graph is compared with PyTorch on speech before it is written.
    """
    if small and to != "model":
        raise typer.BadParameter("--small is for a whole model; of graphs alone, onnx-int8 are the small ones")
    from asr.audio import read_audio
    from asr.runtime.export import export_model
    from asr.runtime.folder import shipped_model

    recordings = []
    for path in speech or ():
        recordings.append(read_audio(path))
        if not recordings[-1].any():
            raise AudioError(f"{path}: silent; graphs are compared on speech")
    export_model(sources or [shipped_model()], out, to, small=small, speech=recordings or None)
    print(f"{out}: written")
