"""The commands that look inside the LSTM: inspect, study, generate."""

from pathlib import Path
from typing import Annotated

import typer

from asr.config import MOST_SEED
from pipelines.commands.options import INSIDE, AddressOption, ModelOption, StreamingOption, app, tell


@app.command(rich_help_panel=INSIDE)
def inspect(
    audio: Annotated[Path, typer.Argument(help="A recording.")],
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            help="report.html, or .png, .json, .parquet; may be given several times.",
            show_default="report.html",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Two models, or two networks of one (MODEL/offline), side by side."),
    ] = None,
    start: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Where to start in the recording.")] = 0.0,
    duration: Annotated[float | None, typer.Option(min=0.01, metavar="SECONDS", help="How much of it to read.")] = None,
    layer: Annotated[
        int | None, typer.Option(min=1, help="Only this recurrent layer; without it, all of them.")
    ] = None,
    model: ModelOption = None,
    streaming: StreamingOption = False,
) -> None:
    """Show what the gates of a network do while it listens (extra \\[train]).

    On one time axis: the spectrogram, the words, where the network looked for
    each, and the forget, input and output gates and the cell of every layer. How
    long each unit remembers, and which units track silence, voicing, word ends
    or the position.

    html is one interactive file that opens offline; png a picture; json and
    parquet hold the numbers. --streaming feeds the recording in blocks, as live
    audio comes, and shows the text as it grew.
    """
    if compare is not None and model is not None:
        raise typer.BadParameter("--model: --compare names both models")
    from pipelines.inspect import inspect as run

    models = list(compare) if compare else [model]
    outputs = output or [Path("report.html")]
    run(audio, outputs, models, streaming, layer=layer, start=start, duration=duration)
    tell(f"written: {', '.join(map(str, outputs))}")


@app.command(rich_help_panel=INSIDE)
def study(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            help="memory, gradients, cost, structure, little-data, noise, attention, feed-forward, limit; none: all."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder to write.", show_default="runs/study, or runs/study-quick"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The small version: 7 minutes on two idle cores.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Settings side by side, over Ray; 1 works in this process.")] = 2,
    markdown: Annotated[
        Path | None, typer.Option(help="Write a summary there as well, with its figures in a folder beside it.")
    ] = None,
    address: AddressOption = None,
) -> None:
    """Put what is claimed of LSTMs to the test (extra \\[train]).

    Long memory, gradients, cost, structure, little data, noise, Transformers,
    feed-forward networks and the limit: each with a figure, a table, its seeds
    and a verdict by a stated rule, in OUT/report.html.

    The result of each setting is kept; run again, it goes on where it stopped.
    The full study takes many hours. It trains on ../shared/data where that is,
    else on digits that espeak-ng says.
    """
    from pipelines.study import study as run

    folder = out or Path("runs") / ("study-quick" if quick else "study")
    print(run(experiments or [], folder, quick=quick, workers=workers, address=address, markdown=markdown))


@app.command(rich_help_panel=INSIDE)
def generate(
    prompt: Annotated[str, typer.Argument(help="How the text starts.")] = "",
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", help="Folder that `asr train-lm --kind lstm` wrote; without it, the shipped model's."
        ),
    ] = None,
    words: Annotated[int, typer.Option(min=1, help="How many to write.")] = 50,
    temperature: Annotated[float, typer.Option(help="Above 1 bolder, below 1 safer.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many most probable words; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="The same seed gives the same text.")] = 0,
) -> None:
    """Let a next-word network go on writing (extra \\[train]).

    Words of PROMPT that the model does not know are read as <unk>, and named.
    """
    from pipelines.next_word import generate as run

    unknown, text = run(prompt, model, words=words, temperature=temperature, top_k=top_k, seed=seed)
    if unknown:
        tell(f"not known to the model, read as <unk>: {', '.join(unknown)}")
    for piece in text:
        print(piece, end="", flush=True)
